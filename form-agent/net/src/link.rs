//! Interfaces, addresses and routes over rtnetlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags},
        link::LinkAttribute,
        route::{RouteProtocol, RouteScope},
    },
};

use crate::{
    address::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6},
    attachment::Attachment,
    error::{NetError, Result},
    sysctl,
};

/// Bytes of an Ethernet payload on a tap. VMs on one host and the world behind masquerade see the usual 1500.
pub const MTU: u16 = 1500;

/// Every interface of this host: index and name. A netlink socket gives one list at a time, and refuses a second one with `EBUSY`: the caller
/// sees to it that there is none.
pub async fn list(handle: &Handle) -> Result<Vec<(u32, String)>> {
    let mut links = handle.link().get().execute();
    let mut found = Vec::new();
    while let Some(link) = links.try_next().await.map_err(NetError::netlink("list the interfaces"))? {
        for attribute in link.attributes {
            if let LinkAttribute::IfName(name) = attribute {
                found.push((link.header.index, name));
            }
        }
    }
    Ok(found)
}

/// Asked by name, for which no list is made.
pub async fn index_of(handle: &Handle, name: &str) -> Result<Option<u32>> {
    match handle.link().get().match_name(name.to_owned()).execute().try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(error) if code_of(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(NetError::netlink(format!("look for the interface `{name}`"))(error)),
    }
}

/// Switches an interface on and changes nothing else of it. Gives its index.
pub async fn up(handle: &Handle, name: &str) -> Result<u32> {
    let vanished = || NetError::Tap { name: name.to_owned(), source: std::io::ErrorKind::NotFound.into() };
    let index = index_of(handle, name).await?.ok_or_else(vanished)?;
    let link = LinkUnspec::new_with_index(index).up().build();
    handle.link().set(link).execute().await.map_err(NetError::netlink(format!("switch on the interface `{name}`")))?;
    Ok(index)
}

/// Removes an interface; that it is gone already is fine.
pub async fn remove(handle: &Handle, name: &str) -> Result<()> {
    let Some(index) = index_of(handle, name).await? else { return Ok(()) };
    match handle.link().del(index).execute().await {
        Err(error) if code_of(&error) != Some(libc::ENODEV) => {
            Err(NetError::Netlink { action: format!("remove the interface `{name}`"), source: error })
        }
        _ => Ok(()),
    }
}

/// The error number in a kernel's refusal.
fn code_of(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
        _ => None,
    }
}

/// Sets up the host's end of a tap that exists: MAC, MTU, gateway addresses, up, and the routes to the VM.
pub async fn configure(handle: &Handle, name: &str, attachment: &Attachment) -> Result<()> {
    let fault = |what: &str| NetError::netlink(format!("{what} of the interface `{name}`"));
    let index = index_of(handle, name).await?.ok_or_else(|| NetError::Tap {
        name: name.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::NotFound, "it vanished while it was set up"),
    })?;
    prepare_switches(name)?;
    let link = LinkUnspec::new_with_index(index)
        .address(GATEWAY_MAC.0.to_vec())
        .mtu(u32::from(MTU))
        .alias(format!("form vm {} ({})", attachment.name, attachment.vm))
        .up()
        .build();
    handle.link().set(link).execute().await.map_err(fault("set the MAC address and MTU"))?;
    let mut gateway = handle.address().add(index, GATEWAY_V4.into(), 32);
    gateway.message_mut().header.scope = rtnetlink::packet_route::address::AddressScope::Link;
    gateway.execute().await.map_err(fault("set the IPv4 gateway address"))?;
    route4(handle, index, attachment.ipv4).await?;
    neighbour(handle, index, attachment.ipv4.into(), attachment).await?;
    if sysctl::has_ipv6() {
        let mut gateway = handle.address().add(index, GATEWAY_V6.into(), 64);
        // Nobody else can be on this link: do not wait a second for duplicate address detection.
        gateway.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        gateway.message_mut().attributes.push(AddressAttribute::Flags(rtnetlink::packet_route::address::AddressFlags::Nodad));
        gateway.execute().await.map_err(fault("set the IPv6 gateway address"))?;
        route6(handle, index, attachment.ipv6).await?;
        neighbour(handle, index, attachment.ipv6.into(), attachment).await?;
    }
    Ok(())
}

/// Per-interface switches; they have to be there before the interface comes up.
fn prepare_switches(name: &str) -> Result<()> {
    // Replies to 127.0.0.1 on the host arrive here after DNAT. The rules drop what a guest itself sends to 127/8.
    sysctl::set(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
    sysctl::set(&format!("ipv4/conf/{name}/accept_redirects"), "0")?;
    sysctl::set(&format!("ipv4/conf/{name}/send_redirects"), "0")?;
    if sysctl::has_ipv6() {
        // A guest must not configure the host: no router advertisements, no address but the gateway's.
        sysctl::set(&format!("ipv6/conf/{name}/accept_ra"), "0")?;
        sysctl::set(&format!("ipv6/conf/{name}/accept_redirects"), "0")?;
        sysctl::set(&format!("ipv6/conf/{name}/addr_gen_mode"), "1")?;
    }
    Ok(())
}

async fn route4(handle: &Handle, index: u32, address: Ipv4Addr) -> Result<()> {
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(address, 32)
        .output_interface(index)
        .pref_source(GATEWAY_V4)
        .scope(RouteScope::Link)
        .protocol(RouteProtocol::Static)
        .build();
    added(handle.route().add(route).execute().await, address.into())
}

async fn route6(handle: &Handle, index: u32, address: Ipv6Addr) -> Result<()> {
    let route = RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(address, 128)
        .output_interface(index)
        .protocol(RouteProtocol::Static)
        .build();
    added(handle.route().add(route).execute().await, address.into())
}

fn added(result: std::result::Result<(), rtnetlink::Error>, address: IpAddr) -> Result<()> {
    match result {
        Err(error) if code_of(&error) == Some(libc::EEXIST) => Err(NetError::AddressTaken { address }),
        Err(source) => Err(NetError::Netlink { action: format!("route {address} to its VM"), source }),
        Ok(()) => Ok(()),
    }
}

/// A fixed neighbour entry: the host never has to ask, so a guest cannot answer for anybody else.
async fn neighbour(handle: &Handle, index: u32, address: IpAddr, attachment: &Attachment) -> Result<()> {
    handle
        .neighbours()
        .add(index, address)
        .link_layer_address(&attachment.mac.0)
        .replace()
        .execute()
        .await
        .map_err(NetError::netlink(format!("set the neighbour entry of {address}")))
}
