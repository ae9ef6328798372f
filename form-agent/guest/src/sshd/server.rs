//! Listening, and keeping those who never say who they are from keeping others out.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use russh::{
    MethodKind, MethodSet, SshId,
    server::{Config, run_stream},
};
use rustix::{fd::OwnedFd, net::Shutdown};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use super::{connection::Connection, host_key, keeper::PORT, rules::Rules};
use crate::{process::lock, report::say};

/// Connections that have not shown who they are. One more ends the oldest of the address that has the most of them.
const MAX_STRANGERS: usize = 32;
/// How long showing it may take.
const LOGIN_LIMIT: Duration = Duration::from_secs(60);
/// Keys and passwords that a client may try: programs that hold keys try them all.
const MAX_TRIES: usize = 10;
/// How often a client that says nothing is asked whether it is still there; gone after the third time.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// What a client may send before we have to say that it may send more.
const WINDOW: u32 = 512 << 10;

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on port {port}: {source}")]
    Listen { port: u16, source: io::Error },
    #[error(transparent)]
    HostKey(#[from] host_key::HostKeyError),
    #[error("cannot start: {0}")]
    Start(io::Error),
}

impl ServerError {
    pub fn is_taken_port(&self) -> bool {
        matches!(self, Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
    }
}

/// What all connections share.
pub struct Server {
    /// Where etc/passwd and its like are: `/`, but in tests.
    pub root: PathBuf,
    pub rules: Rules,
    /// Whose turn it is to have a password compared.
    pub hashing: Semaphore,
    strangers: Arc<Strangers>,
    config: Arc<Config>,
}

/// Serves on port 22 of every address.
///
/// # Errors
/// When there is no key, or another program has the port.
pub fn run(root: &Path, rules: Rules) -> Result<(), ServerError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServerError::Start)?;
    runtime.block_on(async {
        let listener = bind(PORT).await.map_err(|source| ServerError::Listen { port: PORT, source })?;
        let server = Server::new(root, rules)?;
        server.listen(listener).await;
        Ok(())
    })
}

/// IPv6 sockets take IPv4 too; a kernel without IPv6 has only the other kind.
async fn bind(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await,
        result => result,
    }
}

impl Server {
    /// # Errors
    /// When there is no host key.
    pub fn new(root: &Path, rules: Rules) -> Result<Arc<Self>, ServerError> {
        let key = host_key::load_or_make(&root.join("etc/ssh"))?;
        let mut methods = MethodSet::empty();
        methods.push(MethodKind::PublicKey);
        if rules.passwords {
            methods.push(MethodKind::Password);
        }
        let config = Config {
            server_id: SshId::Standard(concat!("SSH-2.0-Formation_", env!("CARGO_PKG_VERSION")).into()),
            methods,
            // What must take its time does so itself.
            auth_rejection_time: Duration::ZERO,
            auth_rejection_time_initial: Some(Duration::ZERO),
            keys: vec![key],
            window_size: WINDOW,
            max_auth_attempts: MAX_TRIES,
            inactivity_timeout: None,
            keepalive_interval: Some(KEEP_ALIVE),
            keepalive_max: 3,
            ..Config::default()
        };
        Ok(Arc::new(Self { root: root.to_owned(), rules, hashing: Semaphore::new(1), strangers: Arc::default(), config: Arc::new(config) }))
    }

    /// Takes connections for as long as it is not ended.
    pub async fn listen(self: &Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    if let Err(error) = self.begin(stream, peer) {
                        say(format_args!("sshd: cannot serve {}: {error}", peer.ip()));
                    }
                }
                // Usually too many open files.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    fn begin(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        let local = canonical(stream.local_addr()?);
        let peer = canonical(peer);
        let _ = stream.set_nodelay(true);
        let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
        let stranger = self.strangers.enter(peer.ip(), rustix::io::dup(&stream)?);
        let number = stranger.number;
        let connection = Connection::new(Arc::clone(self), peer, local, stranger);
        let config = Arc::clone(&self.config);
        tokio::spawn(async move {
            // How it ends is the client's matter. A broken one takes only its own task with it.
            if let Ok(session) = run_stream(config, stream, connection).await {
                let _ = session.await;
            }
        });
        let strangers = Arc::clone(&self.strangers);
        tokio::spawn(async move {
            tokio::time::sleep(LOGIN_LIMIT).await;
            strangers.end(number);
        });
        Ok(())
    }
}

/// An IPv4 address as such, not as the IPv6 socket sees it.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Connections that have not shown who they are, by the order in which they came.
#[derive(Default)]
pub struct Strangers {
    present: Mutex<Present>,
}

#[derive(Default)]
struct Present {
    next: u64,
    places: HashMap<u64, (IpAddr, OwnedFd)>,
}

/// A place among them, which is free again when this is dropped.
pub struct Stranger {
    number: u64,
    strangers: Arc<Strangers>,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        lock(&self.strangers.present).places.remove(&self.number);
    }
}

impl Strangers {
    fn enter(self: &Arc<Self>, address: IpAddr, socket: OwnedFd) -> Stranger {
        let mut present = lock(&self.present);
        let Present { next, places } = &mut *present;
        if places.len() >= MAX_STRANGERS
            && let Some(number) = whose_turn(places.iter().map(|(number, (address, _))| (*number, *address)))
            && let Some((_, socket)) = places.remove(&number)
        {
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
        let number = *next;
        *next += 1;
        places.insert(number, (address, socket));
        Stranger { number, strangers: Arc::clone(self) }
    }

    /// Ends a connection that is still there.
    fn end(&self, number: u64) {
        if let Some((_, socket)) = lock(&self.present).places.remove(&number) {
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
    }
}

/// The oldest of the address that has the most.
fn whose_turn(present: impl Iterator<Item = (u64, IpAddr)>) -> Option<u64> {
    let mut by_address: HashMap<IpAddr, (usize, u64)> = HashMap::new();
    for (number, address) in present {
        let (count, oldest) = by_address.entry(address).or_insert((0, number));
        *count += 1;
        *oldest = number.min(*oldest);
    }
    by_address.into_values().max_by_key(|(count, oldest)| (*count, std::cmp::Reverse(*oldest))).map(|(_, oldest)| oldest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_takes_the_most_room_gives_it_back() {
        let (one, other): (IpAddr, IpAddr) = (Ipv4Addr::new(10, 0, 0, 1).into(), Ipv4Addr::new(10, 0, 0, 2).into());
        assert_eq!(whose_turn([(1, one), (2, other), (3, other)].into_iter()), Some(2));
        assert_eq!(whose_turn([(5, one), (4, one), (3, other)].into_iter()), Some(4));
        assert_eq!(whose_turn([(5, one), (3, other)].into_iter()), Some(3), "the oldest when all are equal");
        assert_eq!(whose_turn(std::iter::empty()), None);
    }
}
