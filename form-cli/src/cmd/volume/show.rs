use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use super::{limits_text, ls::state};
use crate::{
    args::volume_name,
    complete,
    failure::Outcome,
    session::Session,
    ui::{Record, bytes, count},
};

/// Show everything about a volume
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let volume = session.client()?.volume(&args.name).await?;
    let attachment = volume.attachment.as_ref();
    let access = attachment.map(|attachment| if attachment.read_only { "read-only" } else { "read-write" });
    let exported = volume.export.as_ref().map(|export| {
        format!("{}, {}", if export.writable { "read-write" } else { "read-only" }, count(export.clients as usize, "client"))
    });
    let record = Record::new(volume.name.to_string())
        .field("name", &volume.name)
        .field("state", state(&volume))
        .optional("fault", volume.fault.as_ref())
        .field("size", format!("{} ({} bytes)", bytes(volume.size_bytes), volume.size_bytes))
        .optional("used", volume.allocated_bytes.map(bytes))
        .optional("snapshots", (volume.snapshots > 0).then_some(volume.snapshots))
        .optional("limits", limits_text(volume.limits))
        .optional("vm", attachment.map(|attachment| &attachment.vm))
        .optional("path", attachment.and_then(|attachment| attachment.path.as_ref()))
        .optional("access", access)
        .optional("device", attachment.and_then(|attachment| attachment.device.as_ref()))
        .optional("in the guest", attachment.and_then(|attachment| attachment.device_size_bytes).map(bytes))
        .optional("synced", attachment.and_then(|attachment| attachment.synced_at))
        .optional("export", volume.export.as_ref().map(|export| &export.uri))
        .optional("exported", exported)
        .field("pool", &volume.pool)
        .field("format", volume.format.as_str())
        .field("serial", &volume.serial)
        .field("created", volume.created_at)
        .field("host", &volume.host_name)
        .field("id", volume.id)
        .wide("host id", volume.host);
    session.terminal.show(&volume, &record)?;
    Ok(0)
}
