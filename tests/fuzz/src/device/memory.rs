//! Guest memory whose surroundings are poisoned: the address sanitizer reports every access beside it, by our code and by the
//! system calls it makes; what the kernel does to whole pages shows in a pattern.

use std::{ffi::c_void, ptr};

use form_vmm::memory::{GuestMemoryMmap, GuestRegionMmap};
use vm_memory::{GuestAddress, MmapRegion};

/// RAM below the hole.
pub const LOW_SIZE: usize = 128 * 1024;
/// Where RAM above the hole begins.
pub const HIGH: u64 = 1 << 32;
pub const HIGH_SIZE: usize = 32 * 1024;

/// Poisoned on each side of a region.
const GUARD: usize = 64 * 1024;
/// Of that, what carries the pattern, next to the region.
const PATTERN: usize = 4096;
const PATTERN_BYTE: u8 = 0xC7;
/// Inaccessible on each side of the guards.
const WALL: usize = 16 * 1024 * 1024;

unsafe extern "C" {
    fn __asan_poison_memory_region(address: *const c_void, size: usize);
    fn __asan_unpoison_memory_region(address: *const c_void, size: usize);
}

struct Region {
    guest: u64,
    host: *mut u8,
    size: usize,
}

impl Region {
    fn map(guest: u64, size: usize) -> Self {
        let whole = 2 * (WALL + GUARD) + size;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED, "no address space for guest memory");
        // SAFETY: inside the mapping just made.
        let guard = unsafe { start.cast::<u8>().add(WALL) };
        // SAFETY: as above; the range ends a wall before the mapping's end.
        let result = unsafe { libc::mprotect(guard.cast(), 2 * GUARD + size, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(result, 0, "guest memory cannot be made accessible");
        // SAFETY: behind the first guard, inside the accessible range.
        let region = Self { guest, host: unsafe { guard.add(GUARD) }, size };
        for pattern in region.patterns() {
            // SAFETY: both patterns lie in the accessible range.
            unsafe { ptr::write_bytes(pattern, PATTERN_BYTE, PATTERN) };
        }
        for edge in region.guards() {
            // SAFETY: the guards are ours and nothing that is meant to be used lies there.
            unsafe { __asan_poison_memory_region(edge.cast(), GUARD) };
        }
        region
    }

    fn guards(&self) -> [*mut u8; 2] {
        // SAFETY: `map` left a guard on each side.
        unsafe { [self.host.sub(GUARD), self.host.add(self.size)] }
    }

    fn patterns(&self) -> [*mut u8; 2] {
        // SAFETY: as for the guards, which are longer.
        unsafe { [self.host.sub(PATTERN), self.host.add(self.size)] }
    }

    fn as_mmap(&self) -> GuestRegionMmap {
        // SAFETY: the range stays mapped readable and writable until the process ends.
        let region = unsafe {
            MmapRegion::build_raw(self.host, self.size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        };
        GuestRegionMmap::new(region.expect("aligned"), GuestAddress(self.guest)).expect("below the end of the address space")
    }

    /// The offset in this region of a range that lies in it.
    fn offset(&self, address: u64, length: usize) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.guest)?).ok()?;
        (offset.checked_add(length)? <= self.size).then_some(offset)
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for ever; the fuzzer has one thread, and no device works while this is looked at.
        unsafe { std::slice::from_raw_parts(self.host, self.size) }
    }
}

/// The guest's memory, and a copy of it that only the guest has written.
pub struct Guarded {
    regions: [Region; 2],
    copies: [Vec<u8>; 2],
    memory: GuestMemoryMmap,
}

impl Default for Guarded {
    fn default() -> Self {
        let regions = [Region::map(0, LOW_SIZE), Region::map(HIGH, HIGH_SIZE)];
        let memory = GuestMemoryMmap::from_regions(regions.iter().map(Region::as_mmap).collect()).expect("two regions apart");
        let copies = [vec![0; LOW_SIZE], vec![0; HIGH_SIZE]];
        Self { regions, copies, memory }
    }
}

impl Guarded {
    pub fn memory(&self) -> GuestMemoryMmap {
        self.memory.clone()
    }

    /// All zeros again.
    pub fn clear(&mut self) {
        for (region, copy) in self.regions.iter().zip(&mut self.copies) {
            // SAFETY: the region is mapped writable, and nobody looks at it meanwhile.
            unsafe { ptr::write_bytes(region.host, 0, region.size) };
            copy.fill(0);
        }
    }

    /// Writes as the guest does: what does not lie in its memory is lost.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        for (region, copy) in self.regions.iter().zip(&mut self.copies) {
            if let Some(offset) = region.offset(address, bytes.len()) {
                // SAFETY: `offset` says that all of it lies in the region.
                unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), region.host.add(offset), bytes.len()) };
                copy[offset..offset + bytes.len()].copy_from_slice(bytes);
            }
        }
    }

    /// What lies at `address` now; `None` outside memory.
    pub fn read(&self, address: u64, length: usize) -> Option<&[u8]> {
        self.regions.iter().find_map(|region| region.offset(address, length).map(|offset| &region.bytes()[offset..offset + length]))
    }

    pub fn read_u16(&self, address: u64) -> Option<u16> {
        self.read(address, 2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    /// Checks that the device wrote nothing but what lies in `permitted` ranges (start and length).
    ///
    /// # Panics
    /// When it did.
    pub fn check_writes(&mut self, permitted: &[(u64, u64)]) {
        for (region, copy) in self.regions.iter().zip(&mut self.copies) {
            let bytes = region.bytes();
            for &(start, length) in permitted {
                let first = start.clamp(region.guest, region.guest + region.size as u64);
                let last = start.saturating_add(length).clamp(first, region.guest + region.size as u64);
                let range = (first - region.guest) as usize..(last - region.guest) as usize;
                copy[range.clone()].copy_from_slice(&bytes[range]);
            }
            if let Some(at) =
                (bytes != copy.as_slice()).then(|| bytes.iter().zip(copy.iter()).position(|(now, before)| now != before)).flatten()
            {
                panic!("the device wrote {:#x} at {:#x}, which no chain permits", bytes[at], region.guest + at as u64);
            }
        }
    }

    /// Checks that the pages beside guest memory are as they were.
    ///
    /// # Panics
    /// When they are not.
    pub fn check_surroundings(&self) {
        for region in &self.regions {
            for pattern in region.patterns() {
                // SAFETY: the pattern lies in a guard of ours, which is readable once it is not poisoned.
                let intact = unsafe {
                    __asan_unpoison_memory_region(pattern.cast(), PATTERN);
                    let intact = std::slice::from_raw_parts(pattern, PATTERN).iter().all(|byte| *byte == PATTERN_BYTE);
                    __asan_poison_memory_region(pattern.cast(), PATTERN);
                    intact
                };
                assert!(intact, "memory beside the guest's at {:#x} was changed", region.guest);
            }
        }
    }
}
