//! Interfaces as a client sees them.

use form_api::{
    interface::{Interface, InterfaceState},
    vm::VmState,
};

use super::{name_of, number_of};
use crate::{agent::Agent, desired::DesiredVm, vm};

/// Those of one VM, the first one first.
pub fn of_vm(agent: &Agent, vm: &DesiredVm) -> Vec<Interface> {
    let observed = agent.fleet.observed(&vm.id);
    let has_process = observed
        .as_ref()
        .is_some_and(|observed| matches!(observed.state, VmState::Starting | VmState::Running | VmState::Paused | VmState::Stopping));
    let addresses = observed.and_then(|observed| observed.guest).map(|guest| guest.addresses).unwrap_or_default();
    let described = agent.attachments(vm).into_iter().map(|(number, attachment)| {
        let device = device(&addresses, &attachment.ipv4);
        let state = match (&device, has_process) {
            (Some(_), _) => InterfaceState::Attached,
            (None, true) => InterfaceState::Waiting,
            (None, false) => InterfaceState::Recorded,
        };
        Interface {
            name: name_of(number),
            vm: vm.name().clone(),
            network: vm::default_network(),
            mac: attachment.mac.to_string(),
            ipv4: attachment.ipv4,
            ipv6: attachment.ipv6,
            device,
            state,
        }
    });
    described.collect()
}

/// What the guest calls the interface with this address, among `NAME ADDRESS/PREFIX`.
pub fn device(addresses: &[String], ipv4: &std::net::Ipv4Addr) -> Option<String> {
    let wanted = format!("{ipv4}/32");
    addresses.iter().find_map(|entry| entry.split_once(' ').filter(|(_, address)| *address == wanted).map(|(name, _)| name.to_owned()))
}

/// The numbers of the interfaces that a VM process says it has.
pub fn numbers(networks: &[form_vmm::control::NetworkMetrics]) -> Vec<u8> {
    networks.iter().filter_map(|network| number_of(&network.id)).filter(|number| *number > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_its_whole_address() {
        let addresses = ["eth0 10.77.0.2/32", "ens5 10.77.0.21/32", "ens5 fd00::21/128"].map(str::to_owned);
        assert_eq!(device(&addresses, &[10, 77, 0, 21].into()).as_deref(), Some("ens5"));
        assert_eq!(device(&addresses, &[10, 77, 0, 1].into()), None);
        assert_eq!(device(&addresses, &[0, 77, 0, 2].into()), None);
    }
}
