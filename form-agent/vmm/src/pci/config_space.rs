//! The configuration space of an endpoint (type 0 header) with one 64-bit memory BAR and a list of capabilities.

/// Conventional configuration space; the extended part behind it reads as zeros.
pub const SIZE: usize = 256;
pub const VENDOR: usize = 0x00;
pub const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
pub const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2C;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const STATUS_CAPABILITIES: u8 = 1 << 4;
pub const COMMAND_MEMORY: u16 = 1 << 1;
pub const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const BAR_MEMORY_64_PREFETCHABLE: u32 = 0b1100;

/// What an endpoint is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass and programming interface, as `0xCCSSPP`.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// Bits that the guest may write.
    writable: [u8; SIZE],
    next_capability: usize,
    last_capability: Option<usize>,
    bar_size: u64,
}

impl ConfigSpace {
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut space =
            ConfigSpace { bytes: [0; SIZE], writable: [0; SIZE], next_capability: FIRST_CAPABILITY, last_capability: None, bar_size: 0 };
        space.put(VENDOR, &identity.vendor.to_le_bytes());
        space.put(VENDOR + 2, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE).to_le_bytes());
        // Cache line size and interrupt line are scratch registers for the guest.
        space.allow(0x0C, &[0xFF]);
        space.allow(0x3C, &[0xFF]);
        space
    }

    /// Makes BAR 0 and 1 a 64-bit memory BAR of `size` bytes (a power of two, at least 4096) at `address`.
    pub fn set_bar(&mut self, address: u64, size: u64) {
        debug_assert!(size.is_power_of_two() && size >= 4096 && address.is_multiple_of(size));
        self.bar_size = size;
        let value = address | u64::from(BAR_MEMORY_64_PREFETCHABLE);
        self.put(BAR0, &value.to_le_bytes());
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// The address in the BAR, whether or not memory is switched on.
    #[must_use]
    pub fn bar_address(&self) -> u64 {
        let low = u64::from(self.read(BAR0 as u16) & !0xF);
        low | u64::from(self.read(BAR0 as u16 + 4)) << 32
    }

    /// Start and length of the BAR's memory while it is switched on.
    #[must_use]
    pub fn memory(&self) -> Option<(u64, u64)> {
        let enabled = self.command() & COMMAND_MEMORY != 0 && self.bar_size > 0;
        enabled.then(|| (self.bar_address(), self.bar_size))
    }

    #[must_use]
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// Adds a capability; `body` is what follows id and next pointer, `writable` the bits of it the guest may write. Returns its
    /// offset. A device's capabilities are fixed by this program; more than fit is an error in it.
    ///
    /// # Panics
    /// When the capabilities do not fit into configuration space.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= SIZE, "the capabilities of a device do not fit");
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        match self.last_capability {
            Some(last) => self.bytes[last + 1] = at as u8,
            None => {
                self.bytes[CAPABILITIES] = at as u8;
                self.bytes[STATUS] |= STATUS_CAPABILITIES;
            }
        }
        self.last_capability = Some(at);
        self.next_capability = end.next_multiple_of(4);
        at
    }

    #[must_use]
    pub fn read(&self, register: u16) -> u32 {
        let at = usize::from(register & !3);
        match self.bytes.get(at..at + 4) {
            Some(bytes) => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            None => 0,
        }
    }

    /// Writes what is writable of `data`.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, value) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
    }

    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes the writable bits of saved bytes; the rest stays as this program makes it.
    ///
    /// # Errors
    /// When the saved bytes are another device's.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), &'static str> {
        if saved.len() != SIZE {
            return Err("configuration space of another size");
        }
        let fixed_part_differs = |((saved, ours), writable): ((&u8, &u8), &u8)| (saved ^ ours) & !writable != 0;
        if saved.iter().zip(&self.bytes).zip(&self.writable).any(fixed_part_differs) {
            return Err("configuration space of another device");
        }
        self.bytes.copy_from_slice(saved);
        Ok(())
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1AF4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x40,
        });
        space.set_bar(0x40_0000_0000, 0x8000);
        space
    }

    #[test]
    fn identity_and_class_are_read_only() {
        let mut space = space();
        for register in [0x00u16, 0x08, 0x2C] {
            let before = space.read(register);
            space.write(register, &[0xFF; 4]);
            assert_eq!(space.read(register), before);
        }
        assert_eq!(space.read(0), 0x1042_1AF4);
        assert_eq!(space.read(8), 0x0180_0001);
    }

    #[test]
    fn the_guest_learns_the_size_of_the_bar() {
        let mut space = space();
        assert_eq!(space.bar_address(), 0x40_0000_0000);
        space.write(0x10, &[0xFF; 4]);
        space.write(0x14, &[0xFF; 4]);
        assert_eq!(space.read(0x10), !(0x8000u32 - 1) | 0b1100);
        assert_eq!(space.read(0x14), u32::MAX);
        space.write(0x10, &0x1234_8000u32.to_le_bytes());
        space.write(0x14, &[0; 4]);
        assert_eq!(space.memory(), None);
        space.write(0x04, &[2, 0]);
        assert_eq!(space.memory(), Some((0x1234_8000, 0x8000)));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0; 10], &[]);
        let second = space.add_capability(9, &[14; 12], &[]);
        assert_eq!(space.read(0x34) as usize, first);
        assert_eq!(space.read(first as u16).to_le_bytes()[..2], [0x11, second as u8]);
        assert_eq!(space.read(second as u16).to_le_bytes()[..2], [9, 0]);
        assert_ne!(space.read(4) & (1 << 20), 0);
    }

    #[test]
    fn offsets_outside_read_zero_and_write_nothing() {
        let mut space = space();
        space.write(0xFFE, &[1, 2]);
        space.write(255, &[1, 2, 3, 4]);
        assert_eq!(space.read(256), 0);
        assert_eq!(space.read(0xFFC), 0);
    }

    #[test]
    fn state_of_another_device_is_refused() {
        let mut space = space();
        let mut saved = space.bytes().to_vec();
        saved[0] = 0;
        assert!(space.restore(&saved).is_err());
        assert!(space.restore(&[]).is_err());
        let mut saved = space.bytes().to_vec();
        saved[4] = 2;
        space.restore(&saved).unwrap();
        assert!(space.memory().is_some());
    }
}
