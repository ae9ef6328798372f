//! Disks and network interfaces that come and go while the VM runs, disks that grow, and limits that change.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Machine, MachineError, devices, lock};
use crate::config::{DiskConfig, DiskLimits, NetworkConfig};
use crate::descriptors::Descriptors;
use crate::platform::power::EVENT_PCI;
use crate::virtio::VirtioDevice;

impl Machine {
    /// Puts a disk, whose files are among `fds`, into a free slot, and tells the guest.
    ///
    /// # Errors
    /// When there is a device of this id, no slot is free, or the disk cannot be opened.
    pub fn plug(&mut self, disk: &DiskConfig, fds: &mut Descriptors) -> Result<(), MachineError> {
        self.has_room(&disk.id)?;
        let block = devices::disk(disk, fds)?;
        self.handles.add_disk(&block);
        self.insert(Box::new(block))
    }

    /// Puts a network interface, whose tap is among `fds`, into a free slot, and tells the guest.
    ///
    /// # Errors
    /// When there is a device of this id, no slot is free, or the descriptor is no such tap.
    pub fn plug_network(&mut self, network: &NetworkConfig, fds: &mut Descriptors) -> Result<(), MachineError> {
        self.has_room(&network.id)?;
        let net = devices::network(network, fds)?;
        self.handles.add_network(&net);
        self.insert(Box::new(net))
    }

    fn has_room(&self, id: &str) -> Result<usize, MachineError> {
        if self.devices.iter().any(|device| lock(&device.device).id() == id) {
            return Err(MachineError::Exists(id.to_owned()));
        }
        self.pci.free_slot().ok_or(MachineError::Slots)
    }

    /// A device whose handle is kept already.
    fn insert(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let id = device.id().to_owned();
        let placed = self.has_room(&id).and_then(|slot| self.surroundings.place(&self.pci, slot, device));
        match placed {
            Ok(device) => {
                let slot = device.slot;
                self.devices.push(device);
                self.announce(slot)
            }
            Err(error) => {
                self.handles.remove(&id);
                Err(error)
            }
        }
    }

    /// Tells the guest of the device in `slot`.
    pub(super) fn announce(&self, slot: usize) -> Result<(), MachineError> {
        self.hotplug.announce(slot);
        self.tell()
    }

    /// Asks the guest for the disk or network interface `id`; `gone` is closed when it has let it go.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn unplug(&mut self, id: &str, gone: OwnedFd) -> Result<(), MachineError> {
        let is_one = self.handles.has_disk(id) || self.handles.has_network(id);
        let slot = self.device(id).filter(|_| is_one).ok_or_else(|| MachineError::NoDevice(id.to_owned()))?.slot;
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
        known.ok_or_else(|| MachineError::NoNetwork(id.to_owned()))?;
        // The host's kernel knows no limits: the interface is ours as long as it has one.
        let is_limited = bytes_per_second.is_some();
        if self.handles.changes_carrier(id, is_limited) && (is_limited || self.surroundings.kernel.may()) {
            self.restart(id);
        }
        Ok(())
    }

    /// Stops a device and starts it again; one of a paused VM starts when that goes on.
    pub(super) fn restart(&self, id: &str) {
        let device = self.device(id).filter(|_| !self.paused.load(Ordering::Acquire));
        if let Some(device) = device {
            lock(&device.device).restart();
        }
    }

    fn disk(&self, id: &str) -> Result<&super::Device, MachineError> {
        self.device(id).filter(|_| self.handles.has_disk(id)).ok_or_else(|| MachineError::NoDisk(id.to_owned()))
    }

    fn device(&self, id: &str) -> Option<&super::Device> {
        self.devices.iter().find(|device| lock(&device.device).id() == id)
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
            self.handles.remove(&id);
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
