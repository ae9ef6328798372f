use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::volume_name,
    complete,
    failure::Outcome,
    session::Session,
    ui::{Record, bytes},
};

/// Show everything about a snapshot of a volume
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
    let snapshot = session.client()?.volume_snapshot(&args.volume, &args.snapshot).await?;
    let record = Record::new(snapshot.name.to_string())
        .field("name", &snapshot.name)
        .field("volume", &snapshot.volume)
        .optional("fault", snapshot.fault.as_ref())
        .optional("state", snapshot.consistency.map(|consistency| consistency.as_str()))
        .optional("size", snapshot.size_bytes.map(|size| format!("{} ({size} bytes)", bytes(size))))
        .optional("used", snapshot.allocated_bytes.map(bytes))
        .optional("stood still", snapshot.pause_ms.map(|ms| format!("{ms} ms")))
        .field("pool", &snapshot.pool)
        .field("format", snapshot.format.as_str())
        .optional("created", snapshot.created_at)
        .field("host", &snapshot.host_name)
        .wide("volume id", snapshot.volume_id)
        .wide("host id", snapshot.host);
    session.terminal.show(&snapshot, &record)?;
    Ok(0)
}
