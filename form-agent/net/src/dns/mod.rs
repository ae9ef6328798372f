//! Names for VMs: `web.default.form.internal`, or `web` inside its own network. Everything else is forwarded.
//!
//! One server an agent, on the gateway's address and a port of its own choosing; the firewall leads port 53 there. So several
//! agents share a machine, and a name server that the host runs itself is not in the way.

mod answer;
mod forward;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod names;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};

use hickory_server::Server;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

pub use self::names::{NameEntry, Names, ZONE};
use self::{answer::Answerer, forward::Forwarder};
use crate::{
    address::GATEWAY_V4,
    error::{NetError, Result},
};

/// A TCP client that sends nothing for this long is cut off.
const TCP_IDLE: Duration = Duration::from_secs(10);
const TCP_RESPONSES: usize = 64;
const PORT_TRIES: usize = 16;

/// The running server; it stops when it is dropped.
pub struct DnsServer {
    server: Server<Answerer>,
    port: u16,
}

impl DnsServer {
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.server.shutdown_token().cancel();
    }
}

/// Starts a server on the gateway's address. That no tap has it yet does not matter.
pub async fn serve(names: Names, upstreams: Vec<SocketAddr>) -> Result<DnsServer> {
    serve_on(GATEWAY_V4, names, upstreams).await
}

async fn serve_on(address: Ipv4Addr, names: Names, upstreams: Vec<SocketAddr>) -> Result<DnsServer> {
    let fault = |source| NetError::DnsListen { address, source };
    let (udp, tcp, port) = sockets(address).map_err(fault)?;
    let mut server = Server::new(Answerer::new(names, Forwarder::new(upstreams)));
    server.register_socket(tokio::net::UdpSocket::from_std(udp).map_err(fault)?);
    server.register_listener(tokio::net::TcpListener::from_std(tcp).map_err(fault)?, TCP_IDLE, TCP_RESPONSES);
    Ok(DnsServer { server, port })
}

/// A UDP and a TCP socket on one port that the kernel chooses.
fn sockets(address: Ipv4Addr) -> std::io::Result<(UdpSocket, TcpListener, u16)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    for _ in 0..PORT_TRIES {
        let udp = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        sockopt::set_ip_freebind(&udp, true)?;
        bind(&udp, &SocketAddr::from((address, 0)))?;
        let udp = UdpSocket::from(udp);
        let port = udp.local_addr()?.port();
        let tcp = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        sockopt::set_ip_freebind(&tcp, true)?;
        match bind(&tcp, &SocketAddr::from((address, port))).and_then(|()| listen(&tcp, 128)) {
            Ok(()) => return Ok((udp, TcpListener::from(tcp), port)),
            Err(rustix::io::Errno::ADDRINUSE) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(std::io::ErrorKind::AddrInUse.into())
}

#[cfg(test)]
mod tests;
