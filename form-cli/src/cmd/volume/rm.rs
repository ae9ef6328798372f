use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::volume_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    session::Session,
};

/// Remove volumes that no VM has, with everything they hold
///
/// One that has snapshots is only removed together with them.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volumes
    #[arg(value_parser = volume_name, required = true, add = ArgValueCompleter::new(complete::volumes))]
    names: Vec<Name>,
    /// Remove their snapshots as well
    #[arg(long)]
    snapshots: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    for name in &args.names {
        client.volume(name).await?;
    }
    let names: Vec<&str> = args.names.iter().map(Name::as_str).collect();
    let also = if args.snapshots { ", with all snapshots" } else { "" };
    session.terminal.confirm(&format!("Remove {} and everything written to it{also}?", names.join(", ")))?;
    each(session, &args.names, async |name: Name| {
        let operation = settle(session, &client, client.remove_volume(&name, args.snapshots).await?).await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: removed"))
    })
    .await
}
