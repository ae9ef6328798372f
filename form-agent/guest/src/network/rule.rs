//! Rules that choose a routing table (linux/fib_rules.h, ip-rule(8)).

use std::net::IpAddr;

use super::{
    link::octets,
    message::{ACK, Builder, CREATE_OR_REPLACE, REQUEST},
    socket::Socket,
};
use crate::error::Error;

const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FR_ACT_TO_TBL: u8 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// Before that of the main table, which is 32766.
const PRIORITY: u32 = 1000;
/// Of one table: one an address, and what could be left of addresses that are gone.
const RULES_MAX: usize = 16;

/// What leaves from `source` goes by `table`.
///
/// # Errors
/// Those of the kernel.
pub fn add(socket: &Socket, source: IpAddr, table: u8) -> Result<(), Error> {
    socket.command(&format!("lead {source} to table {table}"), &request(source, table))
}

fn request(source: IpAddr, table: u8) -> Vec<u8> {
    let (family, bytes) = octets(source);
    let length = if source.is_ipv4() { 32 } else { 128 };
    start(RTM_NEWRULE, REQUEST | ACK | CREATE_OR_REPLACE, family, length, table).attribute(FRA_SRC, &bytes).finish()
}

/// Removes all rules that lead to `table`.
pub fn forget(socket: &Socket, table: u8) {
    for family in [IPV4, IPV6] {
        let request = start(RTM_DELRULE, REQUEST | ACK, family, 0, table).finish();
        // Each removes one; it fails when there is none left.
        for _ in 0..RULES_MAX {
            if socket.command("remove a rule", &request).is_err() {
                break;
            }
        }
    }
}

fn start(kind: u16, flags: u16, family: u8, source_length: u8, table: u8) -> Builder {
    // struct fib_rule_hdr: family, destination and source length, tos, table, two reserved bytes, action, flags
    let fixed = [family, 0, source_length, 0, table, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
    Builder::new(kind, flags, &fixed)
        .attribute(FRA_PRIORITY, &(PRIORITY + u32::from(table)).to_ne_bytes())
        .attribute(FRA_TABLE, &u32::from(table).to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::{
        super::message::{attributes, messages},
        *,
    };

    #[test]
    fn a_rule_names_source_and_table() {
        for (address, family, length) in [("192.0.2.7", IPV4, 32), ("fd00::7", IPV6, 128)] {
            let address: IpAddr = address.parse().expect("valid");
            let bytes = request(address, 101);
            let rule = &messages(&bytes)[0];
            assert_eq!((rule.kind, rule.payload[0], rule.payload[2], rule.payload[4]), (RTM_NEWRULE, family, length, 101));
            let found = attributes(rule.payload, 12);
            let value = |kind| found.iter().find(|(found, _)| *found == kind).map(|(_, value)| value.to_vec());
            assert_eq!(value(FRA_SRC), Some(octets(address).1));
            assert_eq!(value(FRA_TABLE), Some(101_u32.to_ne_bytes().to_vec()));
            assert_eq!(value(FRA_PRIORITY), Some(1101_u32.to_ne_bytes().to_vec()));
        }
    }
}
