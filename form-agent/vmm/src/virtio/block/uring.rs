//! Requests of a disk that the kernel works on while its thread goes on: io_uring (io_uring(7), io_uring_setup(2)).
//!
//! Rings are made while the process may still do that ([`provide`]) and kept for the disks of this VM, those that come later included:
//! afterwards the system call filters allow `io_uring_enter` alone. What a ring can be asked for is restricted before it takes its first request:
//! to read, and to make written data stable. Where there is no ring to be had, disks do one request after the other.

use std::{
    io,
    mem::ManuallyDrop,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, PoisonError},
};

use io_uring::{
    IoUring, opcode,
    register::Restriction,
    types::{Fd, FsyncFlags},
};

use super::request::Operation;
use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::Chain;

#[cfg(test)]
mod tests;

/// Requests under way at once. A queue holds 256 descriptors, of which a request takes two or three, or one that names a table of them: what
/// there is beyond this waits in the queue.
const ENTRIES: u16 = 128;
/// What the kernel cannot do without waiting it gives to threads of its own, at most so many a disk.
const WORKERS: u32 = 4;
/// Rings for disks that come while the VM runs: those of disks that went are used again.
const SPARE: usize = 2;
/// How often the kernel is asked again when it has no memory for a request at the moment.
const TRIES: u32 = 1000;

/// Made and not in use.
static RINGS: Mutex<Vec<IoUring>> = Mutex::new(Vec::new());

/// Makes rings for so many disks and for a few that may come. To be called before the process enters its filters.
///
/// A kernel without io_uring, one whose administrator has switched it off (`kernel.io_uring_disabled`), and a limit of locked memory that leaves no
/// room are no errors: then there are fewer rings, or none.
pub fn provide(disks: usize) {
    let mut rings = RINGS.lock().unwrap_or_else(PoisonError::into_inner);
    while rings.len() < disks + SPARE {
        let Ok(ring) = make() else { return };
        rings.push(ring);
    }
}

/// A ring that can be asked for nothing but what [`Uring`] asks for.
pub(super) fn make() -> io::Result<IoUring> {
    // A copy of this process that writes its memory has no use for the ring.
    let ring = IoUring::builder().dontfork().setup_r_disabled().build(u32::from(ENTRIES))?;
    let submitter = ring.submitter();
    // Older kernels than 5.15 choose the number themselves.
    let _ = submitter.register_iowq_max_workers(&mut [WORKERS, 1]);
    // No flags of requests and nothing to be registered any more, since none is named.
    submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Readv::CODE), Restriction::sqe_op(opcode::Fsync::CODE)])?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// A request that is under way, with all that the kernel uses of it until it is done.
pub struct Asked {
    pub chain: Chain,
    pub operation: Operation,
    /// Of a read: so many bytes of the request were there already.
    pub done: usize,
    /// Keeps the memory mapped that `vectors` lead to.
    pub memory: Arc<GuestMemoryMmap>,
    /// Where the other bytes shall go; empty for what moves none.
    pub vectors: Vec<libc::iovec>,
}

/// The ring of one disk and what is under way in it.
pub struct Uring {
    /// Dropped or given back by `Drop` alone.
    ring: ManuallyDrop<IoUring>,
    /// The place of a request is what its completion names it by.
    places: Vec<Option<Asked>>,
    free: Vec<u16>,
    /// Taken, but not told to the kernel yet.
    waiting: Vec<u16>,
}

// SAFETY: the pointers in `Asked::vectors` lead to memory that belongs to no thread, and that `Asked::memory` keeps mapped; only the kernel follows them.
unsafe impl Send for Uring {}

impl Uring {
    /// A ring that was made before; `None` when there is none left.
    pub fn take() -> Option<Self> {
        RINGS.lock().unwrap_or_else(PoisonError::into_inner).pop().map(Self::new)
    }

