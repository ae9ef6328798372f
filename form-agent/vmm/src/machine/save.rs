//! Writing a paused VM to files: all of its memory, or what has changed since an earlier save.

use std::fs::File;
use std::os::fd::OwnedFd;

use vm_memory::{GuestAddressSpace, GuestMemoryRegion};

use super::state::MachineState;
use super::{Machine, MachineError, saved};
use crate::control::SaveHow;
use crate::memory::chunks::FIRST_SLOT;
use crate::memory::image::{self, Onto, SaveId};
use crate::memory::{GuestRegionMmap, MemoryError, patch};
use crate::virtio::mem::BLOCK;

/// How a VM was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Only what has changed since the save that the file is a copy of.
    pub incremental: bool,
    /// The bytes of pages written, once they are.
    pub written: Option<u64>,
}

impl Machine {
    /// The saves that the next one can build upon, the latest last.
    #[must_use]
    pub fn saves(&self) -> Vec<SaveId> {
        self.changes.known()
    }

    /// Which slot of KVM's a region of guest memory has.
    fn slots(&self) -> impl Fn(usize, &GuestRegionMmap) -> u32 + use<> {
        let (growth, _) = self.growth();
        move |index, region| match region.start_addr().0.checked_sub(growth) {
            Some(above) => FIRST_SLOT + (above / BLOCK) as u32,
            None => index as u32,
        }
    }

    /// The save that the memory in `file` can be built upon, and what has changed since: as of this instant.
    fn base(&mut self, file: &File, how: SaveHow) -> Option<SaveId> {
        let (memory, slots) = (self.memory.memory(), self.slots());
        self.changes.look(&memory, slots, &*self.vm);
        if !how.onto {
            return None;
        }
        patch::base(&memory, file).filter(|base| self.changes.after(base).is_some())
    }

    /// What changes after this save is known from now on.
    fn begin(&mut self, save: &MachineState, base: Option<&SaveId>, how: SaveHow) {
        if how.track {
            let (memory, slots) = (self.memory.memory(), self.slots());
            self.changes.begin(save.save, base, &memory, slots, &*self.vm);
            self.surroundings.kernel.must_note();
        }
    }

    /// Writes state and memory to two files. Call only while paused. Disks are the caller's to copy, before the VM goes on. Each file is
    /// whole only when this has returned; the state is written last.
    ///
    /// # Errors
    /// When KVM does not give a part of it, or a file cannot be written; the VM can go on.
    pub fn save_to(&mut self, state: &File, memory: &File, how: SaveHow) -> Result<Saved, MachineError> {
        let saved = self.save()?;
        // After the vCPUs, in whose name KVM writes to guest memory.
        let base = self.base(memory, how);
        let onto = base.and_then(|base| self.changes.after(&base)).map_or(Onto::New, Onto::Earlier);
        let written = onto.save(&self.memory.memory(), memory, &saved.save).map_err(MemoryError::Image)?;
        saved::write(state, &saved)?;
        self.begin(&saved, base.as_ref(), how);
        Ok(Saved { incremental: base.is_some(), written: Some(written) })
    }

    /// As [`Machine::save_to`], but only the state is whole when this has returned; the memory is written by a copy of the process, as
    /// [`image::save_aside`] says, and the VM can go on.
    ///
    /// # Errors
    /// As [`Machine::save_to`], and when the process cannot be copied.
    pub fn save_aside(&mut self, state: &File, memory: &File, whole: &OwnedFd, how: SaveHow) -> Result<Saved, MachineError> {
        let saved = self.save()?;
        let base = self.base(memory, how);
        saved::write(state, &saved)?;
        let onto = base.and_then(|base| self.changes.after(&base)).map_or(Onto::New, Onto::Earlier);
        image::save_aside(&self.memory.memory(), memory, &saved.save, onto, whole, how.is_any())
            .map_err(|source| MachineError::Io { context: "copy the VM process", source })?;
        self.begin(&saved, base.as_ref(), how);
        Ok(Saved { incremental: base.is_some(), written: None })
    }
}
