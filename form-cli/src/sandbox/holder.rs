//! Who has a port of this machine: sockets from `/proc/net` (proc_net_tcp in the kernel's documentation), processes by their descriptors.

use std::fs;

use form_types::spec::Protocol;

/// The name and number of a process that holds `port`, as far as this user may see it.
pub fn of(protocol: Protocol, port: u16) -> Option<String> {
    let tables = [format!("/proc/net/{}", protocol.as_str()), format!("/proc/net/{}6", protocol.as_str())];
    let text: String = tables.iter().filter_map(|table| fs::read_to_string(table).ok()).collect();
    let inodes = inodes(&text, protocol, port);
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let pid = numbers.find(|pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| {
            let inode = target.to_str().and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok());
            inode.is_some_and(|inode| inodes.contains(&inode))
        })
    })?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("{} (process {pid})", name.trim()))
}

/// Inodes of the sockets that receive what comes for `port`.
fn inodes(table: &str, protocol: Protocol, port: u16) -> Vec<u64> {
    const LISTENING: &str = "0A";
    let row = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let local = u16::from_str_radix(fields.get(1)?.rsplit_once(':')?.1, 16).ok()?;
        let receives = protocol == Protocol::Udp || *fields.get(3)? == LISTENING;
        (local == port && receives).then_some(fields.get(9)?.parse().ok()?)
    };
    table.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn this_process_is_found() {
        let (tcp, udp) = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let number = format!("process {}", std::process::id());
        assert!(of(Protocol::Tcp, tcp.local_addr().unwrap().port()).unwrap().contains(&number));
        assert!(of(Protocol::Udp, udp.local_addr().unwrap().port()).unwrap().contains(&number));
    }

    #[test]
    fn only_listening_sockets_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n\
            1: 0100007F:1F90 0100007F:9000 01 00000000:00000000 00:00000000 00000000     0        0 4712 1\n\
            2: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1\nrubbish\n";
        assert_eq!(inodes(table, Protocol::Tcp, 8080), [4711]);
        assert_eq!(inodes(table, Protocol::Tcp, 1), [0_u64; 0]);
    }
}
