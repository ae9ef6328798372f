//! An NBD server for one volume: fixed newstyle negotiation, structured replies, block status of `base:allocation`. The protocol is that of
//! NetworkBlockDevice/nbd, `doc/proto.md`.
//!
//! Every client has a thread of its own, and no more memory than one buffer. A client that stops reading holds up nobody but itself, and
//! not for long.

mod negotiate;
mod transmit;
mod wire;

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use self::{
    negotiate::{Answer, Negotiation, Offer},
    wire::{OptionHead, Terms, greeting},
};
use crate::contents::Contents;

/// Clients of one export at a time; further ones are hung up on.
pub const MAX_CLIENTS: usize = 16;

/// How long a client may take to say what it wants.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a client may leave what it asked for unread.
const UNREAD: Duration = Duration::from_secs(30);

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
    contents: Contents,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    /// Nobody is let in any more.
    ended: bool,
    all: Vec<(Weak<Socket>, JoinHandle<()>)>,
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Server {
    /// Serves `contents` under `name` (and under the empty name), for reading or, when it was opened so, for writing too.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn start(contents: Contents, name: &str, place: &Place) -> io::Result<Self> {
        let (listener, place) = Listener::open(place)?;
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared { name: name.to_owned(), contents, clients: Mutex::default() });
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

    /// Clients that are connected now.
    pub fn clients(&self) -> usize {
        self.shared.clients().all.iter().filter(|(_, thread)| !thread.is_finished()).count()
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
        for (socket, thread) in clients {
            if let Some(socket) = socket.upgrade() {
                socket.close();
            }
            // It ends with what it is doing; a panic of it was reported.
            let _ = thread.join();
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

    /// Greets a client and finds out what it wants; none when it leaves again.
    fn negotiate(&self, mut socket: &Socket) -> io::Result<Option<Terms>> {
        let deadline = Instant::now() + HANDSHAKE;
        let offer = Offer { name: &self.name, size: self.contents.size_bytes(), writable: self.contents.is_writable() };
        socket.write_all(&greeting())?;
        let mut flags = [0; 4];
        socket.read_by(deadline, &mut flags)?;
        let Some(mut negotiation) = Negotiation::new(u32::from_be_bytes(flags)) else { return Ok(None) };
        loop {
            let mut head = [0; OptionHead::BYTES];
            socket.read_by(deadline, &mut head)?;
            let Some(OptionHead { option, length }) = OptionHead::parse(&head) else { return Ok(None) };
            let mut data = vec![0; length as usize];
            socket.read_by(deadline, &mut data)?;
            match negotiation.answer(&offer, option, &data) {
                Answer::Next(bytes) => socket.write_all(&bytes)?,
                Answer::Begin(bytes, terms) => {
                    socket.write_all(&bytes)?;
                    return Ok(Some(terms));
                }
                Answer::End(bytes) => {
                    socket.write_all(&bytes)?;
                    return Ok(None);
                }
            }
        }
    }

    fn serve(&self, socket: &Socket) -> io::Result<()> {
        socket.set_patience(Some(HANDSHAKE), UNREAD)?;
        let Some(terms) = self.negotiate(socket)? else { return Ok(()) };
        // A client may have nothing to ask for a long time.
        socket.set_patience(None, UNREAD)?;
        transmit::transmit(socket, &self.contents, terms)
    }
}

fn accept(listener: &Listener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        let mut clients = shared.clients();
        if clients.ended {
            return;
        }
        clients.all.retain(|(_, thread)| !thread.is_finished());
        let result = accepted.and_then(|socket| {
            if clients.all.len() >= MAX_CLIENTS {
                tracing::warn!(volume = shared.name, "an NBD client was turned away: there are {MAX_CLIENTS} already");
                return Ok(());
            }
            let socket = Arc::new(socket);
            let (known, server) = (Arc::downgrade(&socket), Arc::clone(shared));
            let thread = thread::Builder::new().name("nbd-client".to_owned()).stack_size(STACK).spawn(move || {
                if let Err(error) = server.serve(&socket) {
                    tracing::debug!(volume = server.name, %error, "an NBD client was hung up on");
                }
                // Seen by the client at once, whoever else holds the socket for a moment.
                socket.close();
            })?;
            clients.all.push((known, thread));
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

impl Socket {
    fn close(&self) {
        // An error means that it is closed already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    /// Reads as much as there is room for, in the time that is left, however slowly it comes.
    fn read_by(&self, deadline: Instant, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.set_patience(Some(left), UNREAD)?;
            match (&mut &*self).read(into) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => into = &mut into[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn set_patience(&self, read: Option<Duration>, write: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(Some(write))),
            Self::Tcp(stream) => stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(Some(write))),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&mut &*stream).read(into),
            Socket::Tcp(stream) => (&mut &*stream).read(into),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&mut &*stream).write(from),
            Socket::Tcp(stream) => (&mut &*stream).write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
