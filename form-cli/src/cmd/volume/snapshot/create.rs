use clap_complete::engine::ArgValueCompleter;
use form_api::volume::VolumeSnapshotRequest;
use form_types::Name;
use jiff::Timestamp;

use crate::{
    args::volume_name,
    complete,
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Keep what a volume holds now
///
/// A VM that runs with the volume stands still for a moment, its file systems quiesced when its guest answers; that needs a pool on XFS or Btrfs.
/// Of a volume with which no VM runs a copy is made in any pool.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    volume: Name,
    /// What to call the snapshot [default: one of the time]
    #[arg(long, short)]
    name: Option<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let of_time = || Timestamp::now().strftime("s%Y%m%d-%H%M%S").to_string().parse();
    let name = args.name.map_or_else(of_time, Ok).map_err(|error| Failure::failed(error.to_string()))?;
    let request = VolumeSnapshotRequest { name: Some(name.clone()) };
    let operation = settle(session, &client, client.create_volume_snapshot(&args.volume, &request).await?).await?;
    let made = if operation.status.is_final() { "made" } else { "under way" };
    session.terminal.done(&operation, name.as_str(), &format!("{}: snapshot {name} {made}", args.volume))?;
    Ok(0)
}
