//! Disks that come, grow and go while the VM runs, and limits that change.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Machine, MachineError, devices, lock};
use crate::config::{DiskConfig, DiskLimits};
use crate::descriptors::Descriptors;
use crate::platform::power::EVENT_PCI;

impl Machine {
    /// Puts a disk, whose files are among `fds`, into a free slot, and tells the guest.
    ///
    /// # Errors
    /// When there is a device of this id, no slot is free, or the disk cannot be opened.
    pub fn plug(&mut self, disk: &DiskConfig, fds: &mut Descriptors) -> Result<(), MachineError> {
        if self.devices.iter().any(|device| lock(&device.device).id() == disk.id) {
            return Err(MachineError::Exists(disk.id.clone()));
        }
        let slot = self.pci.free_slot().ok_or(MachineError::Slots)?;
        let block = devices::disk(disk, fds)?;
        self.handles.add_disk(&block);
        match self.surroundings.place(&self.pci, slot, Box::new(block)) {
            Ok(device) => self.devices.push(device),
            Err(error) => {
                self.handles.remove_disk(&disk.id);
                return Err(error);
            }
        }
        self.announce(slot)
    }

    /// Tells the guest of the device in `slot`.
    pub(super) fn announce(&self, slot: usize) -> Result<(), MachineError> {
        self.hotplug.announce(slot);
        self.tell()
    }

    /// Asks the guest for the disk `id`; `gone` is closed when it has let it go.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn unplug(&mut self, id: &str, gone: OwnedFd) -> Result<(), MachineError> {
        let slot = self.disk(id)?.slot;
        self.leaving.push((slot, gone));
        self.hotplug.ask(slot);
        self.tell()
    }

    /// Makes the disk `id` larger, and tells its driver.
    ///
    /// # Errors
    /// When there is no such disk, it is larger already, or its storage cannot grow.
    pub fn grow(&self, id: &str, size_bytes: u64) -> Result<(), MachineError> {
        let grown = lock(&self.disk(id)?.device).grow(size_bytes);
        grown.map_err(|source| MachineError::Grow { id: id.to_owned(), source })
    }

    /// # Errors
    /// When there is no such disk.
    pub fn limit_disk(&self, id: &str, limits: DiskLimits) -> Result<(), MachineError> {
        let known = self.handles.limit_disk(id, limits);
        known.ok_or_else(|| MachineError::NoDisk(id.to_owned()))
    }

    /// # Errors
    /// When there is no such network interface.
    pub fn limit_network(&self, id: &str, bytes_per_second: Option<NonZeroU64>) -> Result<(), MachineError> {
        let known = self.handles.limit_network(id, bytes_per_second);
        known.ok_or_else(|| MachineError::NoNetwork(id.to_owned()))
    }

    fn disk(&self, id: &str) -> Result<&super::Device, MachineError> {
        let none = || MachineError::NoDisk(id.to_owned());
        let known = Some(id).filter(|id| self.handles.has_disk(id)).ok_or_else(none)?;
        self.devices.iter().find(|device| lock(&device.device).id() == known).ok_or_else(none)
    }

    fn tell(&self) -> Result<(), MachineError> {
        self.power.raise(EVENT_PCI).map_err(|source| MachineError::Io { context: "raise an interrupt", source })
    }

    /// Ends the devices that the guest let go, and holds its vCPUs. Main thread only: it ends their threads.
    pub fn end_ejected(&mut self) {
        // Before what it counts is taken: what comes after that raises it again.
        self.park_ejected_vcpus();
        for slot in self.hotplug.take_gone() {
            let Some(at) = self.devices.iter().position(|device| device.slot == slot) else { continue };
            let device = self.devices.remove(at).device;
            let id = {
                let mut device = lock(&device);
                device.pause();
                device.id().to_owned()
            };
            self.handles.remove_disk(&id);
            // The bus has forgotten it, but a vCPU may be in the middle of an access: the last one to drop it closes its files, which
            // only this thread may.
            while Arc::strong_count(&device) > 1 {
                std::thread::yield_now();
            }
            drop(device);
            self.leaving.retain(|(leaving, _)| *leaving != slot);
        }
    }
}
