//! The host's way to open streams, from any thread.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::CONNECTIONS_MAX;

/// Longer timeouts are cut to this.
const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// A stream to be opened.
pub struct Wanted {
    pub port: u32,
    /// The device's end of the socket pair.
    pub stream: OwnedFd,
    /// Hears once whether the guest took it; dropped when it did not.
    pub answer: SyncSender<()>,
    pub deadline: Instant,
}

#[derive(Default)]
struct Inbox {
    /// Whether a worker looks into it.
    open: bool,
    wanted: Vec<Wanted>,
}

/// What connectors and the worker share.
pub struct Door {
    inbox: Mutex<Inbox>,
    bell: EventFd,
}

impl Door {
    pub fn new() -> io::Result<Self> {
        Ok(Self { inbox: Mutex::default(), bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // Nothing is left half done under the lock.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on streams can be asked for, or no longer; who waits then is refused.
    pub fn set_open(&self, open: bool) {
        let mut inbox = self.inbox();
        inbox.open = open;
        if !open {
            inbox.wanted.clear();
        }
    }

    /// Takes what was asked for.
    pub fn take(&self) -> Vec<Wanted> {
        // An eventfd that was not written has nothing to read.
        let _ = self.bell.read();
        std::mem::take(&mut self.inbox().wanted)
    }

    fn ask(&self, wanted: Wanted) -> io::Result<()> {
        let mut inbox = self.inbox();
        if !inbox.open {
            return Err(refused("the guest's vsock driver is not up"));
        }
        if inbox.wanted.len() >= CONNECTIONS_MAX {
            return Err(refused("too many vsock connections are waiting"));
        }
        inbox.wanted.push(wanted);
        self.bell.write(1)
    }
}

impl AsRawFd for Door {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}

/// Opens streams to listeners in the guest. Clones share the device.
#[derive(Clone)]
pub struct Connector {
    door: Arc<Door>,
}

impl Connector {
    pub(super) fn new(door: Arc<Door>) -> Self {
        Self { door }
    }

    /// Connects to `port` of the guest and waits until its listener took the connection. The descriptor is a Unix stream
    /// socket: closing it closes the connection, `shutdown` closes one direction.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody listens there, the guest's driver is not up, or there are too many connections;
    /// `TimedOut` when the guest did not answer within `timeout`.
    pub fn connect(&self, port: u32, timeout: Duration) -> io::Result<OwnedFd> {
        self.start(port, timeout)?.wait()
    }

    /// Asks for a connection, without waiting for the guest: see [`Connector::connect`].
    ///
    /// # Errors
    /// `ConnectionRefused` when the guest's driver is not up, or there are too many connections.
    pub fn start(&self, port: u32, timeout: Duration) -> io::Result<Connecting> {
        let (mine, yours) = UnixStream::pair()?;
        yours.set_nonblocking(true)?;
        let (answer, heard): (SyncSender<()>, Receiver<()>) = sync_channel(1);
        let timeout = timeout.min(TIMEOUT_MAX);
        let deadline = Instant::now() + timeout;
        self.door.ask(Wanted { port, stream: OwnedFd::from(yours), answer, deadline })?;
        Ok(Connecting { port, stream: OwnedFd::from(mine), heard, timeout, deadline })
    }
}

/// A connection that the guest has not taken yet. Dropping it gives it up.
pub struct Connecting {
    port: u32,
    stream: OwnedFd,
    heard: Receiver<()>,
    timeout: Duration,
    deadline: Instant,
}

impl Connecting {
    /// The host's end, if the guest's listener took the connection by now.
    ///
    /// # Errors
    /// `self` when it has not.
    pub fn taken(self) -> Result<OwnedFd, Self> {
        if self.heard.try_recv().is_ok() { Ok(self.stream) } else { Err(self) }
    }

    /// Waits for the guest's listener.
    ///
    /// # Errors
    /// Those of [`Connector::connect`].
    pub fn wait(self) -> io::Result<OwnedFd> {
        match self.heard.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
            Ok(()) => Ok(self.stream),
            // The worker keeps the same time, and may give up a moment before us.
            Err(RecvTimeoutError::Disconnected) if Instant::now() < self.deadline => {
                Err(refused("nothing listens on that vsock port of the guest"))
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the guest did not answer on vsock port {} within {} ms", self.port, self.timeout.as_millis()),
            )),
        }
    }
}

fn refused(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, reason)
}
