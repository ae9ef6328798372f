use clap_complete::engine::ArgValueCompleter;
use form_api::volume::CloneRequest;
use form_types::Name;

use crate::{args::volume_name, complete, failure::Outcome, operation::settle, session::Session};

/// Make a new volume that holds what another holds now, or held when a snapshot was made
///
/// No VM may run with the other one meanwhile, unless it is a snapshot of it that is copied. Where the pool's file system can, both share what they have in common.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume to copy
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
    /// The new volume's name
    #[arg(value_parser = volume_name)]
    new: Name,
    /// What the other one held then
    #[arg(long, value_name = "SNAPSHOT", add = ArgValueCompleter::new(complete::volume_snapshots))]
    snapshot: Option<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let (size_bytes, held) = match &args.snapshot {
        Some(snapshot) => (client.volume_snapshot(&args.name, snapshot).await?.size_bytes, format!(" held at {snapshot}")),
        None => (None, " holds".to_owned()),
    };
    let request = CloneRequest { name: args.new.clone(), snapshot: args.snapshot, size_bytes };
    let operation = settle(session, &client, client.clone_volume(&args.name, &request).await?).await?;
    session.terminal.done(&operation, args.new.as_str(), &format!("{}: holds what {}{held}", args.new, args.name))?;
    Ok(0)
}
