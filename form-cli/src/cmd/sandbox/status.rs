use std::time::Duration;

use form_api::client::Timeouts;

use super::{HostReport, Report, Which, incomplete};
use crate::{
    context::{ConfigFile, Target},
    failure::{Failure, Outcome},
    sandbox::{self, Host, Record},
    session::Session,
};

/// Show whether a sandbox runs, and what it uses
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
}

/// Who only looks does not wait long.
const TIMEOUTS: Timeouts = Timeouts { connect: Duration::from_secs(2), request: Duration::from_secs(5), deadline: None };

pub async fn run(args: Args, session: &Session) -> Outcome {
    let name = args.which.name;
    let directory = sandbox::directory(&ConfigFile::load()?.config, &name)?;
    if !directory.exists() {
        return Err(Failure::not_found(format!("there is no sandbox `{name}`")).hint("`form sandbox up` makes one"));
    }
    let first = Record::load(&directory)?.ok_or_else(|| incomplete(&name))?;
    let mut hosts = Vec::new();
    for host in Host::all(&name, &directory, first.hosts())? {
        let record = Record::load(&host.directory)?.ok_or_else(|| incomplete(&name))?;
        let target = Target::Remote(record.known_host(&host.name)?);
        let answers = host.runs() && session.connect(&target, TIMEOUTS)?.host().await.is_ok();
        hosts.push(HostReport::new(&host, &record, answers));
    }
    let away = hosts.iter().any(|host| !host.runs());
    Report { name, directory, hosts }.show(session)?;
    if away && !session.terminal.is_machine_readable() {
        session.terminal.note("`form sandbox up` starts what does not run, with its disk; `form sandbox down` removes it.");
    }
    Ok(0)
}
