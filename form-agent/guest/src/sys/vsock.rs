//! Listening on vsock (vsock(7)); the standard library and rustix have no address for it.

use std::{
    io,
    mem::{MaybeUninit, size_of},
};

use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};

const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

pub struct VsockListener(OwnedFd);

impl VsockListener {
    /// # Errors
    /// `EAFNOSUPPORT` where the kernel has no vsock.
    pub fn bind(port: u32) -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just opened and nobody else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a `sockaddr_vm` is plain numbers, for which zeros are valid.
        let mut address: libc::sockaddr_vm = unsafe { MaybeUninit::zeroed().assume_init() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        // SAFETY: `address` is a valid `sockaddr_vm` of the length given.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        rustix::net::listen(&socket, 64)?;
        Ok(Self(socket))
    }

    /// The next connection, and whether it comes from the host: a process of the guest could use the loopback transport.
    ///
    /// # Errors
    /// Those of `accept(2)`.
    pub fn accept(&self) -> io::Result<(OwnedFd, bool)> {
        // SAFETY: a `sockaddr_vm` is plain numbers, for which zeros are valid.
        let mut address: libc::sockaddr_vm = unsafe { MaybeUninit::zeroed().assume_init() };
        let mut length = ADDRESS_BYTES;
        // SAFETY: `address` is valid for writes of `length` bytes, and the kernel writes no more than that.
        let fd = unsafe { libc::accept4(self.0.as_raw_fd(), (&raw mut address).cast(), &raw mut length, libc::SOCK_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just opened and nobody else owns it.
        let stream = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok((stream, address.svm_cid == libc::VMADDR_CID_HOST))
    }
}
