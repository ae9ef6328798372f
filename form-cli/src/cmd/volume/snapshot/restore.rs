use clap_complete::engine::ArgValueCompleter;
use form_api::volume::VolumeRestoreRequest;
use form_types::Name;

use crate::{args::volume_name, complete, failure::Outcome, operation::settle, session::Session, ui::bytes};

/// Put a volume back to what it held when a snapshot was made
///
/// What was written since is lost, and the volume has the size that it had then. No VM may run with it, and it may not be exported. The snapshot
/// stays.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    volume: Name,
    /// Its snapshot
    #[arg(add = ArgValueCompleter::new(complete::volume_snapshots))]
    snapshot: Name,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let (volume, name) = (&args.volume, &args.snapshot);
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    let size_bytes = client.volume_snapshot(volume, name).await?.size_bytes;
    let now = client.volume(volume).await?.size_bytes;
    let resized = size_bytes.filter(|size| *size != now).map(|size| format!(", and it has {} again", bytes(size))).unwrap_or_default();
    session.terminal.confirm(&format!("Put {volume} back to the snapshot {name}? What was written since is lost{resized}."))?;
    let request = VolumeRestoreRequest { snapshot: name.clone(), size_bytes };
    let operation = settle(session, &client, client.restore_volume(volume, &request).await?).await?;
    let done = if operation.status.is_final() { "restored" } else { "restore under way" };
    session.terminal.done(&operation, volume.as_str(), &format!("{volume}: {done} from {name}"))?;
    Ok(0)
}
