//! The map from names to addresses, and what it answers: pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, PoisonError, RwLock},
};

use form_types::Name;

use crate::attachment::Attachment;

/// The zone that we are the authority for.
pub const ZONE: &str = "form.internal";

/// One VM, wherever in the cluster it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameEntry {
    pub name: Name,
    pub network: Name,
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
}

impl From<&Attachment> for NameEntry {
    fn from(attachment: &Attachment) -> Self {
        Self { name: attachment.name.clone(), network: attachment.network.clone(), ipv4: attachment.ipv4, ipv6: attachment.ipv6 }
    }
}

/// The names of now. Clones share one map.
#[derive(Clone, Debug, Default)]
pub struct Names(Arc<RwLock<Arc<NameMap>>>);

#[derive(Debug, Default)]
pub struct NameMap {
    /// By network, then by VM.
    networks: BTreeMap<String, BTreeMap<String, (Ipv4Addr, Ipv6Addr)>>,
    by_address: BTreeMap<IpAddr, (String, String)>,
    serial: u32,
}

/// What a name means, whatever record type is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    Vm {
        ipv4: Ipv4Addr,
        ipv6: Ipv6Addr,
    },
    /// The top of the zone: SOA and NS.
    Apex,
    /// `ns.form.internal`, this server.
    Server,
    /// `1.0.77.10.in-addr.arpa` and the like: the VM's name and network.
    Reverse {
        name: String,
        network: String,
    },
    /// It is there, but has no records (a network).
    Empty,
    /// In our zone, and not there.
    Missing,
    /// Somebody else's.
    Foreign,
}

impl Names {
    /// Makes these the names, and no others.
    pub fn set(&self, entries: impl IntoIterator<Item = NameEntry>) {
        let mut map = NameMap { serial: self.map().serial.wrapping_add(1), ..NameMap::default() };
        for NameEntry { name, network, ipv4, ipv6 } in entries {
            let (name, network) = (String::from(name), String::from(network));
            for address in [IpAddr::from(ipv4), ipv6.into()] {
                map.by_address.insert(address, (name.clone(), network.clone()));
            }
            map.networks.entry(network).or_default().insert(name, (ipv4, ipv6));
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
    }

    pub fn map(&self) -> Arc<NameMap> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl NameMap {
    pub const fn serial(&self) -> u32 {
        self.serial
    }

    /// What the name of these labels (lower case, without the root) means to somebody at `asker`: a bare VM name is looked for
    /// in the asker's own network.
    pub fn meaning(&self, labels: &[&str], asker: IpAddr) -> Meaning {
        match labels {
            ["form", "internal"] => Meaning::Apex,
            ["ns", "form", "internal"] => Meaning::Server,
            [network, "form", "internal"] if self.networks.contains_key(*network) => Meaning::Empty,
            [name, network, "form", "internal"] => self.vm(network, name).unwrap_or(Meaning::Missing),
            [.., "form", "internal"] => Meaning::Missing,
            [name] => {
                let network = self.by_address.get(&asker).map(|(_, network)| network.as_str());
                network.and_then(|network| self.vm(network, name)).unwrap_or(Meaning::Foreign)
            }
            _ => self.reverse(labels),
        }
    }

    fn vm(&self, network: &str, name: &str) -> Option<Meaning> {
        let (ipv4, ipv6) = *self.networks.get(network)?.get(name)?;
        Some(Meaning::Vm { ipv4, ipv6 })
    }

    fn reverse(&self, labels: &[&str]) -> Meaning {
        let vm = parse_reverse(labels).and_then(|address| self.by_address.get(&address));
        vm.map_or(Meaning::Foreign, |(name, network)| Meaning::Reverse { name: name.clone(), network: network.clone() })
    }

    /// The networks there are.
    pub fn networks(&self) -> BTreeSet<&str> {
        self.networks.keys().map(String::as_str).collect()
    }
}

/// The address in a reverse name (RFC 1035 section 3.5, RFC 3596 section 2.5).
fn parse_reverse(labels: &[&str]) -> Option<IpAddr> {
    match labels {
        [d, c, b, a, "in-addr", "arpa"] => {
            let mut bytes = [0; 4];
            for (byte, label) in bytes.iter_mut().zip([a, b, c, d]) {
                *byte = label.parse().ok()?;
            }
            Some(bytes.into())
        }
        [nibbles @ .., "ip6", "arpa"] if nibbles.len() == 32 => {
            let mut bits = 0u128;
            for label in nibbles.iter().rev() {
                let digit = if label.len() == 1 { u128::from_str_radix(label, 16).ok()? } else { return None };
                bits = (bits << 4) | digit;
            }
            Some(Ipv6Addr::from_bits(bits).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, network: &str, last: u8) -> NameEntry {
        NameEntry {
            name: name.parse().unwrap(),
            network: network.parse().unwrap(),
            ipv4: [10, 77, 0, last].into(),
            ipv6: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into()),
        }
    }

    fn meaning(names: &Names, text: &str, asker: [u8; 4]) -> Meaning {
        let labels: Vec<&str> = text.split('.').collect();
        names.map().meaning(&labels, asker.into())
    }

    #[test]
    fn names_mean_what_they_should() {
        let names = Names::default();
        names.set([entry("web", "default", 1), entry("db", "default", 2), entry("web", "other", 3)]);
        let asker = [10, 77, 0, 2];
        let vm = |last: u8| Meaning::Vm { ipv4: [10, 77, 0, last].into(), ipv6: entry("a", "b", last).ipv6 };
        assert_eq!(meaning(&names, "web.default.form.internal", asker), vm(1));
        assert_eq!(meaning(&names, "web.other.form.internal", asker), vm(3));
        assert_eq!(meaning(&names, "web", asker), vm(1));
        assert_eq!(meaning(&names, "web", [10, 77, 0, 3]), vm(3));
        assert_eq!(meaning(&names, "db", [10, 77, 0, 3]), Meaning::Foreign);
        assert_eq!(meaning(&names, "web", [192, 0, 2, 1]), Meaning::Foreign);
        assert_eq!(meaning(&names, "default.form.internal", asker), Meaning::Empty);
        assert_eq!(meaning(&names, "none.form.internal", asker), Meaning::Missing);
        assert_eq!(meaning(&names, "a.web.default.form.internal", asker), Meaning::Missing);
        assert_eq!(meaning(&names, "form.internal", asker), Meaning::Apex);
        assert_eq!(meaning(&names, "internal", asker), Meaning::Foreign);
        assert_eq!(meaning(&names, "www.example.org", asker), Meaning::Foreign);
        let reverse = Meaning::Reverse { name: "web".to_owned(), network: "default".to_owned() };
        assert_eq!(meaning(&names, "1.0.77.10.in-addr.arpa", asker), reverse);
        assert_eq!(meaning(&names, "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa", asker), reverse);
        assert_eq!(meaning(&names, "9.0.77.10.in-addr.arpa", asker), Meaning::Foreign);
        assert_eq!(meaning(&names, "x.0.77.10.in-addr.arpa", asker), Meaning::Foreign);
        let before = names.map().serial();
        names.set([]);
        assert_eq!(meaning(&names, "web.default.form.internal", asker), Meaning::Missing);
        assert_ne!(names.map().serial(), before);
    }
}
