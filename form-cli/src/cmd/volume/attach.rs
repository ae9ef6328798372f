use clap_complete::engine::ArgValueCompleter;
use form_api::volume::{AttachRequest, AttachmentState};
use form_types::Name;

use crate::{
    args::{vm_name, volume_name},
    complete,
    failure::Outcome,
    operation::settle,
    session::Session,
};

/// Give a volume to a VM: at once when it runs, else from its next start on
///
/// One VM at a time has a volume. A volume that never held anything gets a file system when it is first mounted; one that holds
/// anything is never changed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Name,
    /// Where to mount it; without a path the VM gets the bare device
    path: Option<String>,
    /// The VM cannot write to it
    #[arg(long)]
    read_only: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let request = AttachRequest { vm: args.vm.clone(), path: args.path, read_only: args.read_only };
    let operation = settle(session, &client, client.attach_volume(&args.name, &request).await?).await?;
    let attachment = if operation.status.is_final() { client.volume(&args.name).await?.attachment } else { None };
    let when = match attachment.map(|attachment| (attachment.state, attachment.device, attachment.path)) {
        Some((AttachmentState::Attached, Some(device), Some(path))) => format!("{} has it at {path} ({device})", args.vm),
        Some((AttachmentState::Attached, Some(device), None)) => format!("{} has it as {device}", args.vm),
        Some((AttachmentState::NeedsRestart, ..)) => {
            format!("{0} runs without it until its guest answers, or `form vm restart {0}`", args.vm)
        }
        _ => format!("{} has it from its next start on", args.vm),
    };
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: attached; {when}", args.name))?;
    Ok(0)
}