    pub(super) fn new(ring: IoUring) -> Self {
        let places = (0..ENTRIES).map(|_| None).collect();
        Self { ring: ManuallyDrop::new(ring), places, free: (0..ENTRIES).rev().collect(), waiting: Vec::new() }
    }

    /// Whether [`Uring::ask`] may be called.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing was asked for that has not been taken.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.places.len()
    }

    /// Takes a request, of which [`Uring::submit`] tells the kernel. `false` where there is no room: then none is made.
    pub fn ask(&mut self, make: impl FnOnce() -> Asked) -> bool {
        let Some(place) = self.free.pop() else { return false };
        self.places[usize::from(place)] = Some(make());
        self.waiting.push(place);
        true
    }

    /// Takes back the only request there is, if it is a read and the kernel was not told of it.
    pub fn take_back_lone_read(&mut self) -> Option<Asked> {
        let &[place] = self.waiting.as_slice() else { return None };
        let lone = self.free.len() + 1 == self.places.len();
        let asked = self.places[usize::from(place)].take_if(|asked| lone && matches!(asked.operation, Operation::Read { .. }))?;
        self.waiting.clear();
        self.free.push(place);
        Some(asked)
    }

    /// Tells the kernel of all requests taken, about this file. What it can do at once is done when this returns.
    ///
    /// # Errors
    /// Those of `io_uring_enter` that do not pass by themselves. No request can be made any more then.
    pub fn submit(&mut self, file: RawFd) -> io::Result<()> {
        for place in self.waiting.drain(..) {
            let Some(asked) = &self.places[usize::from(place)] else { continue };
            let entry = match asked.operation {
                Operation::Read { offset } => opcode::Readv::new(Fd(file), asked.vectors.as_ptr(), asked.vectors.len() as u32)
                    .offset(offset + asked.done as u64)
                    .build(),
                _ => opcode::Fsync::new(Fd(file)).flags(FsyncFlags::DATASYNC).build(),
            };
            // SAFETY: the vectors, and the memory that they lead to, stay in `places` until the completion is taken, or for ever (`drop`).
            let pushed = unsafe { self.ring.submission().push(&entry.user_data(u64::from(place))) };
            // There are as many entries as places, and none is left over from before.
            pushed.map_err(io::Error::other)?;
        }
        self.enter(0)
    }

    /// Waits until at least one request is done.
    ///
    /// # Errors
    /// As [`Uring::submit`].
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        let mut tries = 0;
        while wanted > 0 || !self.ring.submission().is_empty() {
            match self.ring.submit_and_wait(wanted) {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) && tries < TRIES => {
                    tries += 1;
                    std::thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A request that is done, and what the kernel says of it: the number of bytes, or an error as a negative number.
    pub fn next_done(&mut self) -> Option<(Asked, i32)> {
        loop {
            let completion = self.ring.completion().next()?;
            let place = u16::try_from(completion.user_data()).ok()?;
            // Always there: the kernel names what it was told, once.
            if let Some(asked) = self.places.get_mut(usize::from(place)).and_then(Option::take) {
                self.free.push(place);
                return Some((asked, completion.result()));
            }
        }
    }
}

/// Readable while there is something for [`Uring::next_done`].
impl AsRawFd for Uring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// Waits for what is under way, and leaves the ring to the next disk.
impl Drop for Uring {
    fn drop(&mut self) {
        // What the kernel was not told of it does not do.
        for place in std::mem::take(&mut self.waiting) {
            self.places[usize::from(place)] = None;
            self.free.push(place);
        }
        while !self.is_idle() {
            if self.next_done().is_none() && self.wait().is_err() {
                // The kernel still has addresses of the guest's memory: this, and the ring, stay until the process ends.
                std::mem::forget(std::mem::take(&mut self.places));
                return;
            }
        }
        // SAFETY: `self` is not used any more, and this is the only place that takes the ring.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        RINGS.lock().unwrap_or_else(PoisonError::into_inner).push(ring);
    }
}
