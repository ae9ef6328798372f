//! What of a VM the network knows.

use std::net::{Ipv4Addr, Ipv6Addr};

use form_types::{Name, VmId, spec::Protocol};

use crate::address::Mac;

/// One interface of a VM on one network of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its tap has its name from this: the VM's id for its first interface, an id of their own for the further ones.
    pub vm: VmId,
    /// The VM's name, which DNS answers for.
    pub name: Name,
    /// The segment: VMs of one network reach each other, and nobody else's.
    pub network: Name,
    pub mac: Mac,
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
    pub ports: Vec<PublishedPort>,
}

/// A port of the VM that is reached on every address of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublishedPort {
    pub protocol: Protocol,
    pub host: u16,
    pub guest: u16,
}

/// Six hexadecimal digits of the host's id: they are in the name of every interface and table that this agent makes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark(String);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a mark is six of 0-9 and a-f")]
pub struct MarkError;

impl Mark {
    /// # Errors
    /// When the text is not six lower-case hexadecimal digits.
    pub fn new(text: &str) -> Result<Self, MarkError> {
        let fits = text.len() == 6 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if fits { Ok(Self(text.to_owned())) } else { Err(MarkError) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `form0a1b2c`: what the name of every tap begins with.
    pub fn tap_prefix(&self) -> String {
        format!("form{}", self.0)
    }

    /// The name of the VM's tap: the prefix and five digits of base 36 from the VM's id, 15 characters together, which is the
    /// longest name that Linux allows an interface.
    pub fn tap(&self, vm: &VmId) -> String {
        const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
        let [.., a, b, c, d, e, f, g, h] = *vm.as_bytes();
        let mut number = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        let mut name = self.tap_prefix();
        for _ in 0..5 {
            name.push(char::from(DIGITS[(number % 36) as usize]));
            number /= 36;
        }
        name
    }

    /// Whether an interface bears this mark.
    pub fn owns_interface(&self, name: &str) -> bool {
        name.len() == 15 && name.starts_with(&self.tap_prefix())
    }

    /// `form_0a1b2c`: the name of the nftables table.
    pub fn table(&self) -> String {
        format!("form_{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks() {
        assert!(Mark::new("0a1b2c").is_ok());
        for bad in ["", "0A1B2C", "0a1b2", "0a1b2c3", "0a1b2\"", "éaaaa"] {
            assert_eq!(Mark::new(bad), Err(MarkError), "{bad}");
        }
    }

    #[test]
    fn tap_names_fit_and_differ() {
        let mark = Mark::new("0a1b2c").unwrap();
        let names: std::collections::BTreeSet<String> = (0..=255).map(|last| mark.tap(&VmId::from_bytes([last; 16]))).collect();
        assert_eq!(names.len(), 256);
        assert!(names.iter().all(|name| name.len() == 15 && mark.owns_interface(name)));
        assert!(!Mark::new("0a1b2d").unwrap().owns_interface(names.first().unwrap()));
        assert!(!mark.owns_interface("form0a1b2c"));
    }
}
