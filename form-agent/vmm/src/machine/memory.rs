//! Memory that the VM gets while it runs, and gives back. A VM that never does has no device for it.

use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::{Machine, MachineError, devices};
use crate::control::MemoryMetrics;
use crate::layout::MIB;
use crate::virtio::mem::BLOCK;

const STEP_MIB: u64 = BLOCK / MIB;

impl Machine {
    /// What it booted with.
    pub(super) fn booted_mib(&self) -> u64 {
        let memory = self.memory.memory();
        let booted = memory.iter().filter(|region| region.start_addr().0 < self.surroundings.mmio64_start);
        booted.map(GuestMemoryRegion::len).sum::<u64>() / MIB
    }

    /// The guest should have `wanted_mib` in all: it is told, and takes or gives as it can.
    ///
    /// # Errors
    /// When it cannot have so much or so little while it runs, or there is no place for the device.
    pub fn set_memory(&mut self, wanted_mib: u64) -> Result<(), MachineError> {
        let MemoryMetrics { booted_mib, step_mib, most_mib, .. } = self.memory_metrics();
        let more = wanted_mib.checked_sub(booted_mib).filter(|more| more.is_multiple_of(step_mib) && wanted_mib <= most_mib);
        let more = more.and_then(|more| u32::try_from(more / step_mib).ok());
        let more = more.ok_or(MachineError::Resize { wanted: wanted_mib, booted: booted_mib, step: step_mib, most: most_mib })?;
        let io = |source| MachineError::Io { context: "tell the guest how much memory it should have", source };
        if let Some(handle) = &self.handles.memory {
            return handle.want(more).map_err(io);
        }
        if more == 0 {
            return Ok(());
        }
        let slot = self.pci.free_slot().ok_or(MachineError::Slots)?;
        // Before there is any more of it.
        self.surroundings.kernel.forbid();
        self.handles.vhost_networks().iter().for_each(|id| self.restart(id));
        let device = devices::memory(self.surroundings.growth, &self.vm, &self.memory);
        let handle = device.handle();
        handle.want(more).map_err(io)?;
        let device = self.surroundings.place(&self.pci, slot, Box::new(device))?;
        self.devices.push(device);
        self.handles.memory = Some(handle);
        self.announce(slot)
    }

    /// Where memory that is added begins, and how many blocks there can be.
    pub(super) fn growth(&self) -> (u64, u32) {
        let growth = self.handles.memory.as_ref().map_or(self.surroundings.growth, |handle| handle.region());
        (growth.start, growth.blocks)
    }

    pub(super) fn memory_metrics(&self) -> MemoryMetrics {
        let booted_mib = self.booted_mib();
        let (_, most) = self.growth();
        let blocks = |count: u32| booted_mib + u64::from(count) * STEP_MIB;
        let (wanted, plugged) = self.handles.memory.as_ref().map_or((0, 0), |handle| (handle.wanted(), handle.plugged()));
        MemoryMetrics { booted_mib, step_mib: STEP_MIB, most_mib: blocks(most), wanted_mib: blocks(wanted), present_mib: blocks(plugged) }
    }
}
