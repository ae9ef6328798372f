//! An NBD server for one volume: fixed newstyle negotiation, structured replies, block status of `base:allocation`, TLS. The protocol is that of
//! NetworkBlockDevice/nbd, `doc/proto.md`.
//!
//! Every client has a thread of its own, and no more memory than one buffer. A client that stops reading holds up nobody but itself, and
//! not for long.

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod negotiate;
mod transmit;

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use form_nbd::{
    Channel, Socket,
    tls::{self, Credentials},
    wire::{OptionHead, Terms, greeting},
};
use rustls::ServerConfig;

use self::negotiate::{Answer, Negotiation, Offer, Security};
use crate::contents::Contents;

/// Clients of one export at a time; further ones are hung up on. Who has not said yet what he wants, or who he is, gives way to the next.
pub const MAX_CLIENTS: usize = 16;

/// How long a client may take to say what it wants.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Where no thread or descriptor can be had, mostly: going on at once would spin.
const PAUSE: Duration = Duration::from_millis(100);

const STACK: usize = 512 * 1024;

/// Where clients come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A socket that is made, with mode 0600, and removed at the end.
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// An export that is served until this is dropped. Then every client is hung up on, and the volume closed.
#[derive(Debug)]
pub struct Server {
    place: Place,
    listener: Arc<Listener>,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    contents: Arc<Contents>,
    /// Nobody gets anything without it.
    tls: Option<Arc<ServerConfig>>,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    /// Nobody is let in any more.
    ended: bool,
    all: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    socket: Weak<Socket>,
    thread: JoinHandle<()>,
    /// It is a client: with TLS it has shown that it may be one.
    agreed: Arc<AtomicBool>,
    /// It was hung up on, and its thread ends.
    gone: bool,
}

impl Connection {
    fn hang_up(&mut self) {
        if let Some(socket) = self.socket.upgrade() {
            socket.close();
        }
        self.gone = true;
    }
}

impl Clients {
    /// Whether there is a place for one more. When there is none, the oldest connection that is no client yet loses its.
    fn make_room(&mut self) -> bool {
        self.all.retain(|connection| !connection.thread.is_finished());
        if self.all.iter().filter(|connection| !connection.gone).count() < MAX_CLIENTS {
            return true;
        }
        match self.all.iter_mut().find(|connection| !connection.gone && !connection.agreed.load(Ordering::Acquire)) {
            Some(silent) => {
                silent.hang_up();
                true
            }
            None => false,
        }
    }
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Server {
    /// Serves `contents` under `name` (and under the empty name), for reading or, when it was opened so, for writing too.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn start(contents: Contents, name: &str, place: &Place) -> io::Result<Self> {
        Self::start_with(contents, name, place, None)
    }

    /// Serves them at this address with TLS, to the one client that has the key of `client` (a certificate in PEM). Also gives the authority,
    /// in PEM, by which that client knows the server.
    ///
    /// # Errors
    /// When the address cannot be had, or the certificate is none.
    pub fn start_secure(contents: Contents, name: &str, address: SocketAddr, client: &str) -> io::Result<(Self, String)> {
        let own = Credentials::for_server(address.ip()).map_err(io::Error::other)?;
        let config = tls::server(&own, client).map_err(io::Error::other)?;
        Self::start_with(contents, name, &Place::Tcp(address), Some(config)).map(|server| (server, own.authority))
    }

