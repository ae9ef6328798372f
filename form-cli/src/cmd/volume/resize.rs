use clap_complete::engine::ArgValueCompleter;
use form_api::volume::{AttachmentState, ResizeRequest};
use form_types::{Name, size::Bytes};

use super::size;
use crate::{args::volume_name, complete, failure::Outcome, operation::settle, session::Session};

/// Make a volume larger
///
/// In a VM that runs with it the disk and its file system grow at once. A volume is never made smaller.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
    /// Its new size: 20G, 512M, 20 for GiB, 20971520B to the byte
    #[arg(value_parser = size)]
    size: Bytes,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let operation = settle(session, &client, client.resize_volume(&args.name, &ResizeRequest { size_bytes: args.size.0 }).await?).await?;
    let holder = if operation.status.is_final() { client.volume(&args.name).await?.attachment } else { None };
    let when = match holder.map(|holder| (holder.state, holder.read_only || holder.device.is_none(), holder.vm)) {
        Some((AttachmentState::Attached, false, vm)) => format!(", also in {vm}, which runs with it"),
        Some((AttachmentState::Attached | AttachmentState::Starting, _, vm)) => format!("; {vm} sees it after `form vm restart {vm}`"),
        _ => String::new(),
    };
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: {}{when}", args.name, args.size))?;
    Ok(0)
}
