//! Which pages a request names, and giving them back to the host.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::{ChainError, Segments};

/// The balloon's page, whatever the page of the guest is (section 5.5.6).
pub const PAGE: u64 = 4096;
/// Bytes of page numbers read at once.
const BATCH: usize = 4096;
const NUMBER: usize = 4;

/// A range of guest memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub length: u64,
}

/// Calls `give` with the ranges that an inflate request names, in batches; neighbours in a batch are joined, since each range
/// costs the host a system call and a flush. Numbers outside guest memory are passed on: [`release`] leaves them alone. Bytes
/// too few for a number are passed over.
///
/// # Errors
/// When the request cannot be read.
pub fn inflated(memory: &GuestMemoryMmap, pages: &Segments, mut give: impl FnMut(Range)) -> Result<(), ChainError> {
    let whole = pages.len() - pages.len() % NUMBER;
    let mut buffer = [0; BATCH];
    let mut numbers = Vec::with_capacity(BATCH.min(whole) / NUMBER);
    for offset in (0..whole).step_by(BATCH) {
        let bytes = &mut buffer[..BATCH.min(whole - offset)];
        pages.read(memory, offset, bytes)?;
        numbers.clear();
        numbers.extend(bytes.chunks_exact(NUMBER).map(|number| u32::from_le_bytes([number[0], number[1], number[2], number[3]])));
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|one, next| *next == one + 1) {
            give(Range { start: u64::from(run[0]) * PAGE, length: run.len() as u64 * PAGE });
        }
    }
    Ok(())
}

/// Gives the memory behind whole host pages of `range` back to the host; the guest reads zeros there afterwards. What does not
/// lie in guest memory is left alone. Gives the number of bytes freed.
///
/// # Errors
/// Those of `madvise`.
pub fn release(memory: &GuestMemoryMmap, range: Range) -> io::Result<u64> {
    let Some(end) = range.start.checked_add(range.length) else {
        return Ok(0);
    };
    let mut freed = 0;
    for region in GuestMemoryBackend::iter(memory) {
        let first = region.start_addr().raw_value();
        let last = first + region.len();
        let from = range.start.max(first).next_multiple_of(PAGE);
        let to = end.min(last) / PAGE * PAGE;
        if from >= to {
            continue;
        }
        let host = region
            .get_host_address(region.to_region_addr(GuestAddress(from)).ok_or(io::ErrorKind::InvalidInput)?)
            .map_err(io::Error::other)?;
        // Shared memory stays allocated in its file until a hole is punched there.
        let advice = if region.flags() & libc::MAP_SHARED != 0 { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // Also when only a part of it is freed.
        region.bitmap().mark_dirty((from - first) as usize, (to - from) as usize);
        // SAFETY: `host` and the length lie inside one region of guest memory, which stays mapped while it is borrowed. Its
        // content is the guest's alone: no Rust reference points into it, and that it turns to zeros is what the guest asked for.
        if unsafe { libc::madvise(host.cast(), (to - from) as usize, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        freed += to - from;
    }
    Ok(freed)
}
