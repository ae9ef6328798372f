//! One end of a control connection: whole messages with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};
use serde::{Serialize, de::DeserializeOwned};

use super::MAX_MESSAGE;

/// What one message of `SCM_RIGHTS` can carry (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 253;

/// A connected `SOCK_SEQPACKET` socket.
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Channel { socket }
    }

    /// Two connected ends.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Channel::new(one), Channel::new(other)))
    }

    /// # Errors
    /// When nobody listens at `path`.
    pub fn connect(path: &std::path::Path) -> io::Result<Self> {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // A message must fit into the buffer whole; the operating system may grant less.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, MAX_MESSAGE * 2);
        retry(|| rustix::net::connect(&socket, &SocketAddrUnix::new(path)?))?;
        Ok(Channel::new(socket))
    }

    /// Sends one message.
    ///
    /// # Errors
    /// `TimedOut` when the other end does not make room before `deadline`; `BrokenPipe` when it is gone; `InvalidInput` when the
    /// message is too long.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>], deadline: Instant) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too long"));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        loop {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait(self.socket.as_fd(), PollFlags::OUT, deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives one message and its descriptors; `None` when the other end is gone.
    ///
    /// # Errors
    /// `TimedOut` when nothing comes before `deadline`; `InvalidData` when what comes is not a message.
    pub fn receive<T: DeserializeOwned>(&self, deadline: Instant) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0u8; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Ok(received) => {
                    let fds: Vec<OwnedFd> = control
                        .drain()
                        .filter_map(|message| match message {
                            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                            _ => None,
                        })
                        .flatten()
                        .collect();
                    if received.bytes == 0 {
                        return Ok(None);
                    }
                    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
                    }
                    let message = serde_json::from_slice(&bytes[..received.bytes]);
                    return Ok(Some((message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?, fds)));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait(self.socket.as_fd(), PollFlags::IN, deadline)?,
                Err(Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timeout)) {
            Ok(0) if left == Duration::ZERO => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{ControlReply, ControlRequest};

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(100)
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (one, other) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds: Vec<_> = (0..MAX_DESCRIPTORS).map(|_| file.as_fd()).collect();
        one.send(&ControlRequest::VsockConnect { port: 7 }, &fds, soon()).unwrap();
        let (request, fds) = other.receive::<ControlRequest>(soon()).unwrap().unwrap();
        assert_eq!((request, fds.len()), (ControlRequest::VsockConnect { port: 7 }, MAX_DESCRIPTORS));
    }

    #[test]
    fn silence_times_out_and_a_closed_end_is_seen() {
        let (one, other) = Channel::pair().unwrap();
        assert_eq!(one.receive::<ControlReply>(soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(other);
        assert!(one.receive::<ControlReply>(soon()).unwrap().is_none());
        assert_eq!(one.send(&ControlReply::Done, &[], soon()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn garbage_and_overlong_messages_are_errors() {
        let (one, other) = Channel::pair().unwrap();
        rustix::io::write(&one, b"{\"request\":").unwrap();
        assert!(other.receive::<ControlRequest>(soon()).is_err());
        let long = "x".repeat(MAX_MESSAGE);
        assert_eq!(one.send(&long, &[], soon()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let fds = vec![one.as_fd(); MAX_DESCRIPTORS + 1];
        assert!(one.send(&ControlRequest::Status, &fds, soon()).is_err());
        // The connection is still good.
        one.send(&ControlRequest::Status, &[], soon()).unwrap();
        assert!(other.receive::<ControlRequest>(soon()).unwrap().is_some());
    }

    #[test]
    fn a_peer_that_does_not_read_times_out() {
        let (one, _other) = Channel::pair().unwrap();
        let message = "x".repeat(10_000);
        let error = (0..1000).find_map(|_| one.send(&message, &[], soon()).err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
