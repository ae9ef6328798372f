use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{args::vm_name, complete, failure::Outcome, session::Session, ui::Table};

/// List the network interfaces of VMs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only those of this VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Option<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let interfaces = match &args.vm {
        Some(vm) => client.vm(vm).await?.interfaces,
        None => client.interfaces().await?,
    };
    let mut table = Table::new(&["NAME", "VM", "NETWORK", "IPV4", "DEVICE", "STATE"], &["IPV6", "MAC"]);
    for interface in &interfaces {
        table.row([
            interface.name.clone(),
            interface.vm.to_string(),
            interface.network.to_string(),
            interface.ipv4.to_string(),
            interface.device.clone().unwrap_or_default(),
            interface.state.as_str().to_owned(),
            interface.ipv6.to_string(),
            interface.mac.clone(),
        ]);
    }
    session.terminal.list(&interfaces, &table)?;
    Ok(0)
}
