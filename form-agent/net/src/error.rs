//! What can go wrong with the host's network.

use std::{io, net::Ipv4Addr};

use crate::address::AddressError;

pub type Result<T, E = NetError> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("cannot open /dev/net/tun: {0}. Load the kernel module `tun`, and run the agent as root")]
    Tun(#[source] io::Error),
    #[error("interface `{name}` exists already and something holds it: `form doctor --fix` removes what is left over")]
    TapTaken { name: String },
    #[error("cannot make the interface `{name}`: {source}")]
    Tap { name: String, source: io::Error },
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[source] io::Error),
    #[error("cannot {action}: {source}")]
    Netlink { action: String, source: rtnetlink::Error },
    #[error("{address} is already routed to another interface of this host: give the VM or the cluster another address range")]
    AddressTaken { address: std::net::IpAddr },
    #[error("cannot set {path} to {value}: {source}. The agent needs root and a writable /proc/sys")]
    Sysctl { path: String, value: String, source: io::Error },
    #[error("cannot run `nft`: {0}. Install the package nftables")]
    NoNft(#[source] io::Error),
    #[error("`nft` refused the rules of table {table}: {message}")]
    Nft { table: String, message: String },
    #[error("cannot read {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: String, source: io::Error },
    #[error("cannot listen for DNS on {address}: {source}")]
    DnsListen { address: Ipv4Addr, source: io::Error },
}

impl NetError {
    pub(crate) fn netlink(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let action = action.into();
        move |source| Self::Netlink { action, source }
    }
}
