//! The power button, as the kernel announces it over generic netlink (`drivers/acpi/event.c`: family `acpi_event`, group
//! `acpi_mc_group`). This needs the module `button`, and neither a daemon nor an input device.

use super::{
    message::{Builder, REQUEST, attributes, messages, u16_at, u32_at},
    socket::Socket,
};
use crate::error::{Context, Error};

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
const ACPI_GENL_ATTR_EVENT: u16 = 1;
const ACK: u16 = 4;

/// Calls `pressed` at each press of the power button, for ever.
///
/// # Errors
/// When the kernel has no such events.
pub fn power_button_events(mut pressed: impl FnMut()) -> Result<(), Error> {
    let socket = Socket::open(Some(rustix::net::netlink::GENERIC)).doing("open a generic netlink socket")?;
    let mut found = None;
    let request = Builder::new(GENL_ID_CTRL, REQUEST | ACK, &[CTRL_CMD_GETFAMILY, 1, 0, 0])
        .attribute(CTRL_ATTR_FAMILY_NAME, b"acpi_event\0")
        .finish();
    socket.ask("find ACPI events", &request, |message| found = found.or(family(message.payload)))?;
    let (family, group) = found.ok_or(Error::NetlinkAnswer { what: "find ACPI events" })?;
    crate::sys::netlink_add_membership(socket.fd(), group).doing("listen to ACPI events")?;
    loop {
        let datagram = socket.receive().doing("listen to ACPI events")?;
        for message in messages(&datagram) {
            if message.kind == family && is_power_button(message.payload) {
                pressed();
            }
        }
    }
}

/// The family's number and the number of its event group.
fn family(payload: &[u8]) -> Option<(u16, u32)> {
    let top = attributes(payload, 4);
    let id = top.iter().find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID).and_then(|(_, value)| u16_at(value, 0))?;
    let (_, groups) = top.iter().find(|(kind, _)| *kind == CTRL_ATTR_MCAST_GROUPS)?;
    attributes(groups, 0).iter().find_map(|(_, group)| {
        let group = attributes(group, 0);
        let named = group.iter().any(|(kind, value)| *kind == CTRL_ATTR_MCAST_GRP_NAME && value.starts_with(b"acpi_mc_group\0"));
        let number = group.iter().find(|(kind, _)| *kind == CTRL_ATTR_MCAST_GRP_ID).and_then(|(_, value)| u32_at(value, 0));
        number.filter(|_| named).map(|number| (id, number))
    })
}

/// struct acpi_genl_event: 20 bytes of device class, 15 of bus id, …
fn is_power_button(payload: &[u8]) -> bool {
    attributes(payload, 4).iter().any(|(kind, event)| *kind == ACPI_GENL_ATTR_EVENT && event.starts_with(b"button/power"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_found_in_the_family() {
        let attribute = |kind: u16, value: &[u8]| {
            let mut bytes = Builder::new(0, 0, &[]).attribute(kind, value).finish();
            bytes.drain(..16);
            bytes
        };
        let group = [attribute(2, &5_u32.to_ne_bytes()), attribute(1, b"acpi_mc_group\0")].concat();
        let payload =
            [vec![1, 2, 0, 0], attribute(2, b"acpi_event\0"), attribute(1, &24_u16.to_ne_bytes()), attribute(7, &attribute(1, &group))]
                .concat();
        assert_eq!(family(&payload), Some((24, 5)));
        assert_eq!(family(&payload[..20]), None);
        assert!(is_power_button(&[vec![1, 1, 0, 0], attribute(1, b"button/power\0\0\0\0\0\0\0\0PNP0C0C")].concat()));
        assert!(!is_power_button(&[vec![1, 1, 0, 0], attribute(1, b"ac_adapter\0")].concat()));
    }
}
