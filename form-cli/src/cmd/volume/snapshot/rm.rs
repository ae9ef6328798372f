use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::volume_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    session::Session,
};

/// Remove snapshots of a volume
///
/// The volume, and what was made from a snapshot, stay as they are.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    volume: Name,
    /// Its snapshots
    #[arg(required = true, add = ArgValueCompleter::new(complete::volume_snapshots))]
    snapshots: Vec<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    for name in &args.snapshots {
        client.volume_snapshot(&args.volume, name).await?;
    }
    let names: Vec<&str> = args.snapshots.iter().map(Name::as_str).collect();
    session.terminal.confirm(&format!("Remove the snapshots {} of {}?", names.join(", "), args.volume))?;
    each(session, &args.snapshots, async |name: Name| {
        let operation = settle(session, &client, client.remove_volume_snapshot(&args.volume, &name).await?).await?;
        let done = if operation.status.is_final() { "removed" } else { "removal under way" };
        session.terminal.done(&operation, name.as_str(), &format!("{}: snapshot {name} {done}", args.volume))
    })
    .await
}
