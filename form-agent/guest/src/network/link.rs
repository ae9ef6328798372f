//! Interfaces, addresses and routes.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use form_types::settings::Interface;

use super::{
    message::{ACK, Builder, CREATE_OR_REPLACE, DUMP, Message, REQUEST, attributes, u32_at},
    rule,
    socket::Socket,
};
use crate::{
    error::{Context, Error},
    report::BootReport,
};

/// How long an interface may take to be there, from the start of the machine or of its coming on.
const INTERFACE_LIMIT: Duration = Duration::from_secs(30);

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
pub(super) const IFF_UP: u32 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// # Errors
/// Those of the kernel.
pub fn loopback_up() -> Result<(), Error> {
    let socket = Socket::open(None).doing("open a netlink socket")?;
    socket.command("set lo up", &link_request(1, IFF_UP, &[]))
}

/// Sets up all interfaces. What fails for one is a fatal fault and does not keep the others back.
pub fn configure(interfaces: &[Interface], report: &mut BootReport) {
    if interfaces.is_empty() {
        return;
    }
    let Some(socket) = report.fatal_on("network", Socket::open(None).doing("open a netlink socket")) else { return };
    for (number, interface) in interfaces.iter().enumerate() {
        if let Err(error) = configure_one(&socket, number, interface) {
            report.fatal("network", format_args!("{}: {error}", interface.name));
        }
    }
}

/// Gives interfaces that have their names already other hardware addresses, other addresses and the routes to them. Connections over the
/// old ones are gone.
///
/// # Errors
/// Those of the kernel; an interface that is not there.
pub fn readdress(interfaces: &[Interface]) -> Result<(), Error> {
    let socket = Socket::open(None).doing("open a netlink socket")?;
    for (number, interface) in interfaces.iter().enumerate() {
        let mac = parse_mac(&interface.mac).ok_or_else(|| Error::BadMac { text: interface.mac.clone() })?;
        let names = names_by_index().doing("list interfaces")?;
        let named = names.iter().find(|(_, name)| **name == interface.name).map(|(index, _)| *index);
        let index = named.ok_or_else(|| Error::InterfaceMissing { mac: interface.mac.clone(), present: interface.name.clone() })?;
        // Takes the addresses of IPv6 and all routes along.
        socket.command("take it down", &flags_request(index, 0, IFF_UP, &[]))?;
        forget_addresses(&socket, index)?;
        socket.command(&format!("set its address {}", interface.mac), &link_request(index, 0, &[(IFLA_ADDRESS, &mac)]))?;
        configure_one(&socket, number, interface)?;
    }
    Ok(())
}

/// Takes all addresses from an interface.
pub(super) fn forget_addresses(socket: &Socket, index: u32) -> Result<(), Error> {
    for (address, prefix) in addresses_of(socket, index)? {
        let what = format!("remove address {address}/{prefix}");
        match socket.command(&what, &address_message(RTM_DELADDR, REQUEST | ACK, index, address, prefix)) {
            Err(Error::Netlink { source, .. }) if source.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            other => other?,
        }
    }
    Ok(())
}

/// The addresses of one interface.
fn addresses_of(socket: &Socket, index: u32) -> Result<Vec<(IpAddr, u8)>, Error> {
    let mut found = Vec::new();
    socket.ask("list addresses", &Builder::new(RTM_GETADDR, REQUEST | DUMP, &[0; 8]).finish(), |message| {
        found.extend(read_address(message))
    })?;
    let of_it = found.into_iter().filter(|(other, ..)| *other == index);
    Ok(of_it.map(|(_, address, prefix)| (address, prefix)).collect())
}

pub(super) fn configure_one(socket: &Socket, number: usize, interface: &Interface) -> Result<(), Error> {
    let index = find(&interface.mac)?;
    // By way of another name even when it has the right one: udev renames what it does not know to be named by someone.
    for name in [format!("form-tmp{number}"), interface.name.clone()] {
        let value = [name.as_bytes(), &[0]].concat();
        socket.command(&format!("name it {name}"), &link_request(index, 0, &[(IFLA_IFNAME, &value)]))?;
    }
    ipv6_by_hand(&interface.name);
    let mtu = interface.mtu.to_ne_bytes();
    socket.command("set its MTU and bring it up", &link_request(index, IFF_UP, &[(IFLA_MTU, &mtu)]))?;
    if let Some(table) = interface.table {
        rule::forget(socket, table);
    }
    if let Some(route) = &interface.ipv4 {
        set_address(socket, index, route.address.into(), route.prefix, route.gateway.map(Ipv4Addr::into), interface.table)?;
    }
    if let Some(route) = &interface.ipv6 {
        set_address(socket, index, route.address.into(), route.prefix, route.gateway.map(Ipv6Addr::into), interface.table)?;
    }
    Ok(())
}

