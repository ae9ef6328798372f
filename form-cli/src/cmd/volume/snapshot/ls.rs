use clap_complete::engine::ArgValueCompleter;
use form_types::Name;
use jiff::Timestamp;

use crate::{
    args::volume_name,
    complete,
    failure::Outcome,
    session::Session,
    ui::{Table, age, bytes},
};

/// List snapshots of a volume, or of all
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only those of this volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    volume: Option<Name>,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let snapshots = match &args.volume {
        Some(volume) => client.volume_snapshots(volume).await?,
        None => client.all_volume_snapshots().await?,
    };
    let mut table = Table::new(&["NAME", "VOLUME", "SIZE", "USED", "STATE", "AGE"], &["PAUSE", "POOL", "FORMAT", "HOST", "FAULT"]);
    for snapshot in &snapshots {
        let state = snapshot.consistency.filter(|_| snapshot.fault.is_none());
        table.row([
            snapshot.name.to_string(),
            snapshot.volume.to_string(),
            snapshot.size_bytes.map(bytes).unwrap_or_default(),
            snapshot.allocated_bytes.map(bytes).unwrap_or_default(),
            state.map_or("failed", |consistency| consistency.as_str()).to_owned(),
            snapshot.created_at.map(|at| age(at, Timestamp::now())).unwrap_or_default(),
            snapshot.pause_ms.map(|ms| format!("{ms} ms")).unwrap_or_default(),
            snapshot.pool.to_string(),
            snapshot.format.as_str().to_owned(),
            snapshot.host_name.clone(),
            snapshot.fault.clone().unwrap_or_default(),
        ]);
    }
    session.terminal.list(&snapshots, &table)?;
    Ok(0)
}
