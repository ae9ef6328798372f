//! Which pages of guest memory have changed since it was saved, so that the next save writes only these.
//!
//! vCPUs' writes are in KVM's dirty log (`KVM_GET_DIRTY_LOG`), those of our devices, and what they gave back to the host, in the bitmaps of the
//! regions. Nothing is logged before somebody asks for it: KVM maps logged memory in small pages only. Both logs are taken at each save and
//! added to a set of pages for each of the last saves. So nobody has to say how a save ended: one that came to nothing is never built upon, and
//! the set of the one before it has gone on growing.
//!
//! Memory that is copied while the VM runs (pre-copy) has a set of its own, until the save that builds upon that copy. What is written while a
//! log is being taken is in this one or in the next: whoever copies pages takes the log first, so that a page which changes under the copy
//! is in a later set.
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
    /// Logs no more what is written to `region`: KVM may map it in large pages again.
    ///
    /// # Errors
    /// When KVM refuses.
    fn stop(&self, slot: u32, region: &GuestRegionMmap) -> io::Result<()>;
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

    fn stop(&self, slot: u32, region: &GuestRegionMmap) -> io::Result<()> {
        // SAFETY: as in `start`.
        unsafe { self.set_user_memory_region(slot_of(slot, region)) }.map_err(io_error)
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

/// A copy that was made while the VM ran.
struct Precopy {
    /// The save that its first round built upon.
    upon: Option<SaveId>,
    /// Its last round.
    since: Since,
}

#[derive(Default)]
pub struct Changes {
    /// Begin and length of the regions that are logged; none while nothing is.
    logged: Vec<(u64, u64)>,
    /// The latest is the last.
    since: Vec<Since>,
    precopy: Option<Precopy>,
    /// It is logged, and nobody wants it to be.
    is_idle: bool,
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
        Self { logged: ranges(memory), since: vec![Since { save, pages: none(memory) }], ..Self::default() }
    }

    /// The saves that can be built upon, the latest last.
    pub fn known(&self) -> Vec<SaveId> {
        self.since.iter().map(|since| since.save).collect()
    }

    /// Takes what was logged until now. Unless the VM stands, what is written meanwhile may be in this or in the next.
    pub fn look(&mut self, memory: &GuestMemoryMmap, slot: impl Fn(usize, &GuestRegionMmap) -> u32, log: &impl Log) {
        if self.logged.is_empty() {
            return;
        }
        let is_known = self.logged == ranges(memory)
            && memory.iter().enumerate().all(|(index, region)| {
                let Ok(written) = log.take(slot(index, region), region) else { return false };
                let devices = ours(region).get_and_reset();
                for since in self.since.iter_mut().chain(self.precopy.as_mut().map(|precopy| &mut precopy.since)) {
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
        let mut all = self.since.iter().chain(self.precopy.as_ref().map(|precopy| &precopy.since));
        all.find(|since| since.save == *base).map(|since| &since.pages)
    }

    /// From now on what changes after this round of a copy, which the VM need not stand for, is known as well. [`Changes::look`] was called.
    /// `base` is what the round builds upon, an earlier round or a save.
    ///
    /// # Errors
    /// When KVM refuses: then nothing can be built upon it.
    pub fn begin_round(
        &mut self,
        round: SaveId,
        base: Option<&SaveId>,
        memory: &GuestMemoryMmap,
        slot: impl Fn(usize, &GuestRegionMmap) -> u32,
        log: &impl Log,
    ) -> io::Result<()> {
        self.start_logs(memory, slot, log)?;
        let upon = match self.precopy.take() {
            Some(earlier) if base == Some(&earlier.since.save) => earlier.upon,
            _ => base.copied(),
        };
        self.precopy = Some(Precopy { upon, since: Since { save: round, pages: none(memory) } });
        Ok(())
    }

    /// What changes after this save need not be known, nor what changes after a copy that was made before it.
    pub fn end(&mut self) {
        if self.precopy.take().is_some() && self.since.is_empty() {
            self.is_idle = !self.logged.is_empty();
        }
    }

    /// Whether [`Changes::stop_logs`] has something to do.
    pub const fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// Ends logs that nobody wants, which takes KVM the longer the more memory there is: not while the VM stands.
    pub fn stop_logs(&mut self, memory: &GuestMemoryMmap, slot: impl Fn(usize, &GuestRegionMmap) -> u32, log: &impl Log) {
        if !std::mem::take(&mut self.is_idle) {
            return;
        }
        for (index, region) in memory.iter().enumerate() {
            // A block of memory that came since has none.
            if self.logged.contains(&(region.start_addr().0, region.len()))
                && let Err(error) = log.stop(slot(index, region), region)
            {
                eprintln!("what changes in memory goes on to be logged: {error}");
            }
        }
        self.logged.clear();
    }

    fn start_logs(&mut self, memory: &GuestMemoryMmap, slot: impl Fn(usize, &GuestRegionMmap) -> u32, log: &impl Log) -> io::Result<()> {
        self.is_idle = false;
        if self.logged.is_empty() {
            memory.iter().enumerate().try_for_each(|(index, region)| log.start(slot(index, region), region))?;
            // What was written before is in what is saved now.
            memory.iter().for_each(|region| ours(region).reset());
            self.logged = ranges(memory);
        }
        Ok(())
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
        if let Err(error) = self.start_logs(memory, slot, log) {
            eprintln!("the next snapshot will be a full one: what changes in memory cannot be logged: {error}");
            return;
        }
        let base = match self.precopy.take() {
            Some(precopy) if base == Some(&precopy.since.save) => precopy.upon,
            _ => base.copied(),
        };
        let latest = self.since.last().map(|since| since.save);
        let kept = base.or(latest);
        self.since.retain(|since| Some(since.save) == kept);
        debug_assert!(self.since.len() < KEPT);
        self.since.push(Since { save, pages: none(memory) });
    }
}

fn add(to: &mut [u64], more: &[u64]) {
    to.iter_mut().zip(more).filter(|(_, more)| **more != 0).for_each(|(to, more)| *to |= more);
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

        fn stop(&self, slot: u32, _: &GuestRegionMmap) -> io::Result<()> {
            self.logged.borrow_mut().retain(|logged| *logged != slot);
            Ok(())
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

    #[test]
    fn what_changes_while_memory_is_copied_is_known_after_each_round() {
        let (memory, log, mut changes) = (guest_memory(), Written::default(), Changes::default());
        memory.write_obj(1_u8, GuestAddress(0)).unwrap();
        changes.look(&memory, slot, &log);
        changes.begin_round([1; 16], None, &memory, slot, &log).unwrap();
        log.pages.borrow_mut().push((0, 3));
        changes.look(&memory, slot, &log);
        assert_eq!(pages(&changes, 1), [(0, 3)], "what was written before the first round is in it");
        changes.begin_round([2; 16], Some(&[1; 16]), &memory, slot, &log).unwrap();
        memory.write_obj(1_u8, GuestAddress(HIGH)).unwrap();
        changes.look(&memory, slot, &log);
        assert_eq!((pages(&changes, 2), changes.after(&[1; 16]).is_none()), (vec![(1, 0)], true));
        assert!(changes.known().is_empty(), "it is no save");
        changes.begin([3; 16], Some(&[2; 16]), &memory, slot, &log);
        assert_eq!((changes.known(), changes.after(&[2; 16]).is_none()), (vec![[3; 16]], true));

        // Upon a save: that one goes on to be known, whatever becomes of the copy and of what builds upon it.
        changes.look(&memory, slot, &log);
        changes.begin([4; 16], Some(&[3; 16]), &memory, slot, &log);
        changes.begin_round([5; 16], Some(&[3; 16]), &memory, slot, &log).unwrap();
        changes.begin_round([6; 16], Some(&[5; 16]), &memory, slot, &log).unwrap();
        log.pages.borrow_mut().push((0, 7));
        changes.look(&memory, slot, &log);
        assert_eq!([3, 4, 6].map(|save| pages(&changes, save)), [[(0, 7)], [(0, 7)], [(0, 7)]]);
        changes.begin([7; 16], Some(&[6; 16]), &memory, slot, &log);
        assert_eq!(changes.known(), [[3; 16], [7; 16]]);
        // One that nobody came back for is dropped by the next.
        changes.begin_round([8; 16], None, &memory, slot, &log).unwrap();
        changes.begin_round([9; 16], None, &memory, slot, &log).unwrap();
        assert!(changes.after(&[8; 16]).is_none());
        changes.end();
        assert!(!changes.is_idle(), "later saves can be built upon the earlier ones");
    }

    #[test]
    fn logs_end_when_nobody_wants_them() {
        let (memory, log, mut changes) = (guest_memory(), Written::default(), Changes::default());
        changes.end();
        assert!(!changes.is_idle());
        changes.begin_round([1; 16], None, &memory, slot, &log).unwrap();
        changes.end();
        assert!(changes.is_idle());
        // Somebody was faster.
        changes.look(&memory, slot, &log);
        changes.begin_round([2; 16], None, &memory, slot, &log).unwrap();
        changes.stop_logs(&memory, slot, &log);
        assert_eq!((changes.is_idle(), log.logged.borrow().len()), (false, 2));
        changes.end();
        changes.end();
        // A block that came since has no log, and one that has gone needs none.
        let (smaller, _) = memory.remove_region(GuestAddress(HIGH), memory.iter().last().unwrap().len()).unwrap();
        changes.stop_logs(&smaller, slot, &log);
        assert_eq!((changes.is_idle(), log.logged.borrow().clone()), (false, vec![1]));
        log.logged.borrow_mut().clear();
        changes.begin_round([3; 16], None, &memory, slot, &log).unwrap();
        assert_eq!(*log.logged.borrow(), [0, 1]);
    }
}
