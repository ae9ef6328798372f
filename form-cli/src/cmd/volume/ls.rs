use form_api::volume::{AttachmentState, Volume};
use jiff::Timestamp;

use crate::{
    failure::Outcome,
    session::Session,
    ui::{Table, age, bytes},
};

/// List volumes
#[derive(Debug, clap::Args)]
pub struct Args {}

pub async fn run(_: &Args, session: &Session) -> Outcome {
    let volumes = session.client()?.volumes().await?;
    let usual = ["NAME", "SIZE", "USED", "VM", "STATE", "PATH", "AGE"];
    let mut table = Table::new(&usual, &["DEVICE", "POOL", "FORMAT", "SERIAL", "HOST", "ID", "FAULT"]);
    for volume in &volumes {
        let attachment = volume.attachment.as_ref();
        table.row([
            volume.name.to_string(),
            bytes(volume.size_bytes),
            volume.allocated_bytes.map(bytes).unwrap_or_default(),
            attachment.map(|attachment| attachment.vm.to_string()).unwrap_or_default(),
            state(volume).to_owned(),
            attachment.and_then(|attachment| attachment.path.clone()).unwrap_or_default(),
            age(volume.created_at, Timestamp::now()),
            attachment.and_then(|attachment| attachment.device.clone()).unwrap_or_default(),
            volume.pool.to_string(),
            volume.format.as_str().to_owned(),
            volume.serial.clone(),
            volume.host_name.clone(),
            volume.id.short(),
            volume.fault.clone().unwrap_or_default(),
        ]);
    }
    session.terminal.list(&volumes, &table)?;
    Ok(0)
}

/// In a word: `free`, `exported`, or how far its attachment has come.
pub fn state(volume: &Volume) -> &'static str {
    match (&volume.fault, &volume.attachment) {
        (Some(_), _) => "failed",
        (None, None) if volume.export.is_some() => "exported",
        (None, None) => "free",
        (None, Some(attachment)) => match attachment.state {
            AttachmentState::NeedsRestart => "needs restart",
            state => state.as_str(),
        },
    }
}
