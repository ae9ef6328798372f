use clap_complete::engine::ArgValueCompleter;
use form_api::{operation::OperationStatus, snapshot::SnapshotRequest};
use form_types::Name;
use jiff::Timestamp;

use crate::{
    args::vm_name,
    complete,
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Save memory, devices, root disk and volumes of a VM at one instant
///
/// The VM stands still for it, and goes on. Of a stopped VM the disks are saved. Each volume that it can write to gets a snapshot of the same
/// name in its own pool; while the VM runs that pool has to share blocks (XFS, Btrfs).
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Name,
    /// What to call the snapshot [default: one of the time]
    #[arg(long, short)]
    name: Option<Name>,
    /// Compress its memory while the VM runs on: a restore unfolds it first, and no later snapshot builds upon it
    #[arg(long)]
    compress: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let of_time = || Timestamp::now().strftime("s%Y%m%d-%H%M%S").to_string().parse();
    let name = args.name.map_or_else(of_time, Ok).map_err(|error| Failure::failed(error.to_string()))?;
    let request = SnapshotRequest { name: Some(name.clone()), compress: args.compress };
    let operation = settle(session, &client, client.create_snapshot(&args.vm, &request).await?).await?;
    let made = if operation.status.is_final() { "made" } else { "under way" };
    session.terminal.done(&operation, name.as_str(), &format!("{}: snapshot {name} {made}", args.vm))?;
    if args.compress
        && operation.status == OperationStatus::Completed
        && client.snapshot(&args.vm, &name).await.is_ok_and(|snapshot| !snapshot.compressed)
    {
        let why = operation.steps.last().map_or("its memory is not compressed", String::as_str);
        session.terminal.warn(format!("{}: snapshot {name}: {why}", args.vm));
    }
    Ok(0)
}
