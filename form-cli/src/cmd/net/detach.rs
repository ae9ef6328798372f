use clap_complete::engine::ArgValueCompleter;
use form_api::interface::DetachInterfaceRequest;
use form_types::Name;

use crate::{args::vm_name, complete, failure::Outcome, operation::settle, session::Session};

/// Take a network interface from a VM
///
/// The guest of a VM that runs takes it out of use before. While something there uses it, it stays, and you are told who uses it. A VM
/// keeps its first interface.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Name,
    /// The interface, as `form net ls` names it: eth1
    #[arg(value_parser = interface)]
    interface: String,
    /// Take it away from what uses it, and from a guest that does not answer: programs get errors
    #[arg(long)]
    force: bool,
}

/// A word that is safe in a path; the host knows which there are.
fn interface(text: &str) -> Result<String, String> {
    let fits = (1..=15).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if fits { Ok(text.to_owned()) } else { Err("an interface is called like eth1".to_owned()) }
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let Args { vm, interface, force } = args;
    let operation = client.detach_interface(&vm, &interface, &DetachInterfaceRequest { force }).await?;
    let operation = settle(session, &client, operation).await?;
    session.terminal.done(&operation, vm.as_str(), &format!("{vm}: {interface} detached"))?;
    Ok(0)
}
