use std::path::Path;

use clap_complete::engine::ArgValueCompleter;
use form_api::client::Timeouts;

use crate::{
    complete,
    context::{ConfigFile, LOCAL_SOCKET, resolve},
    failure::Outcome,
    session::Session,
};

/// Show a host: what it has and how much of it VMs use
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Its name or address; the one that commands talk to without it
    #[arg(value_name = "HOST", add = ArgValueCompleter::new(complete::hosts))]
    name: Option<String>,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let config = ConfigFile::load()?.config;
    let wanted = args.name.as_deref().or(session.global.host.as_deref());
    let target = resolve(&config, session.global.context.as_ref(), wanted, Path::new(LOCAL_SOCKET))?;
    let client = session.connect(&target, Timeouts::default())?;
    let host = client.host().await?;
    session.terminal.show(&host, &super::record(&host, &client.target()))?;
    Ok(0)
}
