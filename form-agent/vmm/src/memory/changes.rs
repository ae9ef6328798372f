//! Which pages of guest memory have changed since it was saved, so that the next save writes only these.
//!
//! vCPUs' writes are in KVM's dirty log (`KVM_GET_DIRTY_LOG`), those of our devices, and what they gave back to the host, in the bitmaps of the
//! regions. Nothing is logged before somebody asks for it: KVM maps logged memory in small pages only. Both logs are taken while the VM stands, and
//! added to a set of pages for each of the last saves. So nobody has to say how a save ended: one that came to nothing is never built upon, and
//! the set of the one before it has gone on growing.
//!
//! What is not certain is forgotten, and the next save is a full one: other regions than before, or a slot without a log, which is what a
//! block of memory has that came (or came back) since the log began.

use std::io;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::image::{PAGE, SaveId};
use super::{GuestMemoryMmap, GuestRegionMmap, ours};
use crate::pci::interrupts::io_error;

/// So many saves can be built upon: the last, which may come to nothing, and the one before.
const KEPT: usize = 2;

/// KVM's log of a slot.
pub trait Log {
    /// Begins to log what is written to `region`, which has that slot. What is logged already stays so.
    ///
    /// # Errors
    /// When KVM refuses.
    fn start(&self, slot: u32, region: &GuestRegionMmap) -> io::Result<()>;
    /// A bit for each page of `region` that was written to since it was last asked, or since the log began.
    ///
    /// # Errors
    /// When there is no log of this slot.
    fn take(&self, slot: u32, region: &GuestRegionMmap) -> io::Result<Vec<u64>>;
}

impl Log for VmFd {
    fn start(&self, slot: u32, region: &GuestRegionMmap) -> io::Result<()> {
        let region = kvm_userspace_memory_region { flags: KVM_MEM_LOG_DIRTY_PAGES, ..slot_of(slot, region) };
        // SAFETY: the slot has this very region already, which stays mapped as long as the slot is there; only its flags change.
        unsafe { self.set_user_memory_region(region) }.map_err(io_error)
    }

    fn take(&self, slot: u32, region: &GuestRegionMmap) -> io::Result<Vec<u64>> {
        self.get_dirty_log(slot, region.size()).map_err(io_error)
    }
}

/// `region` as a slot of KVM's, without a log.
pub fn slot_of(slot: u32, region: &GuestRegionMmap) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        flags: 0,
    }
}

/// A bit for each page, by region.
pub type Pages = Vec<Vec<u64>>;

/// A save, and what has changed since.
struct Since {
    save: SaveId,
    pages: Pages,
}

#[derive(Default)]
pub struct Changes {
    /// Begin and length of the regions that are logged; none while nothing is.
    logged: Vec<(u64, u64)>,
    /// The latest is the last.
    since: Vec<Since>,
}

fn ranges(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    memory.iter().map(|region| (region.start_addr().0, region.len())).collect()
}

fn none(memory: &GuestMemoryMmap) -> Pages {
    memory.iter().map(|region| vec![0; region.size().div_ceil(PAGE * 64)]).collect()
}

impl Changes {
    /// Of a VM that goes on from `save`, whose slots have been logged from their beginning.
    pub fn since(save: SaveId, memory: &GuestMemoryMmap) -> Self {
        Self { logged: ranges(memory), since: vec![Since { save, pages: none(memory) }] }
    }

    /// The saves that can be built upon, the latest last.
    pub fn known(&self) -> Vec<SaveId> {
        self.since.iter().map(|since| since.save).collect()
    }

    /// Takes what was logged until now. The VM stands.
    pub fn look(&mut self, memory: &GuestMemoryMmap, slot: impl Fn(usize, &GuestRegionMmap) -> u32, log: &impl Log) {
        if self.logged.is_empty() {
            return;
        }
        let is_known = self.logged == ranges(memory)
            && memory.iter().enumerate().all(|(index, region)| {
                let Ok(written) = log.take(slot(index, region), region) else { return false };
                let devices = ours(region).get_and_reset();
                for since in &mut self.since {
                    add(&mut since.pages[index], &written);
                    add(&mut since.pages[index], &devices);
                }
                true
            });
        if !is_known {
            *self = Self::default();
        }
    }

    /// What has changed since `base`, if that can be told. Call [`Changes::look`] before.
    pub fn after(&self, base: &SaveId) -> Option<&Pages> {
        self.since.iter().find(|since| since.save == *base).map(|since| &since.pages)
    }

    /// From now on what changes after `save` is known as well; the VM stands, and [`Changes::look`] was called. `base` is what `save` builds upon.
    pub fn begin(
        &mut self,
        save: SaveId,
        base: Option<&SaveId>,
        memory: &GuestMemoryMmap,
        slot: impl Fn(usize, &GuestRegionMmap) -> u32,
        log: &impl Log,
    ) {
        if self.logged.is_empty() {
            let mut all = memory.iter().enumerate();
            if let Err(error) = all.try_for_each(|(index, region)| log.start(slot(index, region), region)) {
                eprintln!("the next snapshot will be a full one: what changes in memory cannot be logged: {error}");
                return;
            }
            // What was written before is in this save.
            memory.iter().for_each(|region| ours(region).reset());
            self.logged = ranges(memory);
        }
        let latest = self.since.last().map(|since| since.save);
        let kept = base.copied().or(latest);
        self.since.retain(|since| Some(since.save) == kept);
        debug_assert!(self.since.len() < KEPT);
        self.since.push(Since { save, pages: none(memory) });
    }
}

