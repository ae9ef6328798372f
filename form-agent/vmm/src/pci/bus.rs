//! The root bus: configuration accesses by ECAM and by ports, and memory accesses to the devices' BARs.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::PciDevice;
use super::config_space::{ConfigSpace, Identity};
use crate::layout::ECAM_SIZE;

pub const SLOTS: usize = 32;
/// Nobody there.
const ABSENT: u32 = u32::MAX;
const HOST_BRIDGE: Identity =
    Identity { vendor: 0x1B36, device: 0x0008, revision: 0, class: 0x06_00_00, subsystem_vendor: 0, subsystem: 0 };

type Device = Arc<Mutex<dyn PciDevice>>;

struct Window {
    start: u64,
    end: u64,
    slot: usize,
}

pub struct PciBus {
    slots: RwLock<Vec<Option<Device>>>,
    /// Which device's memory lies where; kept in step by configuration writes.
    windows: RwLock<Vec<Window>>,
    /// The last value written to the address port.
    address: Mutex<u32>,
}

/// The host bridge: only its identity matters.
struct HostBridge(ConfigSpace);

impl PciDevice for HostBridge {
    fn read_config(&mut self, register: u16) -> u32 {
        self.0.read(register)
    }
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn memory(&self) -> Option<(u64, u64)> {
        None
    }
    fn read_memory(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn write_memory(&mut self, _offset: u64, _data: &[u8]) {}
}

impl Default for PciBus {
    fn default() -> Self {
        let mut slots: Vec<Option<Device>> = (0..SLOTS).map(|_| None).collect();
        slots[0] = Some(Arc::new(Mutex::new(HostBridge(ConfigSpace::new(HOST_BRIDGE)))));
        PciBus { slots: RwLock::new(slots), windows: RwLock::new(Vec::new()), address: Mutex::new(0) }
    }
}

impl PciBus {
    /// The first free slot; `None` when all are taken.
    #[must_use]
    pub fn free_slot(&self) -> Option<usize> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).iter().position(Option::is_none)
    }

    /// Puts `device` into `slot`; `None` when there is no such slot, or it is taken.
    #[must_use]
    pub fn add(&self, slot: usize, device: Device) -> Option<()> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let place = slots.get_mut(slot).filter(|place| place.is_none())?;
        *place = Some(device);
        drop(slots);
        self.refresh(slot);
        Some(())
    }

    /// From now on the slot is empty. An access that has begun goes on to its end.
    pub fn remove(&self, slot: usize) {
        if let Some(place) = self.slots.write().unwrap_or_else(PoisonError::into_inner).get_mut(slot) {
            *place = None;
        }
        self.refresh(slot);
    }

    /// The address port, to be saved.
    #[must_use]
    pub fn address(&self) -> u32 {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_address(&self, address: u32) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// Reads from the ECAM window.
    pub fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        self.read_config(offset & (ECAM_SIZE - 1), data);
    }

    pub fn write_ecam(&self, offset: u64, data: &[u8]) {
        self.write_config(offset & (ECAM_SIZE - 1), data);
    }

    /// Reads from the ports 0xCF8 to 0xCFF; `port` counts from the first.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match port {
            0..4 => {
                let bytes = self.address().to_le_bytes();
                for (index, byte) in data.iter_mut().enumerate() {
                    *byte = bytes.get(usize::from(port) + index).copied().unwrap_or(0xFF);
                }
            }
            _ => match self.port_target(port) {
                Some(target) => self.read_config(target, data),
                None => data.fill(0xFF),
            },
        }
    }

    pub fn write_port(&self, port: u16, data: &[u8]) {
        match port {
            0 if data.len() == 4 => {
                self.set_address(u32::from_le_bytes([data[0], data[1], data[2], data[3]]));
            }
            // Narrow writes to the address port mean other devices (0xCF9 is a reset register on PCs).
            0..4 => {}
            _ => {
                if let Some(target) = self.port_target(port) {
                    self.write_config(target, data);
                }
            }
        }
    }

    /// Reads device memory; `false` when no device has memory there.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                lock(&device).read_memory(offset, data);
                true
            }
            None => false,
        }
    }

    pub fn write_memory(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                lock(&device).write_memory(offset, data);
                true
            }
            None => false,
        }
    }

    /// The ECAM offset that the address port names, with the low bits of the data port.
    fn port_target(&self, port: u16) -> Option<u64> {
        let address = self.address();
        if address & (1 << 31) == 0 {
            return None;
        }
        let (bus, device_function, register) = ((address >> 16) & 0xFF, (address >> 8) & 0xFF, address & 0xFC);
        Some(u64::from(bus) << 20 | u64::from(device_function) << 12 | u64::from(register) | u64::from(port & 3))
    }

    fn read_config(&self, target: u64, data: &mut [u8]) {
        let value = match self.function(target) {
            Some((_, device)) => lock(&device).read_config((target & 0xFFC) as u16),
            None => ABSENT,
        };
        let skip = (target & 3) as usize;
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = value.to_le_bytes().get(skip + index).copied().unwrap_or(0xFF);
        }
    }

    fn write_config(&self, target: u64, data: &[u8]) {
        let fits = (target & 3) as usize + data.len() <= 4;
        if let (true, Some((slot, device))) = (fits, self.function(target)) {
            lock(&device).write_config((target & 0xFFF) as u16, data);
            self.refresh(slot);
        }
    }

    /// The device behind an ECAM offset: bus 0, function 0 only.
    fn function(&self, target: u64) -> Option<(usize, Device)> {
        let (bus, slot, function) = (target >> 20, (target >> 15) as usize & 31, (target >> 12) & 7);
        if bus != 0 || function != 0 {
            return None;
        }
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        Some((slot, slots.get(slot)?.clone()?))
    }

    fn find(&self, address: u64, length: usize) -> Option<(Device, u64)> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        let window = windows.iter().find(|window| address >= window.start && address < window.end)?;
        if window.end - address < length as u64 {
            return None;
        }
        let (slot, offset) = (window.slot, address - window.start);
        drop(windows);
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        Some((slots.get(slot)?.clone()?, offset))
    }

    /// Looks again where the memory of the device in `slot` lies. Called after everything that may move it.
    pub fn refresh(&self, slot: usize) {
        let device = self.slots.read().unwrap_or_else(PoisonError::into_inner).get(slot).cloned().flatten();
        let memory = device.and_then(|device| lock(&device).memory());
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        let present = windows.iter().position(|window| window.slot == slot);
        match (present, memory) {
            (Some(at), Some((start, size))) if windows[at].start == start && windows[at].end - start == size => {}
            (at, memory) => {
                if let Some(at) = at {
                    windows.swap_remove(at);
                }
                if let Some((start, end)) = memory.and_then(|(start, size)| Some((start, start.checked_add(size)?))) {
                    windows.push(Window { start, end, slot });
                }
            }
        }
    }
}

