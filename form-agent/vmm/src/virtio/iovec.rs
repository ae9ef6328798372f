//! System calls that move bytes straight between a descriptor and guest memory.
//!
//! Guest memory is never turned into a Rust slice: the guest may change it at any moment. The kernel copies it, as it copies
//! any memory that other threads write.

use std::{io, marker::PhantomData, os::fd::RawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::memory::GuestMemoryMmap;

/// `IOV_MAX`: the kernel refuses longer lists.
const VECTORS_MAX: usize = 1024;

/// A list of buffers in guest memory that lives as long as the borrow of that memory.
pub struct IoVecs<'m> {
    /// Each entry lies inside memory that stays mapped during `'m`.
    list: Vec<libc::iovec>,
    length: usize,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> IoVecs<'m> {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self { list: Vec::with_capacity(capacity), length: 0, memory: PhantomData }
    }

    pub(super) fn push(&mut self, slice: VolatileSlice<'m, impl BitmapSlice>) {
        if slice.is_empty() {
            return;
        }
        self.length += slice.len();
        self.list.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
    }

    /// Adds the buffers of `other` behind these.
    pub fn append(&mut self, mut other: IoVecs<'m>) {
        self.length += other.length;
        self.list.append(&mut other.list);
    }

    /// Adds memory of our own behind the guest's, for what does not fit there.
    pub fn append_own(&mut self, own: &'m mut [u8]) {
        self.length += own.len();
        self.list.push(libc::iovec { iov_base: own.as_mut_ptr().cast(), iov_len: own.len() });
    }

    /// The number of bytes in all buffers.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Forgets the first `count` bytes.
    pub fn advance(&mut self, mut count: usize) {
        self.length -= count.min(self.length);
        let mut whole = 0;
        for vector in &mut self.list {
            if count < vector.iov_len {
                // SAFETY: `count` is less than the length of this buffer, so the result points into it.
                vector.iov_base = unsafe { vector.iov_base.cast::<u8>().add(count) }.cast::<libc::c_void>();
                vector.iov_len -= count;
                break;
            }
            count -= vector.iov_len;
            whole += 1;
        }
        self.list.drain(..whole);
    }

    fn count(&self) -> libc::c_int {
        self.list.len().min(VECTORS_MAX) as libc::c_int
    }

    /// One `readv`.
    ///
    /// # Errors
    /// Those of the call.
    pub fn read_from(&mut self, fd: RawFd) -> io::Result<usize> {
        // SAFETY: every vector lies in memory that is mapped and writable as long as `self` (`'m`); nobody else holds a Rust reference into it.
        let result = unsafe { libc::readv(fd, self.list.as_ptr(), self.count()) };
        size(result)
    }

    /// One `writev`.
    ///
    /// # Errors
    /// Those of the call.
    pub fn write_to(&self, fd: RawFd) -> io::Result<usize> {
        // SAFETY: every vector lies in memory that is mapped as long as `self` (`'m`).
        let result = unsafe { libc::writev(fd, self.list.as_ptr(), self.count()) };
        size(result)
    }

    /// One `sendmsg` on a stream socket that does not block and raises no `SIGPIPE`.
    ///
    /// # Errors
    /// Those of the call.
    pub fn send_to(&self, socket: RawFd) -> io::Result<usize> {
        // SAFETY: all zeros is a valid msghdr: no name, no buffers, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.list.as_ptr().cast_mut();
        message.msg_iovlen = self.list.len().min(VECTORS_MAX);
        // SAFETY: every vector lies in memory that is mapped as long as `self` (`'m`), and the call only reads from it.
        let result = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        size(result)
    }

    /// Fills the buffers from `offset` of a file. What lies behind its end reads as zeros.
    ///
    /// # Errors
    /// Those of `preadv`.
    pub fn read_exact_at(&mut self, fd: RawFd, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            // SAFETY: as in `read_from`.
            let result = unsafe { libc::preadv(fd, self.list.as_ptr(), self.count(), file_offset(offset)?) };
            match size(result) {
                Ok(0) => {
                    self.fill_zero();
                    break;
                }
                Ok(count) => {
                    self.advance(count);
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Fills the buffers from `offset` of a file with what is there without waiting (`RWF_NOWAIT`); gives the number of bytes.
    ///
    /// # Errors
    /// Those of `preadv2`; `WouldBlock` when nothing is.
    pub fn read_now_at(&mut self, fd: RawFd, offset: u64) -> io::Result<usize> {
        // SAFETY: as in `read_from`.
        let result = unsafe { libc::preadv2(fd, self.list.as_ptr(), self.count(), file_offset(offset)?, libc::RWF_NOWAIT) };
        let count = size(result)?;
        self.advance(count);
        Ok(count)
    }

    /// As many of the buffers as the kernel takes at once, for who sees to it that the memory stays mapped.
    pub fn into_list(mut self) -> Vec<libc::iovec> {
        self.list.truncate(VECTORS_MAX);
        self.list
    }

    /// Writes all buffers to `offset` of a file.
    ///
    /// # Errors
    /// Those of `pwritev`; `WriteZero` when the file takes no more.
    pub fn write_all_at(&mut self, fd: RawFd, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            // SAFETY: as in `write_to`.
            let result = unsafe { libc::pwritev(fd, self.list.as_ptr(), self.count(), file_offset(offset)?) };
            match size(result) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.advance(count);
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Fills the buffers with bytes of the kernel's random number generator; gives their number.
    ///
    /// # Errors
    /// Those of `getrandom`.
    pub fn fill_random(&mut self) -> io::Result<usize> {
        let mut done = 0;
        while let Some(first) = self.list.first() {
            // SAFETY: the first vector lies in memory that is mapped and writable as long as `self` (`'m`).
            let result = unsafe { libc::getrandom(first.iov_base, first.iov_len, 0) };
            match size(result) {
                Ok(count) => {
                    self.advance(count);
                    done += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn fill_zero(&mut self) {
        for vector in &self.list {
            // SAFETY: the vector lies in memory that is mapped and writable as long as `self` (`'m`).
            unsafe { std::ptr::write_bytes(vector.iov_base.cast::<u8>(), 0, vector.iov_len) };
        }
        self.list.clear();
        self.length = 0;
    }
}

fn size(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}