fn add(to: &mut [u64], more: &[u64]) {
    to.iter_mut().zip(more).for_each(|(to, more)| *to |= more);
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::testing::{HIGH, guest_memory};

    /// What vCPUs wrote: slot and page; and which slots have a log.
    #[derive(Default)]
    struct Written {
        pages: RefCell<Vec<(u32, usize)>>,
        logged: RefCell<Vec<u32>>,
    }

    impl Log for Written {
        fn start(&self, slot: u32, _: &GuestRegionMmap) -> io::Result<()> {
            self.logged.borrow_mut().push(slot);
            Ok(())
        }

        fn take(&self, slot: u32, region: &GuestRegionMmap) -> io::Result<Vec<u64>> {
            if !self.logged.borrow().contains(&slot) {
                return Err(io::ErrorKind::NotFound.into());
            }
            let mut bits = vec![0; region.size().div_ceil(PAGE * 64)];
            self.pages.borrow_mut().retain(|(of, page)| {
                if *of == slot {
                    bits[page / 64] |= 1 << (page % 64);
                }
                *of != slot
            });
            Ok(bits)
        }
    }

    fn slot(index: usize, _: &GuestRegionMmap) -> u32 {
        index as u32
    }

    fn pages(changes: &Changes, save: u8) -> Vec<(usize, usize)> {
        let pages = changes.after(&[save; 16]).unwrap();
        let set = |(region, words): (usize, &Vec<u64>)| {
            let bits = (0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 == 1);
            bits.map(move |bit| (region, bit)).collect::<Vec<_>>()
        };
        pages.iter().enumerate().flat_map(set).collect()
    }

    #[test]
    fn what_vcpus_and_devices_write_is_added_up_until_a_later_save_is_built_upon() {
        let (memory, log, mut changes) = (guest_memory(), Written::default(), Changes::default());
        memory.write_obj(1_u8, GuestAddress(0)).unwrap();
        changes.look(&memory, slot, &log);
        changes.begin([1; 16], None, &memory, slot, &log);
        assert_eq!(*log.logged.borrow(), [0, 1]);

        log.pages.borrow_mut().push((0, 3));
        memory.write_obj(1_u8, GuestAddress(HIGH + 4096)).unwrap();
        changes.look(&memory, slot, &log);
        assert_eq!(pages(&changes, 1), [(0, 3), (1, 1)], "what was written before the first save is in it");
        // The second comes to nothing: the first goes on to be known, with what was written before and after the second.
        changes.begin([2; 16], Some(&[1; 16]), &memory, slot, &log);
        log.pages.borrow_mut().push((0, 5));
        changes.look(&memory, slot, &log);
        assert_eq!((pages(&changes, 1), pages(&changes, 2)), (vec![(0, 3), (0, 5), (1, 1)], vec![(0, 5)]));
        changes.begin([3; 16], Some(&[1; 16]), &memory, slot, &log);
        assert_eq!(changes.known(), [[1; 16], [3; 16]]);
        // A full one: the latest stays.
        changes.begin([4; 16], None, &memory, slot, &log);
        assert_eq!(changes.known(), [[3; 16], [4; 16]]);
        assert_eq!(log.logged.borrow().len(), 2);
    }

    #[test]
    fn memory_that_came_or_went_makes_the_next_save_a_full_one() {
        let (memory, log) = (guest_memory(), Written::default());
        let mut changes = Changes::default();
        changes.begin([1; 16], None, &memory, slot, &log);
        let (smaller, _) = memory.remove_region(GuestAddress(HIGH), memory.iter().last().unwrap().len()).unwrap();
        changes.look(&smaller, slot, &log);
        assert!(changes.known().is_empty());
        // It is back, in a slot without a log.
        changes.begin([2; 16], None, &memory, slot, &log);
        log.logged.borrow_mut().retain(|slot| *slot == 0);
        changes.look(&memory, slot, &log);
        assert!(changes.known().is_empty());
        changes.begin([3; 16], None, &memory, slot, &log);
        changes.look(&memory, slot, &log);
        assert_eq!(changes.known(), [[3; 16]]);
    }

    #[test]
    fn a_vm_that_goes_on_from_a_save_can_build_upon_it() {
        let (memory, log) = (guest_memory(), Written::default());
        *log.logged.borrow_mut() = vec![0, 1];
        let mut changes = Changes::since([7; 16], &memory);
        memory.write_slice(&[1; 2], GuestAddress(2 * 4096 - 1)).unwrap();
        changes.look(&memory, slot, &log);
        assert_eq!(pages(&changes, 7), [(0, 1), (0, 2)]);
    }
}