fn set_address(socket: &Socket, index: u32, address: IpAddr, prefix: u8, gateway: Option<IpAddr>, table: Option<u8>) -> Result<(), Error> {
    socket.command(&format!("set address {address}/{prefix}"), &address_request(index, address, prefix))?;
    let Some(gateway) = gateway else { return Ok(()) };
    let to = |to, by| route_request(index, to, by, gateway, table.unwrap_or(RT_TABLE_MAIN));
    // The prefix need not cover the gateway: it is on the link all the same.
    socket.command(&format!("add route to gateway {gateway}"), &to(Some(gateway), None))?;
    socket.command(&format!("add default route by {gateway}"), &to(None, Some(gateway)))?;
    // The gateway is the same on every interface: what leaves from this address has to leave here, where alone the host takes it.
    table.map_or(Ok(()), |table| rule::add(socket, address, table))
}

/// Neither addresses nor routes from router advertisements, and no waiting for duplicate detection: the host gives addresses.
fn ipv6_by_hand(name: &str) {
    for (file, value) in [("accept_ra", "0"), ("autoconf", "0"), ("dad_transmits", "0"), ("accept_dad", "0")] {
        // There is nothing to turn off in a kernel without IPv6.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{file}"), value);
    }
}

/// Waits for the interface with this address and gives its index.
pub(super) fn find(mac: &str) -> Result<u32, Error> {
    let wanted = parse_mac(mac).ok_or_else(|| Error::BadMac { text: mac.to_owned() })?;
    let start = Instant::now();
    loop {
        let present = present();
        if let Some((_, index)) = present.iter().find(|(address, _)| parse_mac(address) == Some(wanted)) {
            return Ok(*index);
        }
        if start.elapsed() > INTERFACE_LIMIT {
            let present = present.into_iter().map(|(address, _)| address).collect::<Vec<_>>().join(", ");
            return Err(Error::InterfaceMissing { mac: mac.to_owned(), present });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Hardware address and index of every interface but the loopback one.
pub(super) fn present() -> Vec<(String, u32)> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else { return Vec::new() };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name() != "lo")
        .filter_map(|entry| {
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).ok();
            Some((read("address")?.trim().to_owned(), read("ifindex")?.trim().parse().ok()?))
        })
        .collect()
}

pub(super) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2)).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

pub(super) fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    }
}

fn link_request(index: u32, up: u32, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    flags_request(index, up, up, attributes)
}

pub(super) fn flags_request(index: u32, flags: u32, mask: u32, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    // struct ifinfomsg: family, padding, type, index, flags, mask of flags to change
    let mut fixed = vec![0; 4];
    fixed.extend_from_slice(&index.to_ne_bytes());
    fixed.extend_from_slice(&flags.to_ne_bytes());
    fixed.extend_from_slice(&mask.to_ne_bytes());
    let builder = Builder::new(RTM_NEWLINK, REQUEST | ACK, &fixed);
    attributes.iter().fold(builder, |builder, (kind, value)| builder.attribute(*kind, value)).finish()
}

fn address_request(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    address_message(RTM_NEWADDR, REQUEST | ACK | CREATE_OR_REPLACE, index, address, prefix)
}

fn address_message(kind: u16, request: u16, index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    let (family, bytes) = octets(address);
    let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
    // struct ifaddrmsg: family, prefix length, flags, scope, index
    let mut fixed = vec![family, prefix, flags, RT_SCOPE_UNIVERSE];
    fixed.extend_from_slice(&index.to_ne_bytes());
    Builder::new(kind, request, &fixed).attribute(IFA_LOCAL, &bytes).attribute(IFA_ADDRESS, &bytes).finish()
}

