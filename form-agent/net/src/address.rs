//! Addresses: pure arithmetic, the same on every host of a cluster.

use std::{
    collections::BTreeSet,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use form_types::{ClusterId, VmId};

/// The gateway of every VM, on every host: link-local, so it never clashes with an address that someone routes.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);
/// As [`GATEWAY_V4`].
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The host's end of every tap, on every host: a VM that moves keeps its neighbour entry.
pub const GATEWAY_MAC: Mac = Mac([0x02, 0x66, 0x6f, 0x72, 0x6d, 0x01]);

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of a VM's only interface: unicast, locally administered, from the VM's id. It has to be unique on its tap
    /// only, where the other end is [`GATEWAY_MAC`].
    pub fn of(vm: &VmId) -> Self {
        let [a, b, c, d, e, ..] = *vm.as_bytes();
        Self([0x52, a, b, c, d, e])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddressError {
    #[error("`{0}` is not an IPv4 range: write it as 10.77.0.0/16, with a prefix from 8 to 30 and no bits behind it")]
    Range(String),
    #[error("every address of {0} is taken: destroy a VM, or give the cluster a larger range")]
    Exhausted(Ipv4Range),
}

/// An IPv4 range that VMs get their addresses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Range {
    base: u32,
    prefix: u8,
}

impl Ipv4Range {
    /// # Errors
    /// When the prefix is not from 8 to 30, or bits are set behind it.
    pub fn new(base: Ipv4Addr, prefix: u8) -> Result<Self, AddressError> {
        let range = Self { base: base.into(), prefix };
        if !(8..=30).contains(&prefix) || range.base & !range.mask() != 0 {
            return Err(AddressError::Range(format!("{base}/{prefix}")));
        }
        Ok(range)
    }

    /// The range of a cluster whose owner chose none: one of the 128 from 10.64.0.0/16 to 10.191.0.0/16. All hosts of a cluster
    /// agree on it, and two clusters that share a machine seldom do.
    pub fn for_cluster(cluster: &ClusterId) -> Self {
        let second = 64 + (cluster.as_bytes()[0] & 0x7f);
        Self { base: Ipv4Addr::new(10, second, 0, 0).into(), prefix: 16 }
    }

    const fn mask(self) -> u32 {
        u32::MAX << (32 - self.prefix as u32)
    }

    pub const fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask() == self.base
    }

    pub const fn base(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base)
    }

    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// An address that is not in `taken`: where the VM's id points, or the next free one behind it. So a VM that is made again
    /// tends to find its old address, and one that was just freed is not given to the next comer at once. The first and the
    /// last address of the range are never given.
    ///
    /// # Errors
    /// When every address is taken.
    pub fn assign(self, vm: &VmId, taken: &BTreeSet<Ipv4Addr>) -> Result<Ipv4Addr, AddressError> {
        let usable = !self.mask() - 1;
        let [.., a, b, c, d] = *vm.as_bytes();
        let start = u32::from_be_bytes([a, b, c, d]) % usable;
        (0..usable)
            .map(|step| Ipv4Addr::from_bits(self.base + 1 + (start + step) % usable))
            .find(|address| !taken.contains(address))
            .ok_or(AddressError::Exhausted(self))
    }
}

impl fmt::Display for Ipv4Range {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.base(), self.prefix)
    }
}

impl FromStr for Ipv4Range {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let fault = || AddressError::Range(text.chars().take(40).collect());
        let (base, prefix) = text.split_once('/').ok_or_else(fault)?;
        Self::new(base.parse().map_err(|_| fault())?, prefix.parse().map_err(|_| fault())?).map_err(|_| fault())
    }
}

/// The /64 of a cluster: a unique local prefix (RFC 4193) whose 40 bits of global id and 16 bits of subnet come from the
/// cluster's id, which is random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6Prefix([u8; 8]);

impl Ipv6Prefix {
    pub fn for_cluster(cluster: &ClusterId) -> Self {
        let mut prefix = [0xfd; 8];
        prefix[1..].copy_from_slice(&cluster.as_bytes()[..7]);
        Self(prefix)
    }

    /// The VM's address: the prefix and the first half of its id.
    pub fn address(self, vm: &VmId) -> Ipv6Addr {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.0);
        bytes[8..].copy_from_slice(&vm.as_bytes()[..8]);
        Ipv6Addr::from(bytes)
    }

    pub fn base(self) -> Ipv6Addr {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.0);
        Ipv6Addr::from(bytes)
    }
}

impl fmt::Display for Ipv6Prefix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/64", self.base())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges() {
        let range: Ipv4Range = "10.77.0.0/16".parse().unwrap();
        assert_eq!((range.to_string().as_str(), range.contains([10, 77, 255, 1].into())), ("10.77.0.0/16", true));
        assert!(!range.contains([10, 78, 0, 1].into()));
        for bad in ["", "10.77.0.0", "10.77.0.1/16", "10.0.0.0/31", "10.0.0.0/7", "10.0.0.0/x", "x/16"] {
            assert!(bad.parse::<Ipv4Range>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_full_range_says_so() {
        let range: Ipv4Range = "10.77.0.0/30".parse().unwrap();
        let vm = VmId::from_bytes([9; 16]);
        let mut taken = BTreeSet::new();
        for _ in 0..2 {
            assert!(taken.insert(range.assign(&vm, &taken).unwrap()));
        }
        assert_eq!(taken, BTreeSet::from([[10, 77, 0, 1].into(), [10, 77, 0, 2].into()]));
        assert_eq!(range.assign(&vm, &taken), Err(AddressError::Exhausted(range)));
    }

    #[test]
    fn macs_are_unicast_and_local() {
        let mac = Mac::of(&VmId::from_bytes([0xff; 16]));
        assert_eq!(mac.0[0] & 3, 2);
        assert_ne!(mac, GATEWAY_MAC);
        assert_eq!(mac.to_string(), "52:ff:ff:ff:ff:ff");
    }

    #[test]
    fn ipv6_is_made_of_cluster_and_vm() {
        let prefix = Ipv6Prefix::for_cluster(&ClusterId::from_bytes([0x11; 16]));
        assert_eq!(prefix.to_string(), "fd11:1111:1111:1111::/64");
        assert_eq!(prefix.address(&VmId::from_bytes([0x22; 16])).to_string(), "fd11:1111:1111:1111:2222:2222:2222:2222");
    }

    proptest! {
        #[test]
        fn an_assigned_address_is_free_and_usable(id: [u8; 16], prefix in 24u8..=30, taken: Vec<u8>) {
            let range = Ipv4Range::new([10, 77, 3, 0].into(), prefix).unwrap();
            let taken: BTreeSet<Ipv4Addr> = taken.into_iter().map(|last| [10, 77, 3, last].into()).collect();
            if let Ok(address) = range.assign(&VmId::from_bytes(id), &taken) {
                prop_assert!(range.contains(address) && !taken.contains(&address));
                prop_assert_ne!(address, range.base());
                let next = Ipv4Addr::from_bits(address.to_bits() + 1);
                prop_assert!(range.contains(next), "the last address of the range is not given");
            }
        }
    }
}
