use std::{path::Path, time::Duration};

use form_api::{client::Timeouts, host::Host};
use form_types::PublicKey;
use futures_util::future::join_all;
use serde::Serialize;

use crate::{
    context::{ConfigFile, LOCAL_SOCKET, Target},
    failure::{Failure, Outcome},
    session::Session,
    ui::Table,
};

/// List hosts and whether they answer
#[derive(Debug, clap::Args)]
pub struct Args {}

#[derive(Serialize)]
struct Listed {
    name: String,
    address: String,
    context: String,
    public_key: Option<PublicKey>,
    reachable: bool,
    /// Why it does not answer.
    error: Option<String>,
    host: Option<Host>,
}

/// A list does not wait long for who is away.
const TIMEOUTS: Timeouts = Timeouts { connect: Duration::from_secs(2), request: Duration::from_secs(5), deadline: None };

pub async fn run(_: &Args, session: &Session) -> Outcome {
    let config = ConfigFile::load()?.config;
    let mut targets = Vec::new();
    for context in &config.contexts {
        if session.global.context.as_ref().is_none_or(|wanted| *wanted == context.name) {
            targets.extend(context.hosts.iter().map(|host| (context.name.to_string(), Target::Remote(host.clone()))));
        }
    }
    if Path::new(LOCAL_SOCKET).exists() {
        targets.push((String::new(), Target::Local(LOCAL_SOCKET.into())));
    }
    let listed = join_all(targets.into_iter().map(|(context, target)| ask(session, context, target))).await;
    session.terminal.list(&listed, &table(&listed))?;
    if listed.is_empty() && !session.terminal.is_machine_readable() {
        session.terminal.note("No hosts. `form host add ADDRESS --token TOKEN` adds one.");
    }
    Ok(0)
}

async fn ask(session: &Session, context: String, target: Target) -> Listed {
    let answer = match session.connect(&target, TIMEOUTS) {
        Ok(client) => client.host().await.map_err(Failure::from),
        Err(failure) => Err(failure),
    };
    let (name, address, public_key) = match target {
        Target::Local(path) => (String::new(), format!("unix:{}", path.display()), None),
        Target::Remote(known) => (known.name, known.address, Some(known.public_key)),
    };
    let name = answer.as_ref().map_or(name, |host| host.name.clone());
    let public_key = answer.as_ref().map_or(public_key, |host| Some(host.public_key));
    let (host, error) = match answer {
        Ok(host) => (Some(host), None),
        Err(failure) => (None, Some(failure.error.message)),
    };
    Listed { name, address, context, public_key, reachable: host.is_some(), error, host }
}

fn table(listed: &[Listed]) -> Table {
    let mut table = Table::new(&["NAME", "ADDRESS", "CONTEXT", "STATUS", "VMS", "VERSION"], &["PUBLIC KEY", "ERROR"]);
    for listed in listed {
        let of = |text: fn(&Host) -> String| listed.host.as_ref().map(text).unwrap_or_default();
        table.row([
            if listed.name.is_empty() { listed.address.clone() } else { listed.name.clone() },
            listed.address.clone(),
            listed.context.clone(),
            if listed.reachable { "ready" } else { "unreachable" }.to_owned(),
            of(|host| host.vms.to_string()),
            of(|host| host.version.clone()),
            listed.public_key.map(|key| key.to_string()).unwrap_or_default(),
            listed.error.clone().unwrap_or_default(),
        ]);
    }
    table
}