    fn start_with(contents: Contents, name: &str, place: &Place, tls: Option<Arc<ServerConfig>>) -> io::Result<Self> {
        let (listener, place) = Listener::open(place)?;
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared { name: name.to_owned(), contents: Arc::new(contents), tls, clients: Mutex::default() });
        let mut server = Self { place, listener: Arc::clone(&listener), shared: Arc::clone(&shared), accepting: None };
        let thread = thread::Builder::new().name("nbd".to_owned()).stack_size(STACK);
        server.accepting = Some(thread.spawn(move || accept(&listener, &shared))?);
        Ok(server)
    }

    /// With the real port where any was asked for.
    pub const fn place(&self) -> &Place {
        &self.place
    }

    pub fn is_writable(&self) -> bool {
        self.shared.contents.is_writable()
    }

    /// What is served. When it grows, clients that come then see the new size; those that are connected go on with the one that they were told
    /// (NetworkBlockDevice/nbd, `doc/proto.md`: a size holds for the whole connection).
    pub fn contents(&self) -> Arc<Contents> {
        Arc::clone(&self.shared.contents)
    }

    /// Clients that are connected now.
    pub fn clients(&self) -> usize {
        self.shared.clients().all.iter().filter(|connection| !connection.gone && !connection.thread.is_finished()).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // No new clients, then no clients: whoever is being let in now is in the list by the time that the thread has ended.
        if let Place::Unix(path) = &self.place {
            remove_socket(path);
        }
        self.shared.clients().ended = true;
        self.listener.close();
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
        let clients = std::mem::take(&mut self.shared.clients().all);
        for mut connection in clients {
            connection.hang_up();
            // It ends with what it is doing; a panic of it was reported.
            let _ = connection.thread.join();
        }
    }
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "a socket stays until the next start");
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Greets a client and finds out what it wants; none when it leaves again. `agreed` is set before it is told that it is a client.
    fn negotiate(&self, channel: &mut Channel, agreed: &AtomicBool) -> io::Result<Option<Terms>> {
        let offer = Offer { name: &self.name, size: self.contents.size_bytes(), writable: self.contents.is_writable() };
        let security = if self.tls.is_some() { Security::Wanted } else { Security::None };
        negotiate(channel, &offer, security, agreed, |channel| {
            let config = self.tls.clone().ok_or(io::ErrorKind::InvalidInput)?;
            channel.secure_server(config)
        })
    }

    fn serve(&self, socket: &Arc<Socket>, agreed: &AtomicBool) -> io::Result<()> {
        let mut channel = Channel::new(Arc::clone(socket))?;
        channel.wait_until(Instant::now() + HANDSHAKE);
        let Some(terms) = self.negotiate(&mut channel, agreed)? else { return Ok(()) };
        // A client may have nothing to ask for a long time.
        channel.wait_for_each(None)?;
        transmit::transmit(channel, &self.contents, terms)
    }
}

/// As [`Shared::negotiate`], on any stream; `secure` is the handshake of TLS on it.
fn negotiate<S: Read + Write>(
    stream: &mut S,
    offer: &Offer<'_>,
    security: Security,
    agreed: &AtomicBool,
    secure: impl Fn(&mut S) -> io::Result<()>,
) -> io::Result<Option<Terms>> {
    stream.write_all(&greeting())?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let Some(mut negotiation) = Negotiation::new(u32::from_be_bytes(flags), security) else { return Ok(None) };
    loop {
        let mut head = [0; OptionHead::BYTES];
        stream.read_exact(&mut head)?;
        let Some(OptionHead { option, length }) = OptionHead::parse(&head) else { return Ok(None) };
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match negotiation.answer(offer, option, &data) {
            Answer::Next(bytes) => stream.write_all(&bytes)?,
            Answer::Secure(bytes) => {
                stream.write_all(&bytes)?;
                secure(stream)?;
            }
            Answer::Begin(bytes, terms) => {
                agreed.store(true, Ordering::Release);
                stream.write_all(&bytes)?;
                return Ok(Some(terms));
            }
            Answer::End(bytes) => {
                stream.write_all(&bytes)?;
                return Ok(None);
            }
        }
    }
}

fn accept(listener: &Listener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        let mut clients = shared.clients();
        if clients.ended {
            return;
        }
        let result = accepted.and_then(|socket| {
            if !clients.make_room() {
                tracing::warn!(volume = shared.name, "an NBD client was turned away: there are {MAX_CLIENTS} already");
                return Ok(());
            }
            let socket = Arc::new(socket);
            let (known, server) = (Arc::downgrade(&socket), Arc::clone(shared));
            let agreed = Arc::new(AtomicBool::new(false));
            let agrees = Arc::clone(&agreed);
            let thread = thread::Builder::new().name("nbd-client".to_owned()).stack_size(STACK).spawn(move || {
                if let Err(error) = server.serve(&socket, &agrees) {
                    tracing::debug!(volume = server.name, %error, "an NBD client was hung up on");
                }
                // Seen by the client at once, whoever else holds the socket for a moment.
                socket.close();
            })?;
            clients.all.push(Connection { socket: known, thread, agreed, gone: false });
            Ok(())
        });
        drop(clients);
        if let Err(error) = result {
            tracing::warn!(volume = shared.name, %error, "an NBD client could not be let in");
            thread::sleep(PAUSE);
        }
    }
}

impl Listener {
    fn open(place: &Place) -> io::Result<(Self, Place)> {
        match place {
            Place::Unix(path) => {
                // Of an agent that was killed: this one's store is locked, so nobody answers there.
                remove_socket(path);
                let listener = UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
                Ok((Self::Unix(listener), place.clone()))
            }
            Place::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                let place = Place::Tcp(listener.local_addr()?);
                Ok((Self::Tcp(listener), place))
            }
        }
    }

    fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    /// Wakes whoever waits in `accept`, with an error.
    fn close(&self) {
        if let Err(error) = rustix::net::shutdown(self.as_fd(), rustix::net::Shutdown::Both) {
            tracing::warn!(%error, "an NBD listener does not end");
        }
    }
}

#[cfg(test)]
mod tests;
