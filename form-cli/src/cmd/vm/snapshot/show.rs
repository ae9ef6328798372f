use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::vm_name,
    complete,
    failure::Outcome,
    session::Session,
    ui::{Record, bytes},
};

/// Show everything about a snapshot
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Name,
    /// Its snapshot
    #[arg(add = ArgValueCompleter::new(complete::snapshots))]
    snapshot: Name,
    /// Read all of its memory and compare it with its checksums; damage is its fault, and exit 1
    #[arg(long)]
    verify: bool,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let snapshot = match args.verify {
        true => client.verified_snapshot(&args.vm, &args.snapshot).await?,
        false => client.snapshot(&args.vm, &args.snapshot).await?,
    };
    let kind = snapshot.memory_kind.map(|kind| match &snapshot.based_on {
        Some(base) => format!("{}, based on {base}", kind.as_str()),
        None => kind.as_str().to_owned(),
    });
    let record = Record::new(snapshot.name.to_string())
        .field("name", &snapshot.name)
        .field("vm", &snapshot.vm)
        .optional("fault", snapshot.fault.as_ref())
        .optional("state", snapshot.consistency.map(|consistency| consistency.as_str()))
        .optional("memory", snapshot.memory_mib.map(|mib| bytes(mib << 20)))
        .optional("vcpus", snapshot.vcpus)
        .optional("disk", snapshot.disk_bytes.map(bytes))
        .optional(
            "volumes",
            Some(snapshot.volumes.iter().map(Name::as_str).collect::<Vec<_>>().join(" ")).filter(|names| !names.is_empty()),
        )
        .optional("used", snapshot.allocated_bytes.map(bytes))
        .optional("memory written as", kind)
        .optional("memory written", snapshot.written_bytes.map(bytes))
        .optional("memory kept", snapshot.unfolded_bytes.map(|unfolded| format!("compressed: a restore unfolds {} first", bytes(unfolded))))
        .optional("stood still", snapshot.pause_ms.map(|ms| format!("{ms} ms")))
        .optional("image", snapshot.image_digest)
        .optional("created", snapshot.created_at)
        .field("host", &snapshot.host_name)
        .wide("vm id", snapshot.vm_id)
        .wide("host id", snapshot.host);
    session.terminal.show(&snapshot, &record)?;
    Ok(u8::from(args.verify && snapshot.fault.is_some()))
}
