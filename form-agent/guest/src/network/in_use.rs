//! Who uses a network interface.
//!
//! Formats: proc(5) (`/proc/net/tcp` and its like, `/proc/net/route`), packet(7), and the kernel's `net/packet/af_packet.c` for
//! `/proc/net/packet`.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::error::Error;

/// So many users are named.
const NAMED: usize = 5;

/// Tables of sockets by protocol.
const TABLES: [(&str, &str); 6] = [("tcp", "tcp"), ("tcp6", "tcp"), ("udp", "udp"), ("udp6", "udp"), ("raw", "raw"), ("raw6", "raw")];

/// # Errors
/// [`Error::InUse`] naming who uses the interface: sockets at one of its addresses (`ADDRESS/PREFIX`), programs that listen to all packets,
/// the default route.
pub fn check(name: &str, index: u32, addresses: &[String]) -> Result<(), Error> {
    let own: Vec<IpAddr> = addresses.iter().filter_map(|address| address.split('/').next()?.parse().ok()).collect();
    let read = |table: &str| fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
    let mut sockets: Vec<(u64, String)> = TABLES.iter().flat_map(|(table, protocol)| sockets(&read(table), protocol, &own)).collect();
    sockets.extend(packet_sockets(&read("packet"), index));
    let mut users = if sockets.is_empty() { Vec::new() } else { named(&sockets, &owners()) };
    if has_default_route(&read("route"), name) {
        users.push("the default route".to_owned());
    }
    if users.is_empty() { Ok(()) } else { Err(in_use(name, &users)) }
}

fn in_use(name: &str, users: &[String]) -> Error {
    let mut named = users.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if users.len() > NAMED {
        named.push_str(&format!(" and {} more", users.len() - NAMED));
    }
    Error::InUse { device: name.to_owned(), users: named }
}

/// Inode and words of every socket at one of the addresses. Those that belong to nobody any more have no inode.
fn sockets(table: &str, protocol: &str, own: &[IpAddr]) -> Vec<(u64, String)> {
    let at = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (address, port) = fields.get(1)?.split_once(':')?;
        let (address, port) = (ip(address)?, u16::from_str_radix(port, 16).ok()?);
        let inode: u64 = fields.get(9)?.parse().ok()?;
        (inode != 0 && own.contains(&address)).then(|| (inode, format!("{protocol} {}", std::net::SocketAddr::new(address, port))))
    };
    table.lines().skip(1).filter_map(at).collect()
}

/// Words of four bytes in hexadecimal, each in the machine's order; an IPv4 address mapped into IPv6 is that IPv4 address.
fn ip(text: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(text.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (part, at) in bytes.chunks_exact_mut(4).zip([0, 8, 16, 24]) {
                part.copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

/// Those that are bound to the interface alone.
fn packet_sockets(table: &str, index: u32) -> Vec<(u64, String)> {
    let bound = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let inode = fields.get(8)?.parse().ok()?;
        (fields.get(4)?.parse() == Ok(index)).then(|| (inode, "all packets".to_owned()))
    };
    table.lines().skip(1).filter_map(bound).collect()
}

/// Of the main table.
fn has_default_route(table: &str, name: &str) -> bool {
    table.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.first() == Some(&name) && fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")
    })
}

/// The process that has each socket: the first of several.
fn owners() -> BTreeMap<u64, String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    let mut owners = BTreeMap::new();
    for pid in pids {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        for inode in open.filter_map(|fd| socket_inode(fs::read_link(fd.path()).ok()?.to_str()?)) {
            owners.entry(inode).or_insert_with(|| {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                format!("{} (process {pid})", name.trim())
            });
        }
    }
    owners
}

/// `socket:[4711]`
fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn named(sockets: &[(u64, String)], owners: &BTreeMap<u64, String>) -> Vec<String> {
    let mut users: Vec<String> = sockets
        .iter()
        .map(|(inode, what)| match owners.get(inode) {
            Some(owner) => format!("{owner} at {what}"),
            None => format!("the kernel at {what}"),
        })
        .collect();
    users.dedup();
    users
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn sockets_at_an_address_are_found() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0700000A:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0
   2: 0700000A:1F90 0800000A:D431 06 00000000:00000000 03:00000A2E 00000000     0        0 0 3 0
   3: broken";
        let own = ["10.0.0.7".parse().expect("valid")];
        assert_eq!(sockets(table, "tcp", &own), [(4711, "tcp 10.0.0.7:8080".to_owned())]);
        assert_eq!(sockets(table, "tcp", &["10.0.0.8".parse().expect("valid")]), []);
        let mapped = "sl\n 0: 0000000000000000FFFF00000700000A:0050 0:0 01 0:0 0:0 0 0 0 9 1";
        assert_eq!(sockets(mapped, "tcp", &own), [(9, "tcp 10.0.0.7:80".to_owned())]);
        let six = "sl\n 0: 000000FD000000000000000007000000:0035 0:0 07 0:0 0:0 0 0 0 10 1";
        assert_eq!(sockets(six, "udp", &["fd00::7".parse().expect("valid")]), [(10, "udp [fd00::7]:53".to_owned())]);
        for bad in ["", "00", "zz00000A", "é000000"] {
            assert_eq!(ip(bad), None, "{bad}");
        }
    }

    #[test]
    fn who_listens_to_all_packets_and_the_default_route_count() {
        let packets = "sk RefCnt Type Proto Iface R Rmem User Inode\nffff 3 3 0003 4 1 0 0 77\nffff 3 3 0003 0 1 0 0 78\n";
        assert_eq!(packet_sockets(packets, 4), [(77, "all packets".to_owned())]);
        assert_eq!(packet_sockets(packets, 5), []);
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
eth0\t00000000\t014DFEA9\t0003\t0\t0\t0\t00000000\t0\neth1\t0000000A\t0\t1\t0\t0\t0\t000000FF\t0\n";
        assert!(has_default_route(routes, "eth0") && !has_default_route(routes, "eth1") && !has_default_route("", "eth0"));
    }

    #[test]
    fn a_program_that_listens_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let text = check("lo", 1, &["127.0.0.1/8".to_owned()]).expect_err("in use").to_string();
        let users = named(
            &sockets(&fs::read_to_string("/proc/net/tcp").expect("readable"), "tcp", &["127.0.0.1".parse().expect("valid")]),
            &owners(),
        );
        let own = format!("(process {}) at tcp 127.0.0.1:{port}", std::process::id());
        assert!(users.iter().any(|user| user.ends_with(&own)), "{users:?}");
        assert!(text.starts_with("lo is in use: "), "{text}");
        assert!(check("lo", 1, &["127.7.7.7/8".to_owned()]).is_ok());
        let many: Vec<String> = (1..=7).map(|number| number.to_string()).collect();
        assert_eq!(in_use("eth1", &many).to_string(), "eth1 is in use: 1, 2, 3, 4, 5 and 2 more");
    }
}
