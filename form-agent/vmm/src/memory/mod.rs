//! Guest RAM.

pub mod aside;
pub mod changes;
pub mod chunks;
pub mod image;
pub mod log;
pub(crate) mod patch;
mod sums;
pub mod touched;

use std::io;

use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionCollectionError};

use self::image::ImageError;
use crate::layout::Layout;

/// Guest memory that notes which of its pages our devices write. What vCPUs write, KVM notes: [`changes`].
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<AtomicBitmap>;
pub type GuestRegionMmap = vm_memory::GuestRegionMmap<AtomicBitmap>;
type MmapRegion = vm_memory::mmap::MmapRegion<AtomicBitmap>;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot reserve {bytes} bytes of guest memory at {start:#x}: give the VM less memory")]
    Map {
        start: u64,
        bytes: u64,
        #[source]
        source: MmapRegionError,
    },
    #[error("guest memory does not fit into the address space")]
    Regions(#[source] GuestRegionCollectionError),
    #[error("guest memory at {start:#x} overflows")]
    Overflow { start: u64 },
    #[error("cannot keep guest memory out of core dumps")]
    Advise(#[source] io::Error),
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// The pages of `region` that our devices have written to.
fn ours(region: &GuestRegionMmap) -> &AtomicBitmap {
    MmapRegion::bitmap(region)
}

/// Maps anonymous memory for each range of RAM. Pages are taken from the host when the guest first touches them.
///
/// # Errors
/// When the host refuses the address space.
pub fn map(layout: &Layout) -> Result<GuestMemoryMmap, MemoryError> {
    map_ranges(&layout.ram(), ANONYMOUS, |_| None)
}

/// `source` tells for each range, by its length in bytes, which file it is mapped from.
fn map_ranges(
    ranges: &[(u64, u64)],
    flags: libc::c_int,
    mut source: impl FnMut(u64) -> Option<FileOffset>,
) -> Result<GuestMemoryMmap, MemoryError> {
    let mut regions = Vec::with_capacity(ranges.len());
    for &(start, bytes) in ranges {
        let size = usize::try_from(bytes).map_err(|_| MemoryError::Overflow { start })?;
        let mapping = match source(bytes) {
            None => map_aligned(size, flags),
            from => MmapRegion::build(from, size, PROTECTION, flags),
        };
        let mapping = mapping.map_err(|source| MemoryError::Map { start, bytes, source })?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Overflow { start })?;
        // SAFETY: the range is the mapping just made; MADV_DONTDUMP changes nothing but core dumps.
        if unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP) } != 0 {
            return Err(MemoryError::Advise(io::Error::last_os_error()));
        }
        debug_assert_eq!(region.len(), bytes);
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Regions)
}

const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A huge page of the host. KVM gives a guest one only where guest and host addresses agree below this.
const HUGE_PAGE: usize = 2 << 20;

/// Anonymous memory that begins at a huge page, as each range of RAM does. It stays mapped as long as the process, which has one VM.
fn map_aligned(size: usize, flags: libc::c_int) -> Result<MmapRegion, MmapRegionError> {
    let failed = || MmapRegionError::Mmap(io::Error::last_os_error());
    let room = size.checked_add(HUGE_PAGE).ok_or_else(|| MmapRegionError::Mmap(io::ErrorKind::InvalidInput.into()))?;
    // SAFETY: a new mapping at a place that the kernel chooses.
    let begin = unsafe { libc::mmap(std::ptr::null_mut(), room, PROTECTION, flags, -1, 0) };
    if begin == libc::MAP_FAILED {
        return Err(failed());
    }
    let before = begin.addr().next_multiple_of(HUGE_PAGE) - begin.addr();
    let aligned = begin.wrapping_byte_add(before);
    for (from, length) in [(begin, before), (aligned.wrapping_byte_add(size), HUGE_PAGE - before)] {
        // SAFETY: both parts lie in the mapping just made, and nothing refers to them.
        if length > 0 && unsafe { libc::munmap(from, length) } != 0 {
            return Err(failed());
        }
    }
    // SAFETY: what is left of the mapping is `size` bytes from `aligned` on, and nothing unmaps it.
    unsafe { MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::with_len(size)).with_raw_mmap_pointer(aligned.cast()) }
        .with_mmap_prot(PROTECTION)
        .with_mmap_flags(flags)
        .build()
}

/// Gives the host back what lies in `region`, which stays mapped and holds zeros then, also when it came from a file.
fn empty(region: &GuestRegionMmap) -> io::Result<()> {
    let (begin, size) = (region.as_ptr().cast(), region.size());
    // SAFETY: the new mapping takes the place of one of the same size and protection that `region` owns, in one step. What it held is the
    // guest's alone: no Rust reference points into it.
    if unsafe { libc::mmap(begin, size, PROTECTION, ANONYMOUS | libc::MAP_FIXED, -1, 0) } == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the range is the mapping just made; MADV_DONTDUMP changes nothing but core dumps.
    if unsafe { libc::madvise(begin, size, libc::MADV_DONTDUMP) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    #[test]
    fn both_sides_of_the_hole_are_mapped_and_the_hole_is_not() {
        let layout = Layout::new(5 * 1024, 40).unwrap();
        let memory = map(&layout).unwrap();
        memory.write_obj(7u64, GuestAddress(layout.low_ram - 8)).unwrap();
        memory.write_obj(9u64, GuestAddress(crate::layout::HOLE_END)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(crate::layout::HOLE_END)).unwrap(), 9);
        assert!(!memory.address_in_range(GuestAddress(crate::layout::HOLE_START)));
        assert!(memory.write_obj(1u8, GuestAddress(layout.mmio64_start)).is_err());
    }

    #[test]
    fn guest_and_host_agree_where_huge_pages_begin() {
        for mib in [128, 5 * 1024] {
            let memory = map(&Layout::new(mib, 40).unwrap()).unwrap();
            for region in memory.iter() {
                assert_eq!((region.as_ptr().addr() as u64 ^ region.start_addr().0) % HUGE_PAGE as u64, 0);
                // All of it is there.
                memory.write_obj(1u8, region.last_addr()).unwrap();
            }
        }
    }
}
