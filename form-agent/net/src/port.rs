//! Who listens on a port of this host.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use form_types::spec::Protocol;

use crate::error::{NetError, Result};

/// A process of the host that has a port open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortUser {
    pub address: IpAddr,
    /// Its id and name, when it can be found (it may live in another namespace).
    pub process: Option<(u32, String)>,
}

impl std::fmt::Display for PortUser {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.process {
            Some((pid, name)) => write!(formatter, "{name} (process {pid}), on {}", self.address),
            None => write!(formatter, "a process on {}", self.address),
        }
    }
}

/// Who of this host listens on `port`; publishing it would take the port away from them. Ports that VMs publish are not seen
/// here, for nobody listens on those.
///
/// # Errors
/// When /proc cannot be read.
pub fn port_in_use(protocol: Protocol, port: u16) -> Result<Option<PortUser>> {
    for table in [protocol.as_str().to_owned(), format!("{}6", protocol.as_str())] {
        // Of the thread, so that a thread in a namespace of its own sees that namespace.
        let path = format!("/proc/thread-self/net/{table}");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(source) => return Err(NetError::Read { path, source }),
        };
        if let Some((address, inode)) = find_listener(&text, protocol, port) {
            return Ok(Some(PortUser { address, process: holder_of(inode) }));
        }
    }
    Ok(None)
}

/// The local address and socket inode of the first socket in `/proc/net/{tcp,udp}{,6}` that has `port` open for anyone.
fn find_listener(table: &str, protocol: Protocol, port: u16) -> Option<(IpAddr, u64)> {
    // TCP_LISTEN; an unconnected UDP socket is in TCP_CLOSE (include/net/tcp_states.h).
    let wanted_state = match protocol {
        Protocol::Tcp => "0A",
        Protocol::Udp => "07",
    };
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (address, local_port) = fields.nth(1)?.split_once(':')?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?.parse().ok()?;
        let matches = state == wanted_state && u16::from_str_radix(local_port, 16).ok()? == port;
        if matches { Some((parse_address(address)?, inode)) } else { None }
    })
}

/// 8 or 32 hexadecimal digits: words of four bytes in the byte order of the machine.
fn parse_address(text: &str) -> Option<IpAddr> {
    let mut bytes = Vec::with_capacity(16);
    for start in (0..text.len()).step_by(8) {
        let word = u32::from_str_radix(text.get(start..start + 8)?, 16).ok()?;
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

/// The process that has this socket open. Processes come and go while we look: whatever cannot be read is passed over.
fn holder_of(inode: u64) -> Option<(u32, String)> {
    let wanted = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        let holds = descriptors
            .flatten()
            .any(|descriptor| fs::read_link(descriptor.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str()));
        if holds {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some((pid, name.trim().to_owned()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    const TCP: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31337 1 0 100 0 0 10 0
   1: 0100007F:1F91 0100007F:A000 01 00000000:00000000 00:00000000 00000000     0        0 99 1 0 100 0 0 10 0
   bad line
";

    #[test]
    fn listeners_are_found_and_connections_are_not() {
        assert_eq!(find_listener(TCP, Protocol::Tcp, 8080), Some(([127, 0, 0, 1].into(), 31337)));
        assert_eq!(find_listener(TCP, Protocol::Tcp, 8081), None);
        assert_eq!(find_listener("", Protocol::Tcp, 1), None);
        assert_eq!(parse_address("00000000000000000000000001000000"), Some(Ipv6Addr::LOCALHOST.into()));
        assert_eq!(parse_address("0000000é"), None);
    }

    #[test]
    fn our_own_sockets_are_seen_with_their_process() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let user = port_in_use(Protocol::Tcp, tcp.local_addr().unwrap().port()).unwrap().unwrap();
        assert_eq!((user.address, user.process.unwrap().0), ([127, 0, 0, 1].into(), std::process::id()));
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let user = port_in_use(Protocol::Udp, udp.local_addr().unwrap().port()).unwrap().unwrap();
        assert_eq!(user.address, Ipv6Addr::LOCALHOST);
    }

    #[test]
    fn a_closed_port_is_free() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert_eq!(port_in_use(Protocol::Tcp, port).unwrap(), None);
    }
}
