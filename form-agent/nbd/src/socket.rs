//! Connections, plain or with TLS, on which every read has its time.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned, pki_types::ServerName};

/// How long the other side may leave what was sent to it unread.
pub const UNREAD: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Whoever reads from it or writes to it is told that it is over.
    pub fn close(&self) {
        // An error means that it is closed already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    fn set_patience(&self, read: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(Some(UNREAD))),
            Self::Tcp(stream) => stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(Some(UNREAD))),
        }
    }
}

#[derive(Clone, Debug)]
struct Timed {
    socket: Arc<Socket>,
    /// All that is read has to be there by then, however slowly it comes.
    deadline: Option<Instant>,
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.set_patience(Some(left))?;
        }
        match &*self.socket {
            Socket::Unix(stream) => (&mut &*stream).read(into),
            Socket::Tcp(stream) => (&mut &*stream).read(into),
        }
    }
}

impl Write for Timed {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match &*self.socket {
            Socket::Unix(stream) => (&mut &*stream).write(from),
            Socket::Tcp(stream) => (&mut &*stream).write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection on which NBD is spoken.
#[derive(Debug)]
pub struct Channel(Kind);

#[derive(Debug)]
enum Kind {
    Plain(Timed),
    Server(Box<StreamOwned<ServerConnection, Timed>>),
    Client(Box<StreamOwned<ClientConnection, Timed>>),
}

impl Channel {
    /// Waits for ever for what is read, and [`UNREAD`] for what is written.
    ///
    /// # Errors
    /// When the socket takes no limit of time.
    pub fn new(socket: Arc<Socket>) -> io::Result<Self> {
        let mut channel = Self(Kind::Plain(Timed { socket, deadline: None }));
        channel.wait_for_each(None)?;
        Ok(channel)
    }

    const fn timed(&mut self) -> &mut Timed {
        match &mut self.0 {
            Kind::Plain(timed) => timed,
            Kind::Server(stream) => &mut stream.sock,
            Kind::Client(stream) => &mut stream.sock,
        }
    }

    /// All that is read from now on has to be there by then.
    pub const fn wait_until(&mut self, deadline: Instant) {
        self.timed().deadline = Some(deadline);
    }

    /// Each piece that is read from now on has so much time; without a time, for ever.
    ///
    /// # Errors
    /// When the socket takes no limit of time.
    pub fn wait_for_each(&mut self, patience: Option<Duration>) -> io::Result<()> {
        let timed = self.timed();
        timed.deadline = None;
        timed.socket.set_patience(patience)
    }

    fn plain(&self) -> io::Result<Timed> {
        match &self.0 {
            Kind::Plain(timed) => Ok(timed.clone()),
            Kind::Server(_) | Kind::Client(_) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Goes on with TLS, as the server.
    ///
    /// # Errors
    /// When the client is not whom the server knows, or speaks no TLS; also where there is TLS already.
    pub fn secure_server(&mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut timed = self.plain()?;
        let mut connection = ServerConnection::new(config).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut timed)?;
        }
        self.0 = Kind::Server(Box::new(StreamOwned::new(connection, timed)));
        Ok(())
    }

    /// Goes on with TLS, as a client of the server of this name.
    ///
    /// # Errors
    /// When the server is not the one that the client knows, or speaks no TLS; also where there is TLS already.
    pub fn secure_client(&mut self, config: Arc<ClientConfig>, name: ServerName<'static>) -> io::Result<()> {
        let mut timed = self.plain()?;
        let mut connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut timed)?;
        }
        self.0 = Kind::Client(Box::new(StreamOwned::new(connection, timed)));
        Ok(())
    }
}

impl Read for Channel {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Plain(timed) => timed.read(into),
            Kind::Server(stream) => stream.read(into),
            Kind::Client(stream) => stream.read(into),
        }
    }
}

impl Write for Channel {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Plain(timed) => timed.write(from),
            Kind::Server(stream) => stream.write(from),
            Kind::Client(stream) => stream.write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Kind::Plain(timed) => timed.flush(),
            Kind::Server(stream) => stream.flush(),
            Kind::Client(stream) => stream.flush(),
        }
    }
}
