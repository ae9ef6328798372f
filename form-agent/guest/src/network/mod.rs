//! The network: interfaces found by their hardware address, addresses and routes by rtnetlink(7), names by files.

mod generic;
mod in_use;
mod link;
mod message;
pub mod names;
mod plug;
mod rule;
mod socket;

pub use generic::power_button_events;
pub use link::{addresses, configure, loopback_up, readdress};
pub use plug::{add, remove};
