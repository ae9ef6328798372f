use clap_complete::engine::ArgValueCompleter;
use form_api::volume::RemoveVolumeQuery;
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
/// One that has snapshots is only removed together with them. One whose pool is gone for good is forgotten with --lost.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volumes
    #[arg(value_parser = volume_name, required = true, add = ArgValueCompleter::new(complete::volumes))]
    names: Vec<Name>,
    /// Remove their snapshots as well
    #[arg(long)]
    snapshots: bool,
    /// Forget them: their pool is gone for good, and nothing is touched that may be left of it
    #[arg(long, conflicts_with = "snapshots")]
    lost: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    for name in &args.names {
        client.volume(name).await?;
    }
    let names: Vec<&str> = args.names.iter().map(Name::as_str).collect();
    let names = names.join(", ");
    let question = match (args.lost, args.snapshots) {
        (true, _) => format!("Forget {names}? What is left of it in a pool that comes back will be nobody's."),
        (false, true) => format!("Remove {names} and everything written to it, with all snapshots?"),
        (false, false) => format!("Remove {names} and everything written to it?"),
    };
    session.terminal.confirm(&question)?;
    let how = RemoveVolumeQuery { snapshots: args.snapshots, lost: args.lost };
    each(session, &args.names, async |name: Name| {
        let operation = settle(session, &client, client.remove_volume(&name, how).await?).await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: removed"))
    })
    .await
}
