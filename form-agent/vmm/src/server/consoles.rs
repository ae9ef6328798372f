//! Attached consoles: stream sockets that see what the guest prints and type what they send.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::platform::serial::SerialPort;

/// What a console may lag behind before it is cut off: the guest never waits for a reader.
const LAG: usize = 256 * 1024;
pub const MAX_CONSOLES: usize = 16;

struct Console {
    socket: OwnedFd,
    outgoing: VecDeque<u8>,
    gone: bool,
}

#[derive(Default)]
pub struct Consoles(Vec<Console>);

impl Consoles {
    /// Makes a console and returns its other end; `None` when there are too many.
    pub fn attach(&mut self) -> Option<std::io::Result<OwnedFd>> {
        if self.0.len() >= MAX_CONSOLES {
            return None;
        }
        Some(match rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None) {
            Ok((mine, theirs)) => {
                self.0.push(Console { socket: mine, outgoing: VecDeque::new(), gone: false });
                Ok(theirs)
            }
            Err(error) => Err(error.into()),
        })
    }

    pub fn watch(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        self.0.iter().map(|console| {
            let out = if console.outgoing.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            (console.socket.as_fd(), PollFlags::IN | out)
        })
    }

    /// Sends `bytes` to every console.
    pub fn send(&mut self, bytes: &[u8]) {
        for console in &mut self.0 {
            console.outgoing.extend(bytes);
            console.flush();
            console.gone |= console.outgoing.len() > LAG;
        }
    }

    /// Moves what can be moved between a console and the serial port.
    pub fn carry(&mut self, index: usize, serial: &SerialPort) {
        let Some(console) = self.0.get_mut(index) else { return };
        console.flush();
        let mut bytes = [0u8; 1024];
        match rustix::net::recv(&console.socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => console.gone = true,
            // Raising the line only fails when its counter is full, and then it is raised already.
            Ok((count, _)) => drop(serial.input(&bytes[..count])),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => console.gone = true,
        }
    }

    /// Forgets consoles that are gone. Returns whether the last one went just now.
    pub fn reap(&mut self) -> bool {
        let before = self.0.len();
        self.0.retain(|console| !console.gone);
        before > 0 && self.0.is_empty()
    }
}

impl Console {
    fn flush(&mut self) {
        while !self.outgoing.is_empty() && !self.gone {
            let (bytes, _) = self.outgoing.as_slices();
            match rustix::net::send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.gone = true,
            }
        }
    }
}
