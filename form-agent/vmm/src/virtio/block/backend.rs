//! What a disk is made of.

use std::{io, ops::Range, os::fd::RawFd};

use crate::memory::GuestMemoryMmap;
use crate::virtio::{
    chain::{ChainError, Segments},
    iovec::IoVecs,
};

/// Where the data of a request lies in guest memory.
pub struct Payload<'a> {
    memory: &'a GuestMemoryMmap,
    segments: &'a Segments,
    range: Range<usize>,
}

impl<'a> Payload<'a> {
    /// # Errors
    /// When the segments do not reach as far as `range`.
    pub fn new(memory: &'a GuestMemoryMmap, segments: &'a Segments, range: Range<usize>) -> Result<Self, ChainError> {
        if range.start > range.end || range.end > segments.len() {
            return Err(ChainError::Range { from: range.start, to: range.end, length: segments.len() });
        }
        Ok(Self { memory, segments, range })
    }

    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// For system calls that take guest memory as it is.
    ///
    /// # Errors
    /// When guest memory cannot be reached.
    pub fn iovecs(&self) -> io::Result<IoVecs<'a>> {
        self.segments.iovecs(self.memory, self.range.clone()).map_err(io::Error::other)
    }

    /// Copies bytes of the guest, from byte `offset` of the payload on.
    ///
    /// # Errors
    /// When the payload is shorter than that.
    pub fn copy_from_guest(&self, offset: usize, into: &mut [u8]) -> io::Result<()> {
        self.check(offset, into.len())?;
        self.segments.read(self.memory, self.range.start + offset, into).map_err(io::Error::other)
    }

    /// Copies bytes to the guest, from byte `offset` of the payload on.
    ///
    /// # Errors
    /// When the payload is shorter than that.
    pub fn copy_to_guest(&self, offset: usize, from: &[u8]) -> io::Result<()> {
        self.check(offset, from.len())?;
        self.segments.write(self.memory, self.range.start + offset, from).map_err(io::Error::other)
    }

    fn check(&self, offset: usize, length: usize) -> io::Result<()> {
        if offset > self.len() || length > self.len() - offset {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
}

/// A disk's content. The device has checked that every range lies inside [`DiskBackend::size`] and, for a read-only disk, that
/// nothing writes. Calls come from one thread at a time.
pub trait DiskBackend: Send {
    /// In bytes. Only [`DiskBackend::grow`] changes it.
    fn size(&self) -> u64;

    /// Makes it this large; what is new reads as zeros.
    ///
    /// # Errors
    /// When it is larger already, or the storage cannot grow.
    fn grow(&mut self, size: u64) -> io::Result<()>;

    /// Whether [`DiskBackend::discard`] can free anything: otherwise the feature is not offered to the guest.
    fn can_discard(&self) -> bool;

    /// The file whose bytes are the disk's, each where it is on the disk, if it can be asked for what it has without waiting for the rest
    /// (`RWF_NOWAIT`, preadv2(2)): then reads and flushes may go to the kernel past this.
    fn file(&self) -> Option<RawFd> {
        None
    }

    /// # Errors
    /// When the data cannot be read; the guest sees `VIRTIO_BLK_S_IOERR`.
    fn read(&mut self, offset: u64, into: &Payload<'_>) -> io::Result<()>;

    /// # Errors
    /// When the data cannot be written, in whole or in part.
    fn write(&mut self, offset: u64, from: &Payload<'_>) -> io::Result<()>;

    /// Everything written so far is on stable storage when it returns.
    ///
    /// # Errors
    /// When that is not so.
    fn flush(&mut self) -> io::Result<()>;

    /// The guest no longer needs the range: what it reads there later is unspecified data of this disk.
    ///
    /// # Errors
    /// When the storage says no.
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()>;

    /// The range reads as zeros afterwards; storage may be given back if `unmap`.
    ///
    /// # Errors
    /// When the zeros cannot be written.
    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;
}
