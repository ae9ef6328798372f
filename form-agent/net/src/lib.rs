//! The network of one host: a tap for every VM, routes to it, the firewall, published ports, names.
//!
//! There is no bridge and no DHCP. A VM has a /32 and a /128 of its own, routed to its tap; its gateway has the same address
//! and MAC on every host, so that it can move. Everything made here bears the host's mark, and vanishes with
//! [`Network::teardown`].

pub mod address;
pub mod attachment;
pub mod dns;
mod error;
mod link;
mod network;
mod nft;
pub mod port;
pub mod rules;
mod sysctl;
pub mod tap;

pub use address::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, Ipv4Range, Ipv6Prefix, Mac};
pub use attachment::{Attachment, Mark, PublishedPort};
pub use dns::{NameEntry, Names};
pub use error::{NetError, Result};
pub use link::MTU;
pub use network::{Leftover, Network, NetworkConfig};
pub use port::{PortUser, port_in_use};
