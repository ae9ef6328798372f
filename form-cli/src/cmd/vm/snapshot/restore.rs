use clap_complete::engine::ArgValueCompleter;
use form_api::snapshot::RestoreRequest;
use form_types::Name;

use crate::{args::vm_name, complete, failure::Outcome, operation::settle, session::Session};

/// Put a VM back to what it was when a snapshot was made
///
/// It goes on from there with its name and address, and its volumes go back with it; what it did since is lost. The snapshot stays. The VM
/// has to have the volumes that it had then, in the same places.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Name,
    /// Its snapshot
    #[arg(add = ArgValueCompleter::new(complete::snapshots))]
    snapshot: Name,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let (vm, name) = (&args.vm, &args.snapshot);
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    client.snapshot(vm, name).await?;
    session.terminal.confirm(&format!("Put {vm} back to the snapshot {name}? What it did since is lost."))?;
    let operation = settle(session, &client, client.restore(vm, &RestoreRequest { snapshot: name.clone() }).await?).await?;
    let done = if operation.status.is_final() { "restored" } else { "restore under way" };
    session.terminal.done(&operation, vm.as_str(), &format!("{vm}: {done} from {name}"))?;
    Ok(0)
}
