use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::vm_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    session::Session,
};

/// Remove snapshots of a VM
///
/// What they hold of volumes goes with them. A VM that was restored from one runs on.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Name,
    /// Its snapshots
    #[arg(required = true, add = ArgValueCompleter::new(complete::snapshots))]
    snapshots: Vec<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    for name in &args.snapshots {
        client.snapshot(&args.vm, name).await?;
    }
    let names: Vec<&str> = args.snapshots.iter().map(Name::as_str).collect();
    session.terminal.confirm(&format!("Remove the snapshots {} of {}?", names.join(", "), args.vm))?;
    each(session, &args.snapshots, async |name: Name| {
        let operation = settle(session, &client, client.remove_snapshot(&args.vm, &name).await?).await?;
        let done = if operation.status.is_final() { "removed" } else { "removal under way" };
        session.terminal.done(&operation, name.as_str(), &format!("{}: snapshot {name} {done}", args.vm))
    })
    .await
}