/// A route to `to` (`None`: everything) by `gateway` (`None`: it is on the link). `family_of` says which IP it is about.
fn route_request(index: u32, to: Option<IpAddr>, gateway: Option<IpAddr>, family_of: IpAddr, table: u8) -> Vec<u8> {
    let (family, _) = octets(family_of);
    let length = match to {
        None => 0,
        Some(IpAddr::V4(_)) => 32,
        Some(IpAddr::V6(_)) => 128,
    };
    let scope = if gateway.is_none() && family == AF_INET { RT_SCOPE_LINK } else { RT_SCOPE_UNIVERSE };
    let flags = if gateway.is_some() { RTNH_F_ONLINK } else { 0 };
    // struct rtmsg: family, destination and source length, tos, table, protocol, scope, type, flags
    let mut fixed = vec![family, length, 0, 0, table, RTPROT_BOOT, scope, RTN_UNICAST];
    fixed.extend_from_slice(&flags.to_ne_bytes());
    let mut builder = Builder::new(RTM_NEWROUTE, REQUEST | ACK | CREATE_OR_REPLACE, &fixed).attribute(RTA_OIF, &index.to_ne_bytes());
    if let Some(to) = to {
        builder = builder.attribute(RTA_DST, &octets(to).1);
    }
    if let Some(gateway) = gateway {
        builder = builder.attribute(RTA_GATEWAY, &octets(gateway).1);
    }
    builder.finish()
}

/// The addresses that the kernel really has, by interface: `192.0.2.1/32`.
///
/// # Errors
/// Those of the kernel.
pub fn addresses() -> Result<BTreeMap<String, Vec<String>>, Error> {
    let socket = Socket::open(None).doing("open a netlink socket")?;
    let mut found = Vec::new();
    socket.ask("list addresses", &Builder::new(RTM_GETADDR, REQUEST | DUMP, &[0; 8]).finish(), |message| {
        found.extend(read_address(message))
    })?;
    let names = names_by_index().unwrap_or_default();
    let mut by_name: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (index, address, prefix) in found {
        if let Some(name) = names.get(&index).filter(|name| *name != "lo") {
            by_name.entry(name.clone()).or_default().push(format!("{address}/{prefix}"));
        }
    }
    Ok(by_name)
}

fn read_address(message: &Message<'_>) -> Option<(u32, IpAddr, u8)> {
    if message.kind != RTM_NEWADDR {
        return None;
    }
    let prefix = *message.payload.get(1)?;
    let index = u32_at(message.payload, 4)?;
    let found = attributes(message.payload, 8);
    // On a point-to-point link IFA_ADDRESS is the peer's.
    let bytes = [IFA_LOCAL, IFA_ADDRESS].iter().find_map(|kind| found.iter().find(|(found, _)| found == kind)).map(|(_, bytes)| *bytes)?;
    let address = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some((index, address, prefix))
}

pub(super) fn names_by_index() -> io::Result<BTreeMap<u32, String>> {
    let mut names = BTreeMap::new();
    for entry in fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        let index = fs::read_to_string(entry.path().join("ifindex")).ok().and_then(|text| text.trim().parse().ok());
        if let (Some(index), Ok(name)) = (index, entry.file_name().into_string()) {
            names.insert(index, name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::{super::message::messages, *};

    #[test]
    fn hardware_addresses() {
        assert_eq!(parse_mac("52:54:00:AB:cd:01"), Some([0x52, 0x54, 0, 0xab, 0xcd, 1]));
        for bad in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:1", "52:54:00:ab:cd:01:02", "+2:54:00:ab:cd:0g"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_address_reads_back_from_its_request() {
        for (address, prefix) in [("192.0.2.7", 32), ("fd00::7", 64)] {
            let address: IpAddr = address.parse().expect("valid");
            let bytes = address_request(3, address, prefix);
            let found = messages(&bytes);
            assert_eq!(read_address(&found[0]), Some((3, address, prefix)));
        }
        let bytes = address_request(3, "fd00::7".parse().expect("valid"), 128);
        assert_eq!(messages(&bytes)[0].payload[2], IFA_F_NODAD);
    }

    #[test]
    fn routes() {
        let gateway: IpAddr = "169.254.1.1".parse().expect("valid");
        let bytes = route_request(2, Some(gateway), None, gateway, RT_TABLE_MAIN);
        let on_link = &messages(&bytes)[0];
        assert_eq!((on_link.payload[0], on_link.payload[1], on_link.payload[6]), (AF_INET, 32, RT_SCOPE_LINK));
        let bytes = route_request(2, None, Some(gateway), gateway, 101);
        let default = &messages(&bytes)[0];
        assert_eq!((on_link.payload[4], default.payload[4]), (RT_TABLE_MAIN, 101));
        assert_eq!((default.payload[1], default.payload[6], u32_at(default.payload, 8)), (0, RT_SCOPE_UNIVERSE, Some(RTNH_F_ONLINK)));
        assert_eq!(attributes(default.payload, 12), [(RTA_OIF, &2_u32.to_ne_bytes()[..]), (RTA_GATEWAY, &[169, 254, 1, 1][..])]);
    }
}
