use clap_complete::engine::ArgValueCompleter;
use form_api::interface::{Interface, InterfaceState};
use form_types::Name;

use crate::{args::vm_name, complete, failure::Outcome, operation::settle, session::Session};

/// Give a VM one more network interface, with addresses of its own: at once when it runs, else from its next start on
///
/// A VM that runs has it when its guest has set it up. A VM can have eight interfaces. Names mean the addresses of the first one, and
/// published ports lead there.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Name,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let before = client.vm(&args.vm).await?.interfaces;
    let operation = settle(session, &client, client.attach_interface(&args.vm).await?).await?;
    let vm = &args.vm;
    let now = if operation.status.is_final() { client.vm(vm).await?.interfaces } else { Vec::new() };
    let (name, text) = match now.into_iter().find(|interface| before.iter().all(|known| known.name != interface.name)) {
        Some(interface) => (interface.name.clone(), words(&interface)),
        None => (vm.to_string(), "an interface is on its way".to_owned()),
    };
    session.terminal.done(&operation, &name, &format!("{vm}: {text}"))?;
    Ok(0)
}

fn words(interface: &Interface) -> String {
    let Interface { name, mac, ipv4, ipv6, .. } = interface;
    let when = match (interface.state, &interface.device) {
        (InterfaceState::Attached, Some(device)) if device != name => format!(" (its guest calls it {device})"),
        (InterfaceState::Recorded, _) => " from its next start on".to_owned(),
        (InterfaceState::Attached, _) => String::new(),
        (InterfaceState::Waiting, _) => " when its guest answers".to_owned(),
    };
    format!("{name} attached{when}: {ipv4}, {ipv6}, {mac}")
}
