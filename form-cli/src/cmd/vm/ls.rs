use crate::{failure::Outcome, session::Session, vm_view};

/// List VMs and what they are doing now
#[derive(Debug, clap::Args)]
pub struct Args {}

pub async fn run(_: &Args, session: &Session) -> Outcome {
    let vms = session.client()?.vms().await?;
    session.terminal.list(&vms, &vm_view::table(&vms))?;
    if vms.is_empty() && !session.terminal.is_machine_readable() {
        session.terminal.note("No VMs. `form deploy` runs one.");
    }
    Ok(0)
}
