use crate::{failure::Outcome, sandbox, session::Session, vm_view};

/// List VMs and what they are doing now
#[derive(Debug, clap::Args)]
pub struct Args {}

pub async fn run(_: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let vms = client.vms().await?;
    session.terminal.list(&vms, &vm_view::table(&vms))?;
    if vms.is_empty() && !session.terminal.is_machine_readable() {
        session.terminal.note("No VMs. `form deploy` runs one.");
    }
    // Mends what a taken port or a restart of the sandbox left undone.
    sandbox::publish(session, &client).await;
    Ok(0)
}
