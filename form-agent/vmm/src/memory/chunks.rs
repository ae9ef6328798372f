//! Memory that comes and goes while the VM runs. Each block is a region of guest memory and a slot of KVM's only while the guest has it: at
//! any other time neither its vCPUs nor a device of ours reach it, and the host has its pages back.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::changes::slot_of;
use super::{MemoryError, map_ranges};
use crate::memory::{GuestMemoryMmap, GuestRegionMmap};
use crate::pci::interrupts::io_error;
use crate::virtio::GuestMemory;
use crate::virtio::mem::{BLOCK, Backing, Region};

/// Slots of KVM before this one are for the memory that the VM boots with.
pub const FIRST_SLOT: u32 = 8;

/// Where KVM learns of it.
pub trait Slots: Send + Sync {
    /// The guest reaches `region` through `slot`; `None`: through it nothing any more.
    ///
    /// # Errors
    /// When KVM refuses.
    fn set(&self, slot: u32, region: Option<&GuestRegionMmap>) -> io::Result<()>;
}

impl Slots for Arc<VmFd> {
    fn set(&self, slot: u32, region: Option<&GuestRegionMmap>) -> io::Result<()> {
        let nothing = kvm_userspace_memory_region { slot, ..Default::default() };
        let region = region.map_or(nothing, |region| slot_of(slot, region));
        // SAFETY: a slot of no length is removed. Any other is a region of guest memory that `Chunks` keeps mapped as long as it is there,
        // which is at least as long as the slot; no other slot has its addresses, since a region of guest memory has not.
        unsafe { self.set_user_memory_region(region) }.map_err(io_error)
    }
}

pub struct Chunks {
    slots: Box<dyn Slots>,
    memory: GuestMemory,
    region: Region,
    /// What was ever mapped. A device that is in the middle of a request may hold a map of memory in which a block is still there: so its
    /// addresses stay valid for ever, with nothing behind them once it is unplugged.
    mapped: Mutex<BTreeMap<u32, Arc<GuestRegionMmap>>>,
}

impl Chunks {
    #[must_use]
    pub fn new(slots: Box<dyn Slots>, memory: GuestMemory, region: Region) -> Self {
        Chunks { slots, memory, region, mapped: Mutex::default() }
    }

    /// Takes over the block `index`, which is among guest memory already, and tells KVM.
    ///
    /// # Errors
    /// When it is not, or KVM refuses.
    pub fn adopt(&self, index: u32) -> io::Result<()> {
        let (_, chunk) = self.memory.memory().remove_region(self.start(index), BLOCK).map_err(io::Error::other)?;
        self.slots.set(FIRST_SLOT + index, Some(&chunk))?;
        self.mapped().insert(index, chunk);
        Ok(())
    }

    fn start(&self, index: u32) -> GuestAddress {
        GuestAddress(self.region.address(index))
    }

    fn mapped(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Arc<GuestRegionMmap>>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block's mapping: the one that it had, or a new one.
    fn chunk(&self, index: u32) -> io::Result<Arc<GuestRegionMmap>> {
        if let Some(chunk) = self.mapped().get(&index) {
            return Ok(Arc::clone(chunk));
        }
        let made = map_ranges(&[(self.start(index).0, BLOCK)], super::ANONYMOUS, |_| None).map_err(unmapped)?;
        let (_, chunk) = made.remove_region(self.start(index), BLOCK).map_err(io::Error::other)?;
        self.mapped().insert(index, Arc::clone(&chunk));
        Ok(chunk)
    }

    /// Guest memory is changed by one thread at a time: that of the device.
    fn replace(&self, change: impl FnOnce(&GuestMemoryMmap) -> io::Result<GuestMemoryMmap>) -> io::Result<()> {
        let turn = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&self.memory.memory())?;
        turn.replace(changed);
        Ok(())
    }

    fn forget(&self, index: u32) -> io::Result<()> {
        self.replace(|memory| Ok(memory.remove_region(self.start(index), BLOCK).map_err(io::Error::other)?.0))
    }
}

fn unmapped(error: MemoryError) -> io::Error {
    match error {
        MemoryError::Advise(source) => source,
        other => io::Error::other(crate::machine::explain(&other)),
    }
}

impl Backing for Chunks {
    fn plug(&self, index: u32) -> io::Result<()> {
        let chunk = self.chunk(index)?;
        self.replace(|memory| memory.insert_region(Arc::clone(&chunk)).map_err(io::Error::other))?;
        if let Err(error) = self.slots.set(FIRST_SLOT + index, Some(&chunk)) {
            self.forget(index)?;
            return Err(error);
        }
        Ok(())
    }

