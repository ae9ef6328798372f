//! How a byte stream to the agent is opened.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use form_types::{PublicKey, SecretKey};
use quinn::{ConnectionError, Endpoint, TransportConfig, VarInt};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UdpSocket, UnixStream},
    sync::Mutex,
};

use super::{ClientError, Timeouts};
use crate::{
    ALPN, ApiError, DEFAULT_PORT, ErrorCode,
    tls::{self, SeenKey},
};

pub(super) trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

#[derive(Debug)]
pub(super) enum Transport {
    Quic(Box<Quic>),
    Unix(PathBuf),
}

impl Transport {
    pub(super) fn target(&self) -> String {
        match self {
            Self::Quic(quic) => quic.address.clone(),
            Self::Unix(path) => path.display().to_string(),
        }
    }

    /// A fresh stream for one exchange.
    pub(super) async fn open(&self, timeouts: &Timeouts) -> Result<Box<dyn Bytes>, ClientError> {
        match self {
            Self::Unix(path) => Ok(Box::new(unix(path, timeouts.bound(timeouts.connect)).await?)),
            Self::Quic(quic) => quic.open(timeouts).await,
        }
    }

    /// Forgets a connection that has failed.
    pub(super) async fn reset(&self) {
        if let Self::Quic(quic) = self {
            *quic.link.lock().await = None;
        }
    }

    pub(super) async fn close(&self) {
        let Self::Quic(quic) = self else { return };
        let Some(link) = quic.link.lock().await.take() else { return };
        link.connection.close(VarInt::from_u32(0), b"");
        let _ = tokio::time::timeout(Duration::from_millis(200), link.endpoint.wait_idle()).await;
    }
}

async fn unix(path: &Path, limit: Duration) -> Result<UnixStream, ClientError> {
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let error = match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        // The backlog is full: a burst of clients, over in a moment.
        if error.kind() == io::ErrorKind::WouldBlock && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        let target = path.display().to_string();
        return Err(match error.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Api(
                ApiError::new(ErrorCode::NotAllowed, format!("you may not use {target}"))
                    .hint("run the command as root, or join the group: `sudo usermod -aG formation $USER` and log in again"),
            ),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::Unreachable {
                target,
                reason: "no agent runs there".to_owned(),
                hint: "start it with `systemctl start form-agent`, or look why it stopped with `journalctl -u form-agent`".to_owned(),
            },
            _ => ClientError::Unreachable {
                target,
                reason: error.to_string(),
                hint: "look at the agent's log: `journalctl -u form-agent`".to_owned(),
            },
        });
    }
}

#[derive(Debug)]
pub(super) struct Quic {
    address: String,
    pub(super) host_key: PublicKey,
    pub(super) identity: SecretKey,
    link: Mutex<Option<Link>>,
}

/// A connection with the endpoint that drives it.
#[derive(Clone, Debug)]
struct Link {
    endpoint: Endpoint,
    connection: quinn::Connection,
}

impl Quic {
    pub(super) fn new(address: &str, host_key: PublicKey, identity: &SecretKey) -> Self {
        Self { address: address.to_owned(), host_key, identity: identity.clone(), link: Mutex::new(None) }
    }

    async fn open(&self, timeouts: &Timeouts) -> Result<Box<dyn Bytes>, ClientError> {
        let connection = {
            // Held while connecting: calls at once share one handshake.
            let mut link = self.link.lock().await;
            match link.as_ref().filter(|link| link.connection.close_reason().is_none()) {
                Some(link) => link.connection.clone(),
                None => link.insert(self.connect(timeouts.bound(timeouts.connect)).await?).connection.clone(),
            }
        };
        match tokio::time::timeout(timeouts.bound(timeouts.connect), connection.open_bi()).await {
            Ok(Ok((send, receive))) => Ok(Box::new(tokio::io::join(receive, send))),
            Ok(Err(error)) => Err(self.refusal(&error, &SeenKey::default())),
            Err(_) => Err(ClientError::TimedOut { target: self.address.clone(), seconds: timeouts.connect.as_secs() }),
        }
    }

