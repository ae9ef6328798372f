//! Writing a paused VM to files: all of its memory, or what has changed since an earlier save.

use std::fs::File;
use std::sync::MutexGuard;

use vm_memory::{GuestAddressSpace, GuestMemoryRegion};

use super::state::MachineState;
use super::{Device, Machine, MachineError, devices, lock, random, saved};
use crate::control::{SaveHow, VmState};
use crate::memory::aside::{self, Aside, Round};
use crate::memory::chunks::FIRST_SLOT;
use crate::memory::image::{Onto, SaveId};
use crate::memory::{GuestRegionMmap, MemoryError, patch};
use crate::virtio::mem::BLOCK;
use crate::virtio::pci::VirtioPci;

/// How a VM was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Only what has changed since the save that the file is a copy of.
    pub incremental: bool,
    /// The bytes of pages written, once they are.
    pub written: Option<u64>,
}

/// No block of memory comes or goes: logs begin and end by the slots that there are, and one that has gone would come back.
struct StillMemory<'a> {
    device: Option<MutexGuard<'a, VirtioPci>>,
    runs: bool,
}

impl<'a> StillMemory<'a> {
    fn new(devices: &'a [Device], state: VmState) -> Self {
        let mut device = devices.iter().map(|device| lock(&device.device)).find(|device| device.id() == devices::MEMORY);
        if let Some(device) = &mut device {
            device.pause();
        }
        Self { device, runs: state == VmState::Running }
    }
}

impl Drop for StillMemory<'_> {
    fn drop(&mut self) {
        if let Some(device) = self.device.as_mut().filter(|_| self.runs) {
            device.activate();
        }
    }
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
        } else {
            self.changes.end();
        }
    }

    /// Copies memory to a file while the VM runs, or what has changed since the save or the earlier round that the file is a copy of: so that little is
    /// left to be written when the VM stands, by a save upon this file. It is written by a thread, as [`aside::precopy`] says.
    ///
    /// # Errors
    /// When KVM cannot log what changes, or there is no thread.
    pub fn precopy(&mut self, to: Aside, onto: bool) -> Result<Saved, MachineError> {
        let failed = |source| MachineError::Io { context: "copy memory while the VM runs", source };
        let round = random()?;
        let base = self.base(&to.file, SaveHow { onto, track: true });
        let what = base.and_then(|base| self.changes.after(&base)).cloned();
        let what = what.map_or_else(|| Round::All(self.touched.clone()), Round::Changed);
        let slots = self.slots();
        let begun = {
            let _still = StillMemory::new(&self.devices, self.state());
            self.changes.begin_round(round, base.as_ref(), &self.memory.memory(), slots, &*self.vm)
        };
        begun.map_err(failed)?;
        if !self.surroundings.kernel.notes() {
            self.surroundings.kernel.must_note();
            self.handles.vhost_networks().iter().for_each(|id| self.restart(id));
        }
        // Not before everybody notes what they write.
        aside::precopy((*self.memory.memory()).clone(), round, what, to).map_err(failed)?;
        Ok(Saved { incremental: base.is_some(), written: None })
    }

    /// No save will build upon what was copied while the VM ran.
    pub fn leave_copy(&mut self) {
        self.changes.end();
    }

    /// Whether [`Machine::settle`] has something to do.
    #[must_use]
    pub const fn is_unsettled(&self) -> bool {
        self.changes.is_idle()
    }

    /// Does what could wait after a save: ends logs of memory that nobody wants any more.
    pub fn settle(&mut self) {
        let slots = self.slots();
        let _still = StillMemory::new(&self.devices, self.state());
        self.changes.stop_logs(&self.memory.memory(), slots, &*self.vm);
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

    /// As [`Machine::save_to`], but only the state is whole when this has returned; the memory is written as [`aside::save_aside`] says, and the
    /// VM can go on.
    ///
    /// # Errors
    /// As [`Machine::save_to`], and when the process cannot be copied.
    pub fn save_aside(&mut self, state: &File, memory: Aside, how: SaveHow) -> Result<Saved, MachineError> {
        let saved = self.save()?;
        let base = self.base(&memory.file, how);
        saved::write(state, &saved)?;
        let onto = base.and_then(|base| self.changes.after(&base)).map_or(Onto::New, Onto::Earlier);
        aside::save_aside(&self.memory.memory(), &saved.save, onto, memory)
            .map_err(|source| MachineError::Io { context: "copy the VM process", source })?;
        self.begin(&saved, base.as_ref(), how);
        Ok(Saved { incremental: base.is_some(), written: None })
    }
}
