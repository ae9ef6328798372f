//! Which pages of guest memory somebody has touched, so that the others need not be read: reading them would have the host map a page of zeros
//! for each, and take the place where a large page could have come.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::changes::Pages;
use super::image::PAGE;
use super::{GuestMemoryMmap, GuestRegionMmap};

/// What the kernel says of a page, in 8 bytes; bit 63: it is in memory, 62: in swap (linux/Documentation/admin-guide/mm/pagemap.rst).
const ENTRY: usize = 8;
const IS_THERE: u64 = 0b11 << 62;
/// Read at once, so many entries as have whole words of pages.
const BUFFER: usize = 512 * ENTRY;

/// `/proc/self/pagemap`, which the jail does not have.
pub struct Touched(File);

impl Touched {
    /// `None` where the kernel does not tell (`CONFIG_PROC_PAGE_MONITOR`).
    #[must_use]
    pub fn open() -> Option<Self> {
        // Who opens it as an administrator is told where in the host's memory the pages lie, for as long as the file is open. A jail is not to know.
        let sets = capabilities(None).ok()?;
        set_capabilities(None, CapabilitySets { effective: CapabilitySet::empty(), ..sets }).ok()?;
        let file = File::open("/proc/self/pagemap");
        set_capabilities(None, sets).ok()?;
        file.ok().map(Self)
    }

    /// A bit for each page of each region. Those that are mapped from a file all count: they hold what is there.
    pub fn pages(&self, memory: &GuestMemoryMmap) -> Pages {
        memory.iter().map(|region| self.of_region(region).unwrap_or_else(|_| all(region))).collect()
    }

    fn of_region(&self, region: &GuestRegionMmap) -> io::Result<Vec<u64>> {
        if region.file_offset().is_some() {
            return Ok(all(region));
        }
        let mut buffer = [0; BUFFER];
        let mut words = Vec::with_capacity(region.size().div_ceil(PAGE * 64));
        let mut left = region.size() / PAGE * ENTRY;
        let mut at = (region.as_ptr().addr() / PAGE * ENTRY) as u64;
        while left > 0 {
            let bytes = &mut buffer[..left.min(BUFFER)];
            self.0.read_exact_at(bytes, at)?;
            for entries in bytes.chunks(64 * ENTRY) {
                let there = entries.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry) & IS_THERE != 0);
                words.push(there.enumerate().fold(0, |word, (bit, there)| word | u64::from(there) << bit));
            }
            left -= bytes.len();
            at += bytes.len() as u64;
        }
        Ok(words)
    }
}

/// Every page of `region`.
pub fn all(region: &GuestRegionMmap) -> Vec<u64> {
    vec![u64::MAX; region.size().div_ceil(PAGE * 64)]
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::layout::{HOLE_END, Layout, MIB};

    #[test]
    fn pages_that_were_written_to_are_told_and_stay_so_few() {
        let layout = Layout { low_ram: 16 * MIB, high_ram: 4 * MIB, mmio64_start: 8 << 30, mmio64_end: 16 << 30 };
        let memory = super::super::map(&layout).unwrap();
        let touched = Touched::open().unwrap();
        let all_of = |pages: &Pages| pages.iter().flatten().map(|word| word.count_ones() as usize).sum::<usize>();
        assert_eq!(all_of(&touched.pages(&memory)), 0);
        memory.write_obj(0_u8, GuestAddress(9 * MIB + 3 * PAGE as u64)).unwrap();
        memory.write_obj(1_u8, GuestAddress(HOLE_END + 4 * MIB - 1)).unwrap();
        let pages = touched.pages(&memory);
        let page = 9 * MIB as usize / PAGE + 3;
        assert_ne!(pages[0][page / 64] & 1 << (page % 64), 0, "zeros that were written count");
        assert_ne!(pages[1][4 * MIB as usize / PAGE / 64 - 1] & 1 << 63, 0);
        // The host may have taken a large page for either.
        assert!(all_of(&pages) <= 2 * 512, "{}", all_of(&pages));
        assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [64, 16]);
    }

    #[test]
    fn where_pages_lie_in_the_hosts_memory_is_not_told() {
        let memory = super::super::map(&Layout { low_ram: 2 * MIB, high_ram: 0, mmio64_start: 8 << 30, mmio64_end: 16 << 30 }).unwrap();
        memory.write_obj(7_u8, GuestAddress(0)).unwrap();
        let before = capabilities(None).unwrap();
        let touched = Touched::open().unwrap();
        assert_eq!(capabilities(None).unwrap(), before, "what comes after it needs them");
        let region = memory.iter().next().unwrap();
        let mut entry = [0; ENTRY];
        touched.0.read_exact_at(&mut entry, (region.as_ptr().addr() / PAGE * ENTRY) as u64).unwrap();
        let entry = u64::from_le_bytes(entry);
        // Bits 0 to 54 are the number of the page's frame.
        assert_eq!((entry & IS_THERE != 0, entry & ((1 << 55) - 1)), (true, 0));
    }

    #[test]
    fn memory_of_a_file_counts_before_it_is_touched() {
        let memory = super::super::map(&Layout { low_ram: 2 * MIB, high_ram: 0, mmio64_start: 8 << 30, mmio64_end: 16 << 30 }).unwrap();
        memory.write_obj(7_u8, GuestAddress(MIB)).unwrap();
        let file = tempfile::tempfile().unwrap();
        super::super::image::save(&memory, &file, &[1; 16]).unwrap();
        let again = super::super::image::map(&[(0, 2 * MIB)], file, &[1; 16]).unwrap();
        assert_eq!(Touched::open().unwrap().pages(&again), [vec![u64::MAX; 8]]);
    }
}