    fn unplug(&self, index: u32) -> io::Result<()> {
        let chunk = self.chunk(index)?;
        self.slots.set(FIRST_SLOT + index, None)?;
        self.forget(index)?;
        if let Err(error) = super::empty(&chunk) {
            // The guest cannot reach it any more: only the host has less than it could.
            eprintln!("memory: {} MiB that the guest gave are not free yet: {error}", BLOCK >> 20);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::layout::GIB;
    use crate::virtio::testing::guest_memory;

    #[derive(Default)]
    struct Told {
        set: Mutex<Vec<(u32, bool)>>,
        refuses: AtomicBool,
    }

    impl Slots for Arc<Told> {
        fn set(&self, slot: u32, region: Option<&GuestRegionMmap>) -> io::Result<()> {
            if self.refuses.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            self.set.lock().unwrap().push((slot, region.is_some()));
            Ok(())
        }
    }

    fn chunks() -> (Chunks, Arc<Told>) {
        let told = Arc::<Told>::default();
        let region = Region { start: 68 * GIB, blocks: 4 };
        (Chunks::new(Box::new(Arc::clone(&told)), GuestMemory::new(guest_memory()), region), told)
    }

    /// KiB of the process that are in memory and belong to no file (`/proc/self/smaps`), at `address`.
    fn resident_kib(address: usize) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        let mut sum = 0;
        for line in maps.lines() {
            let bounds = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            if let Some((from, to)) = bounds
                && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                inside = (from..to).contains(&address);
            } else if let (true, Some(kib)) = (inside, line.strip_prefix("Rss:")) {
                sum += kib.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap();
            }
        }
        sum
    }

    #[test]
    fn a_block_is_reached_only_while_it_is_plugged_and_comes_back_empty() {
        let (chunks, told) = chunks();
        let (start, second) = (GuestAddress(68 * GIB), GuestAddress(68 * GIB + 2 * BLOCK));
        chunks.plug(0).unwrap();
        chunks.plug(2).unwrap();
        let before = chunks.memory.memory();
        before.write_obj(7_u64, start).unwrap();
        before.write_obj(9_u64, second.0.checked_add(BLOCK - 8).map(GuestAddress).unwrap()).unwrap();
        assert!(before.write_obj(1_u8, GuestAddress(start.0 + BLOCK)).is_err());
        let host = before.get_host_address(start).unwrap().addr();
        assert!(resident_kib(host) >= 4);
        assert_eq!(host % (2 << 20), 0, "no huge pages are possible");

        chunks.unplug(0).unwrap();
        assert!(chunks.memory.memory().write_obj(1_u8, start).is_err());
        assert_eq!(chunks.memory.memory().read_obj::<u64>(GuestAddress(second.0 + BLOCK - 8)).unwrap(), 9);
        assert_eq!(resident_kib(host), 0, "the host has not got it back");
        // Who still holds the memory as it was neither crashes nor sees what was there.
        assert_eq!(before.read_obj::<u64>(start).unwrap(), 0);
        chunks.plug(0).unwrap();
        assert_eq!(chunks.memory.memory().read_obj::<u64>(start).unwrap(), 0);
        assert_eq!(*told.set.lock().unwrap(), [(8, true), (10, true), (8, false), (8, true)]);
    }

    #[test]
    fn what_kvm_refuses_changes_nothing() {
        let (chunks, told) = chunks();
        told.refuses.store(true, Ordering::SeqCst);
        assert!(chunks.plug(1).is_err());
        assert_eq!(chunks.memory.memory().num_regions(), 2);
        told.refuses.store(false, Ordering::SeqCst);
        chunks.plug(1).unwrap();
        told.refuses.store(true, Ordering::SeqCst);
        assert!(chunks.unplug(1).is_err());
        assert_eq!(chunks.memory.memory().num_regions(), 3);
        assert!(chunks.adopt(3).is_err(), "it is not there");
    }

    #[test]
    fn a_block_that_was_restored_is_taken_back_as_any_other() {
        let (chunks, _) = chunks();
        let file = tempfile::tempfile().unwrap();
        file.set_len(BLOCK).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[5; 8], 0).unwrap();
        let start = GuestAddress(68 * GIB + BLOCK);
        let from = vm_memory::FileOffset::new(file, 0);
        let made = map_ranges(&[(start.0, BLOCK)], libc::MAP_PRIVATE | libc::MAP_NORESERVE, |_| Some(from.clone())).unwrap();
        let (_, chunk) = made.remove_region(start, BLOCK).unwrap();
        chunks.replace(|memory| memory.insert_region(chunk).map_err(io::Error::other)).unwrap();
        chunks.adopt(1).unwrap();
        assert_eq!(chunks.memory.memory().read_obj::<u8>(start).unwrap(), 5);
        chunks.unplug(1).unwrap();
        chunks.plug(1).unwrap();
        assert_eq!(chunks.memory.memory().read_obj::<u8>(start).unwrap(), 0, "what the file holds came back");
    }
}