    async fn connect(&self, limit: Duration) -> Result<Link, ClientError> {
        let mut last = self.unreachable("the name has no address", "check the address with `form host ls`");
        for address in self.resolve().await? {
            let (crypto, seen) =
                tls::client(&self.identity, self.host_key, ALPN).map_err(|error| ClientError::local("TLS cannot be set up", error))?;
            let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let endpoint = Endpoint::client(SocketAddr::new(any, 0)).map_err(|error| ClientError::local("no UDP socket", error))?;
            let mut config = quinn::ClientConfig::new(Arc::new(crypto));
            config.transport_config(Arc::new(transport()));
            // The name is sent to nobody who checks it: the key is what is checked.
            let connecting =
                endpoint.connect_with(config, address, "formation").map_err(|error| ClientError::local("no connection", error))?;
            let outcome = tokio::select! {
                outcome = tokio::time::timeout(limit, connecting) => outcome,
                refused = port_is_closed(address) => {
                    last = self.unreachable(&refused.to_string(), HINT_DOWN);
                    continue;
                }
            };
            last = match outcome {
                Ok(Ok(connection)) => return Ok(Link { endpoint, connection }),
                Ok(Err(error)) => self.refusal(&error, &seen),
                Err(_) => self.unreachable(&format!("no answer within {} s", limit.as_secs()), HINT_DOWN),
            };
        }
        Err(last)
    }

    async fn resolve(&self) -> Result<Vec<SocketAddr>, ClientError> {
        let with_port = if has_port(&self.address) {
            self.address.clone()
        } else if self.address.parse::<Ipv6Addr>().is_ok() {
            format!("[{}]:{DEFAULT_PORT}", self.address)
        } else {
            format!("{}:{DEFAULT_PORT}", self.address)
        };
        match tokio::net::lookup_host(with_port).await {
            Ok(addresses) => Ok(addresses.collect()),
            Err(error) => Err(self.unreachable(&format!("its address is not known ({error})"), "check the spelling, or use an IP address")),
        }
    }

    fn unreachable(&self, reason: &str, hint: &str) -> ClientError {
        ClientError::Unreachable { target: self.address.clone(), reason: reason.to_owned(), hint: hint.to_owned() }
    }

    fn refusal(&self, error: &ConnectionError, seen: &SeenKey) -> ClientError {
        if let Some(found) = seen.take() {
            return ClientError::HostKeyChanged { address: self.address.clone(), expected: self.host_key, found };
        }
        match error {
            ConnectionError::ConnectionClosed(close) if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED => {
                self.unreachable("it has too many connections", "try again in a moment")
            }
            ConnectionError::TimedOut => self.unreachable("no answer", HINT_DOWN),
            ConnectionError::VersionMismatch | ConnectionError::TransportError(_) | ConnectionError::ConnectionClosed(_) => {
                ClientError::Protocol { target: self.address.clone(), what: error.to_string() }
            }
            _ => self.unreachable(&error.to_string(), HINT_DOWN),
        }
    }
}

const HINT_DOWN: &str = "is form-agent running there (`systemctl status form-agent`), and does the firewall let its UDP port through?";

fn has_port(address: &str) -> bool {
    address.parse::<SocketAddr>().is_ok()
        || address.rsplit_once(':').is_some_and(|(host, port)| !host.contains(':') && port.parse::<u16>().is_ok())
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport.max_concurrent_bidi_streams(VarInt::from_u32(0));
    transport.max_concurrent_uni_streams(VarInt::from_u32(0));
    transport.max_idle_timeout(Duration::from_secs(30).try_into().ok());
    transport.keep_alive_interval(Some(Duration::from_secs(8)));
    transport
}

/// Returns when the host says that nobody listens on the port (ICMP), which QUIC itself does not look at; otherwise never. One byte is no
/// QUIC packet: an agent drops it.
async fn port_is_closed(address: SocketAddr) -> io::Error {
    let probe = async {
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
        socket.connect(address).await?;
        socket.send(&[0]).await?;
        socket.recv(&mut [0]).await
    };
    match probe.await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => error,
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_port_or_not() {
        for with in ["10.0.0.1:1", "[::1]:7846", "host.example:99"] {
            assert!(has_port(with), "{with}");
        }
        for without in ["10.0.0.1", "::1", "fe80::1:2", "host.example", "host:"] {
            assert!(!has_port(without), "{without}");
        }
    }
}
