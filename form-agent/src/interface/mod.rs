//! Network interfaces of VMs beside the first one. The state holds, by number, the IPv4 address of each; everything else follows from the
//! VM's id and the number, so that an interface that goes and comes again is the same one.

pub mod describe;
pub mod live;
pub mod operate;
pub mod rules;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use form_state::{Record, Scalar, View};
use form_types::{Digest, VmId, settings::INTERFACES_MAX};

/// Further interfaces have these numbers.
pub const NUMBERS: std::ops::Range<u8> = 1..INTERFACES_MAX;

/// The field of a VM's record that holds the address of an interface; empty when there is none.
fn field(number: u8) -> String {
    format!("interface_{number}_ipv4")
}

/// What a record says of a VM's further interfaces.
pub fn read(record: &Record) -> BTreeMap<u8, Ipv4Addr> {
    let address = |number: u8| record.get(&field(number)).and_then(Scalar::as_text)?.parse().ok();
    NUMBERS.filter_map(|number| Some((number, address(number)?))).collect()
}

/// `eth1`: for the VM process, the guest and people.
pub fn name_of(number: u8) -> String {
    format!("eth{number}")
}

/// The number behind such a name, 0 for the first interface.
pub fn number_of(name: &str) -> Option<u8> {
    let number: u8 = name.strip_prefix("eth")?.parse().ok()?;
    (number < INTERFACES_MAX && name_of(number) == name).then_some(number)
}

/// What the hardware address, the IPv6 address and the tap of an interface are made of, as those of the first one are of the VM's id.
pub fn id_of(vm: &VmId, number: u8) -> VmId {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&Digest::of(format!("interface {number} of {vm}").as_bytes()).as_bytes()[..16]);
    VmId::from_bytes(bytes)
}

/// Every interface that a VM can have: the ids of their taps.
pub fn all_ids(vm: &VmId) -> Vec<VmId> {
    std::iter::once(*vm).chain(NUMBERS.map(|number| id_of(vm, number))).collect()
}

/// The routing table of the guest for what leaves from the addresses of an interface. Those of Linux itself are 0 and 253 to 255.
pub const fn table_of(number: u8) -> u8 {
    100 + number
}

/// The IPv4 addresses that VMs have.
pub fn taken(view: &View) -> BTreeSet<Ipv4Addr> {
    let vms = crate::desired::vms(view);
    vms.values().flat_map(|vm| vm.interfaces.values().copied().chain([vm.ipv4])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_its_number_and_nothing_else_is_one() {
        assert_eq!((0..INTERFACES_MAX).map(|number| number_of(&name_of(number))).collect::<Option<Vec<_>>>(), Some((0..8).collect()));
        for bad in ["", "eth", "eth8", "eth01", "eth+1", "eth1 ", "ens1", "ETH1"] {
            assert_eq!(number_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_interface_has_an_id_of_its_own() {
        let ids: BTreeSet<VmId> = (0..=255_u8).flat_map(|last| all_ids(&VmId::from_bytes([last; 16]))).collect();
        assert_eq!(ids.len(), 256 * usize::from(INTERFACES_MAX));
        // Recorded nowhere: it must never change.
        assert_eq!(id_of(&VmId::from_bytes([7; 16]), 1), id_of(&VmId::from_bytes([7; 16]), 1));
    }
}
