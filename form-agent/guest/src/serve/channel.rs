//! What carries frames: a vsock connection, or the virtio-serial port.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use form_guest::protocol::{ErrorKind, ErrorReply, Frame, FrameKind, Reply, VIRTIO_PORT, read_frame, write_frame};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Socket,
    /// One stream for all requests; whether anyone is at its other end shows in its poll state.
    Port,
}

#[derive(Debug)]
pub struct Channel {
    file: File,
    kind: Kind,
}

/// What there was to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The channel can be read, or has ended.
    Readable,
    /// The other descriptor is ready.
    Other,
    /// Neither within the time.
    Nothing,
}

impl Channel {
    /// A connected stream socket.
    pub fn socket(socket: OwnedFd) -> Self {
        Self { file: File::from(socket), kind: Kind::Socket }
    }

    /// The virtio-serial port; without udev there is no link under `/dev/virtio-ports`, so it is found by its name in sysfs.
    ///
    /// # Errors
    /// `NotFound` when the machine has none.
    pub fn port() -> io::Result<Self> {
        let device = find_port(Path::new("/sys/class/virtio-ports")).ok_or(io::ErrorKind::NotFound)?;
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        Ok(Self { file: File::options().read(true).write(true).custom_flags(flags).open(device)?, kind: Kind::Port })
    }

    pub fn is_port(&self) -> bool {
        self.kind == Kind::Port
    }

    /// Waits until a frame can be read, `other` is ready, or the time is over.
    pub fn wait(&self, other: Option<BorrowedFd<'_>>, limit: Option<Duration>) -> Event {
        let mut fds = vec![PollFd::new(&self.file, PollFlags::IN)];
        fds.extend(other.as_ref().map(|other| PollFd::new(other, PollFlags::IN)));
        let timeout = limit.map(|limit| Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => Event::Nothing,
            Ok(_) if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) => Event::Other,
            _ => Event::Readable,
        }
    }

    /// # Errors
    /// As [`read_frame`].
    pub fn read(&self) -> io::Result<Option<Frame>> {
        read_frame(&mut &*self)
    }

    /// # Errors
    /// Those of the channel; the host is gone then.
    pub fn write(&self, kind: FrameKind, payload: &[u8]) -> io::Result<()> {
        write_frame(&mut &*self, kind, payload)
    }

    /// # Errors
    /// As [`Channel::write`].
    pub fn send(&self, frame: &Frame) -> io::Result<()> {
        self.write(frame.kind, &frame.payload)
    }

    /// # Errors
    /// As [`Channel::write`].
    pub fn reply(&self, reply: &Reply) -> io::Result<()> {
        self.send(&Frame::json(FrameKind::Reply, reply)?)
    }

    /// # Errors
    /// As [`Channel::write`].
    pub fn refuse(&self, kind: ErrorKind, message: impl std::fmt::Display) -> io::Result<()> {
        self.send(&Frame::json(FrameKind::Error, &ErrorReply { kind, message: message.to_string() })?)
    }

    /// Whether the host asks to end a stream, or is gone. To be called between the frames of a stream that we send.
    pub fn cancelled(&self) -> bool {
        while self.wait(None, Some(Duration::ZERO)) == Event::Readable {
            match self.read() {
                Ok(Some(frame)) if frame.kind != FrameKind::Cancel => {}
                _ => return true,
            }
        }
        false
    }

    pub fn shutdown(&self, how: rustix::net::Shutdown) {
        if self.kind == Kind::Socket {
            // It may be down already.
            let _ = rustix::net::shutdown(&self.file, how);
        }
    }

    /// Waits until the port can be read or written.
    fn port_ready(&self, wanted: PollFlags) -> io::Result<()> {
        loop {
            let mut fds = [PollFd::new(&self.file, wanted)];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
                Ok(_) => {}
            }
            let [fd] = &fds;
            let now = fd.revents();
            if now.intersects(wanted) {
                return Ok(());
            }
            if now.intersects(PollFlags::HUP | PollFlags::ERR) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Read for &Channel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.file).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.kind == Kind::Port => {
                    match self.port_ready(PollFlags::IN) {
                        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(0),
                        ready => ready?,
                    }
                }
                result => return result,
            }
        }
    }
}

impl Write for &Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.file).write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.kind == Kind::Port => self.port_ready(PollFlags::OUT)?,
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn find_port(class: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(class).ok()?;
    entries.filter_map(Result::ok).find_map(|entry| {
        let name = std::fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim() == VIRTIO_PORT).then(|| Path::new("/dev").join(entry.file_name()))
    })
}
