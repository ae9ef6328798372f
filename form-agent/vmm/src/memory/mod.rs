//! Guest RAM.

pub mod image;

use std::io;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollectionError};

use self::image::ImageError;
use crate::layout::Layout;

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

/// Maps anonymous memory for each range of RAM. Pages are taken from the host when the guest first touches them.
///
/// # Errors
/// When the host refuses the address space.
pub fn map(layout: &Layout) -> Result<GuestMemoryMmap, MemoryError> {
    map_with(layout, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, |_| None)
}

/// `source` tells for each range, by its length in bytes, which file it is mapped from.
fn map_with(
    layout: &Layout,
    flags: libc::c_int,
    mut source: impl FnMut(u64) -> Option<FileOffset>,
) -> Result<GuestMemoryMmap, MemoryError> {
    let mut regions = Vec::with_capacity(2);
    for (start, bytes) in layout.ram() {
        let size = usize::try_from(bytes).map_err(|_| MemoryError::Overflow { start })?;
        let region = image::map_range(start, size, flags, source(bytes))?;
        // SAFETY: the range is the mapping just made; MADV_DONTDUMP changes nothing but core dumps.
        if unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP) } != 0 {
            return Err(MemoryError::Advise(io::Error::last_os_error()));
        }
        debug_assert_eq!(region.len(), bytes);
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Regions)
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
}
