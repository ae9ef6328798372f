//! Interfaces that come to a machine that runs, and leave it.

use form_guest::protocol::InterfaceReport;
use form_types::settings::Interface;

use super::{
    in_use,
    link::{IFF_UP, addresses, configure_one, find, flags_request, forget_addresses, names_by_index, parse_mac, present},
    rule,
    socket::Socket,
};
use crate::error::{Context, Error};

/// Waits for an interface and sets it up; one that was set up before gets these addresses instead of those that it has.
///
/// # Errors
/// [`Error::InterfaceMissing`]; those of the kernel.
pub fn add(interface: &Interface) -> Result<InterfaceReport, Error> {
    let socket = Socket::open(None).doing("open a netlink socket")?;
    let index = find(&interface.mac)?;
    socket.command("take it down", &flags_request(index, 0, IFF_UP, &[]))?;
    forget_addresses(&socket, index)?;
    configure_one(&socket, usize::from(interface.table.unwrap_or_default()), interface)?;
    report(interface)
}

/// By its hardware address: what it is called was up to others as well.
fn report(interface: &Interface) -> Result<InterfaceReport, Error> {
    let index = find(&interface.mac)?;
    let name = names_by_index().doing("list interfaces")?.remove(&index).unwrap_or_else(|| interface.name.clone());
    let addresses = addresses()?.remove(&name).unwrap_or_default();
    Ok(InterfaceReport { mac: interface.mac.clone(), name, addresses })
}

/// Takes an interface out of use, so that it can be taken away. One that is not there is nobody's any more.
///
/// # Errors
/// [`Error::InUse`] naming who uses it, unless with `force`; those of the kernel.
pub fn remove(mac: &str, table: Option<u8>, force: bool) -> Result<(), Error> {
    let socket = Socket::open(None).doing("open a netlink socket")?;
    let wanted = parse_mac(mac).ok_or_else(|| Error::BadMac { text: mac.to_owned() })?;
    let there = present().into_iter().find(|(address, _)| parse_mac(address) == Some(wanted));
    if let Some((_, index)) = there {
        let name = names_by_index().doing("list interfaces")?.remove(&index).unwrap_or_default();
        if !force {
            in_use::check(&name, index, &addresses()?.remove(&name).unwrap_or_default())?;
        }
        socket.command("take it down", &flags_request(index, 0, IFF_UP, &[]))?;
    }
    if let Some(table) = table {
        rule::forget(&socket, table);
    }
    Ok(())
}
