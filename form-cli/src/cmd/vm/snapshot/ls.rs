use clap_complete::engine::ArgValueCompleter;
use form_api::snapshot::{MemoryKind, Snapshot};
use form_types::Name;
use jiff::Timestamp;

use crate::{
    args::vm_name,
    complete,
    failure::Outcome,
    session::Session,
    ui::{Table, age, bytes},
};

/// List snapshots of a VM, or of all
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only those of this VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Option<Name>,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let snapshots = match &args.vm {
        Some(vm) => client.snapshots(vm).await?,
        None => client.all_snapshots().await?,
    };
    let mut table = Table::new(
        &["NAME", "VM", "MEMORY", "DISK", "USED", "KIND", "STATE", "AGE"],
        &["BASED ON", "WROTE", "UNFOLDS TO", "VOLUMES", "PAUSE", "VCPUS", "IMAGE", "HOST", "FAULT"],
    );
    for snapshot in &snapshots {
        let state = snapshot.consistency.filter(|_| snapshot.fault.is_none());
        table.row([
            snapshot.name.to_string(),
            snapshot.vm.to_string(),
            snapshot.memory_mib.map(|mib| bytes(mib << 20)).unwrap_or_default(),
            snapshot.disk_bytes.map(bytes).unwrap_or_default(),
            snapshot.allocated_bytes.map(bytes).unwrap_or_default(),
            kind(snapshot),
            state.map_or("failed", |consistency| consistency.as_str()).to_owned(),
            snapshot.created_at.map(|at| age(at, Timestamp::now())).unwrap_or_default(),
            snapshot.based_on.as_ref().map(Name::to_string).unwrap_or_default(),
            snapshot.written_bytes.map(bytes).unwrap_or_default(),
            snapshot.unfolded_bytes.map(bytes).unwrap_or_default(),
            snapshot.volumes.iter().map(Name::as_str).collect::<Vec<_>>().join(" "),
            snapshot.pause_ms.map(|ms| format!("{ms} ms")).unwrap_or_default(),
            snapshot.vcpus.map(|vcpus| vcpus.to_string()).unwrap_or_default(),
            snapshot.image_digest.map(|digest| digest.short()).unwrap_or_default(),
            snapshot.host_name.clone(),
            snapshot.fault.clone().unwrap_or_default(),
        ]);
    }
    session.terminal.list(&snapshots, &table)?;
    Ok(0)
}

/// How its memory was written, and is kept.
fn kind(snapshot: &Snapshot) -> String {
    let kind = snapshot.memory_kind.map(MemoryKind::as_str);
    let words: Vec<&str> = kind.into_iter().chain(snapshot.compressed.then_some("compressed")).collect();
    words.join(", ")
}
