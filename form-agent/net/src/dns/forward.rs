//! Questions that are not ours go, as they are, to the name servers of the host.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hickory_server::proto::op::{LowerQuery, Message, MessageType};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

use crate::address::GATEWAY_V4;

const RESOLV_CONF: &str = "/etc/resolv.conf";
const TIMEOUT: Duration = Duration::from_secs(2);
const ROUNDS: usize = 2;
/// Questions under way at once: a VM that floods us must not use up the agent's descriptors.
const CONCURRENT: usize = 128;
/// The header of a message (RFC 1035 section 4.1.1).
const HEADER: usize = 12;

pub struct Forwarder {
    /// Empty: those of the host, read afresh.
    upstreams: Vec<SocketAddr>,
    running: Semaphore,
}

impl Forwarder {
    pub const fn new(upstreams: Vec<SocketAddr>) -> Self {
        Self { upstreams, running: Semaphore::const_new(CONCURRENT) }
    }

    /// The first sound reply of an upstream to the question in `packet`.
    pub async fn ask(&self, packet: &[u8], query: &LowerQuery) -> Option<Message> {
        let _permit = self.running.try_acquire().ok()?;
        let upstreams = if self.upstreams.is_empty() { host_resolvers() } else { self.upstreams.clone() };
        for upstream in upstreams.iter().cycle().take(upstreams.len() * ROUNDS) {
            match timeout(TIMEOUT, exchange(*upstream, packet, query)).await {
                Ok(Ok(reply)) => return Some(reply),
                Ok(Err(error)) => tracing::debug!(%upstream, %error, "a name server does not answer"),
                Err(_) => tracing::debug!(%upstream, "a name server does not answer in time"),
            }
        }
        None
    }
}

/// Asks over UDP, and over TCP when the reply does not fit. Each question gets a port and an id of its own, so that a reply
/// cannot be guessed.
async fn exchange(upstream: SocketAddr, packet: &[u8], query: &LowerQuery) -> io::Result<Message> {
    let mut packet = packet.to_vec();
    if packet.len() < HEADER {
        return Err(io::ErrorKind::InvalidData.into());
    }
    rustix::rand::getrandom(&mut packet[..2], rustix::rand::GetRandomFlags::empty())?;
    let any: IpAddr = if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(&packet).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // A reply to another question is somebody's guess: wait for the right one.
        if let Some(reply) = parse(&buffer[..length], &packet, query) {
            if reply.metadata.truncation {
                return over_tcp(upstream, &packet, query).await;
            }
            return Ok(reply);
        }
    }
}

async fn over_tcp(upstream: SocketAddr, packet: &[u8], query: &LowerQuery) -> io::Result<Message> {
    let length = u16::try_from(packet.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut stream = TcpStream::connect(upstream).await?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(packet);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; length.into()];
    stream.read_exact(&mut reply).await?;
    parse(&reply, packet, query).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The reply, when it is one to this packet.
pub(super) fn parse(reply: &[u8], packet: &[u8], query: &LowerQuery) -> Option<Message> {
    if reply.len() < HEADER || reply[..2] != packet[..2] {
        return None;
    }
    let message = Message::from_vec(reply).ok()?;
    // Some servers leave the question out of a refusal.
    let same = match message.queries.as_slice() {
        [] => message.answers.is_empty(),
        [asked] => LowerQuery::from(asked.clone()) == *query,
        _ => false,
    };
    (same && message.metadata.message_type == MessageType::Response).then_some(message)
}

/// The name servers in the host's resolv.conf(5), ourselves left out.
fn host_resolvers() -> Vec<SocketAddr> {
    parse_resolv_conf(&fs::read_to_string(RESOLV_CONF).unwrap_or_default())
}

fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| line.split_ascii_whitespace().collect::<Vec<_>>().get(..2).map(|words| (words[0], words[1].to_owned())))
        .filter(|(keyword, _)| *keyword == "nameserver")
        .filter_map(|(_, address)| resolver_address(&address))
        .filter(|address| address.ip() != IpAddr::from(GATEWAY_V4))
        .take(3)
        .collect()
}

/// `192.0.2.1`, `2001:db8::1`, `fe80::1%eth0` (an index works too).
fn resolver_address(text: &str) -> Option<SocketAddr> {
    let Some((address, zone)) = text.split_once('%') else {
        return text.parse::<IpAddr>().ok().map(|address| SocketAddr::from((address, 53)));
    };
    let index = zone.parse().ok().or_else(|| {
        let index = fs::read_to_string(format!("/sys/class/net/{zone}/ifindex")).ok()?;
        index.trim().parse().ok()
    })?;
    Some(std::net::SocketAddrV6::new(address.parse().ok()?, 53, 0, index).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf() {
        let text = "# nameserver 192.0.2.9\nnameserver 192.0.2.1\nsearch example.org\nnameserver 2001:db8::1 \nnameserver\n\
                    nameserver x\nnameserver 169.254.77.1\nnameserver fe80::2%7\nnameserver 192.0.2.4\n";
        let found: Vec<String> = parse_resolv_conf(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "[fe80::2%7]:53"]);
    }
}
