//! One netlink socket: a request, and its answer.

use std::io;

use rustix::{
    fd::OwnedFd,
    net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink, recv, send, socket_with},
};

use super::message::{Message, TYPE_DONE, TYPE_ERROR, messages, u32_at};
use crate::error::Error;

pub struct Socket(OwnedFd);

impl Socket {
    pub fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        bind(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
        // The only one we talk to is the kernel, so that `send` needs no address.
        rustix::net::connect(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// Sends a request that asks for an acknowledgement.
    ///
    /// # Errors
    /// The kernel's error; `what` says what was asked.
    pub fn command(&self, what: &str, request: &[u8]) -> Result<(), Error> {
        self.ask(what, request, |_| {})
    }

    /// Sends a request and gives each message of the answer to `each`, until the acknowledgement or the end of the dump.
    ///
    /// # Errors
    /// As [`Socket::command`].
    pub fn ask(&self, what: &str, request: &[u8], mut each: impl FnMut(&Message<'_>)) -> Result<(), Error> {
        let failed = |source: io::Error| Error::Netlink { what: what.to_owned(), source };
        send(&self.0, request, SendFlags::empty()).map_err(|error| failed(error.into()))?;
        loop {
            let datagram = self.receive().map_err(failed)?;
            for message in messages(&datagram) {
                match message.kind {
                    TYPE_DONE => return Ok(()),
                    TYPE_ERROR => {
                        let code = u32_at(message.payload, 0).unwrap_or(0).cast_signed();
                        return if code == 0 { Ok(()) } else { Err(failed(io::Error::from_raw_os_error(-code))) };
                    }
                    _ => each(&message),
                }
            }
        }
    }

    /// One datagram.
    pub fn receive(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; 32 << 10];
        loop {
            match recv(&self.0, bytes.as_mut_slice(), RecvFlags::empty()) {
                Ok((_, length)) => {
                    bytes.truncate(length);
                    return Ok(bytes);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
