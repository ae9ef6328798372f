use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::volume_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    session::Session,
};

/// Take volumes from the VMs that have them, which must be stopped; what they hold stays
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volumes
    #[arg(value_parser = volume_name, required = true, add = ArgValueCompleter::new(complete::volumes))]
    names: Vec<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    each(session, &args.names, async |name: Name| {
        let operation = settle(session, &client, client.detach_volume(&name).await?).await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: detached"))
    })
    .await
}
