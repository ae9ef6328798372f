use form_api::vm::{Vm, VmState};
use form_types::Name;

use crate::{
    args::label,
    failure::{Failure, Outcome},
    operation::{each, settle},
    sandbox,
    session::Session,
    ui::count,
    vm_view,
};

/// Destroy VMs that are stopped, and everything on their root disks
///
/// Their snapshots go with them, their volumes are kept. VMs that have failed stay: look at them first.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Those alone that have this label; several must all be there
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Show what would be destroyed
    #[arg(long)]
    dry_run: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let vms: Vec<Vm> = client.vms().await?.into_iter().filter(|vm| is_meant(vm, &args.labels)).collect();
    if args.dry_run {
        session.terminal.list(&vms, &vm_view::table(&vms))?;
        return Ok(0);
    }
    if vms.is_empty() {
        session.terminal.note("No VM is stopped: nothing to destroy.");
        return Ok(0);
    }
    let names: Vec<Name> = vms.iter().map(|vm| vm.name.clone()).collect();
    let listed = names.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
    session.terminal.confirm(&format!("Destroy {} ({listed}) and everything on the root disks?", count(names.len(), "stopped VM")))?;
    let outcome = each(session, &names, async |name: Name| {
        // Time has passed since the question: who started it meanwhile wants it.
        if !is_meant(&client.vm(&name).await?.vm, &args.labels) {
            session.terminal.note(format!("{name} is not stopped any more: kept"));
            return Ok(());
        }
        let operation = settle(session, &client, client.destroy(&name).await?).await?;
        session.terminal.done(
            &operation,
            name.as_str(),
            &format!("{name}: destroy{}", if operation.status.is_final() { "ed" } else { "" }),
        )?;
        Ok::<(), Failure>(())
    })
    .await;
    sandbox::publish(session, &client).await;
    outcome
}

fn is_meant(vm: &Vm, labels: &[(String, String)]) -> bool {
    vm.state == VmState::Stopped && labels.iter().all(|(key, value)| vm.labels.get(key) == Some(value))
}