fn lock(device: &Device) -> std::sync::MutexGuard<'_, dyn PciDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Writes = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

    struct Probe {
        config: ConfigSpace,
        written: Writes,
    }

    impl PciDevice for Probe {
        fn read_config(&mut self, register: u16) -> u32 {
            self.config.read(register)
        }
        fn write_config(&mut self, offset: u16, data: &[u8]) {
            self.config.write(offset, data);
        }
        fn memory(&self) -> Option<(u64, u64)> {
            self.config.memory()
        }
        fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write_memory(&mut self, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn bus() -> (PciBus, Writes) {
        let bus = PciBus::default();
        let mut config = ConfigSpace::new(Identity { device: 7, ..HOST_BRIDGE });
        config.set_bar(0x10_0000, 0x1000);
        let written = Arc::new(Mutex::new(Vec::new()));
        assert_eq!(bus.free_slot(), Some(1));
        bus.add(1, Arc::new(Mutex::new(Probe { config, written: Arc::clone(&written) }))).unwrap();
        (bus, written)
    }

    fn ecam(slot: u64, register: u64) -> u64 {
        slot << 15 | register
    }

    #[test]
    fn ports_and_ecam_show_the_same_device() {
        let (bus, _) = bus();
        let mut by_ecam = [0u8; 4];
        bus.read_ecam(ecam(1, 0), &mut by_ecam);
        bus.write_port(0, &(0x8000_0000u32 | 1 << 11).to_le_bytes());
        let mut by_port = [0u8; 4];
        bus.read_port(4, &mut by_port);
        assert_eq!(by_port, by_ecam);
        let mut device = [0u8; 2];
        bus.read_port(6, &mut device);
        assert_eq!(device, [7, 0]);
        bus.read_port(0, &mut by_port);
        assert_eq!(u32::from_le_bytes(by_port), 0x8000_0800);
    }

    #[test]
    fn empty_slots_other_functions_and_other_buses_are_absent() {
        let (bus, _) = bus();
        for target in [ecam(2, 0), ecam(31, 0), ecam(1, 0) | 1 << 12] {
            let mut data = [0u8; 4];
            bus.read_ecam(target, &mut data);
            assert_eq!(data, [0xFF; 4]);
        }
        bus.write_port(0, &(0x8000_0000u32 | 1 << 16 | 1 << 11).to_le_bytes());
        let mut data = [0u8; 4];
        bus.read_port(4, &mut data);
        assert_eq!(data, [0xFF; 4]);
        // Without the enable bit the data port is silent.
        bus.write_port(0, &(1u32 << 11).to_le_bytes());
        bus.read_port(4, &mut data);
        assert_eq!(data, [0xFF; 4]);
    }

    #[test]
    fn memory_follows_the_bar_and_the_command_register() {
        let (bus, written) = bus();
        let mut data = [0u8; 4];
        assert!(!bus.read_memory(0x10_0008, &mut data));
        bus.write_ecam(ecam(1, 4), &[2, 0]);
        assert!(bus.read_memory(0x10_0008, &mut data));
        assert_eq!(data, [8; 4]);
        bus.write_ecam(ecam(1, 0x10), &0x20_0000u32.to_le_bytes());
        assert!(!bus.write_memory(0x10_0000, &[1]));
        assert!(bus.write_memory(0x20_0FFF, &[1]));
        assert!(!bus.write_memory(0x20_0FFF, &[1, 2]), "an access across the end of the BAR");
        assert_eq!(*written.lock().unwrap(), [(0xFFF, vec![1])]);
        bus.write_ecam(ecam(1, 4), &[0, 0]);
        assert!(!bus.write_memory(0x20_0000, &[1]));
    }

    #[test]
    fn a_device_that_is_removed_is_reached_no_more_and_leaves_its_slot() {
        let (bus, written) = bus();
        let probe = || Arc::new(Mutex::new(Probe { config: ConfigSpace::new(HOST_BRIDGE), written: Arc::clone(&written) }));
        assert!(bus.add(1, probe()).is_none(), "taken");
        assert!(bus.add(SLOTS, probe()).is_none(), "no such slot");
        bus.write_ecam(ecam(1, 4), &[2, 0]);
        assert!(bus.write_memory(0x10_0000, &[1]));
        bus.remove(1);
        bus.remove(SLOTS);
        assert!(!bus.write_memory(0x10_0000, &[1]));
        let mut data = [0u8; 4];
        bus.read_ecam(ecam(1, 0), &mut data);
        assert_eq!(data, [0xFF; 4]);
        assert_eq!(bus.free_slot(), Some(1));
        bus.add(5, probe()).unwrap();
        bus.read_ecam(ecam(5, 0), &mut data);
        assert_ne!(data, [0xFF; 4]);
        assert_eq!(bus.free_slot(), Some(1));
    }

    #[test]
    fn a_bar_at_the_end_of_the_address_space_is_harmless() {
        let (bus, _) = bus();
        bus.write_ecam(ecam(1, 0x10), &[0xFF; 4]);
        bus.write_ecam(ecam(1, 0x14), &[0xFF; 4]);
        bus.write_ecam(ecam(1, 4), &[2, 0]);
        assert!(!bus.write_memory(u64::MAX, &[1, 2]));
    }
}
