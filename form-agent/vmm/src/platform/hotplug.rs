//! Registers of PCI hotplug: which slots got a device, which the host wants back, and the guest's word that it let one go. The ACPI
//! methods of the slots read and write them (ACPI 6.5, sections 5.6.6 and 6.3.3); the generic event device says when to look.

use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Offsets from `HOTPLUG_PORT`; each register has 32 bits, one a slot.
pub const ADDED: u16 = 0;
pub const WANTED_BACK: u16 = 4;
pub const EJECT: u16 = 8;
const REGISTERS: u16 = 12;

pub struct Hotplug {
    /// Slots that the guest has not looked at since they got a device; reading clears them.
    added: AtomicU32,
    /// Slots that the guest has not yet been told to let go; reading clears them.
    wanted_back: AtomicU32,
    /// Slots that the guest was asked for: it can eject no others.
    asked: AtomicU32,
    /// Slots that it let go, for the main thread.
    ejected: AtomicU32,
    pub event: EventFd,
}

const fn bit(slot: usize) -> u32 {
    1 << (slot % 32)
}

fn slots(bits: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |slot| bits & bit(*slot) != 0)
}

impl Hotplug {
    /// # Errors
    /// When the operating system has no eventfd left.
    pub fn new() -> std::io::Result<Self> {
        let (added, wanted_back, asked, ejected) = Default::default();
        Ok(Hotplug { added, wanted_back, asked, ejected, event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)? })
    }

    /// There is a device in `slot`. The event interrupt has to follow.
    pub fn announce(&self, slot: usize) {
        self.added.fetch_or(bit(slot), Ordering::AcqRel);
    }

    /// The device in `slot` is wanted back. The event interrupt has to follow.
    pub fn ask(&self, slot: usize) {
        self.asked.fetch_or(bit(slot), Ordering::AcqRel);
        self.wanted_back.fetch_or(bit(slot), Ordering::AcqRel);
    }

    pub fn read(&self, register: u16, data: &mut [u8]) {
        data.fill(0);
        let value = match register {
            ADDED => self.added.swap(0, Ordering::AcqRel),
            WANTED_BACK => self.wanted_back.swap(0, Ordering::AcqRel),
            _ => return,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// Gives the slots that the guest lets go with this write. They have to be taken from the bus, and then given to [`Hotplug::gone`].
    pub fn write(&self, register: u16, data: &[u8]) -> impl Iterator<Item = usize> + use<> {
        let value = match (register, data) {
            (EJECT, [a, b, c, d]) => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => 0,
        };
        slots(self.asked.fetch_and(!value, Ordering::AcqRel) & value)
    }

    /// Tells the main thread that nothing of the guest reaches the device in `slot` any more.
    pub fn gone(&self, slot: usize) {
        self.ejected.fetch_or(bit(slot), Ordering::AcqRel);
        // Fails only when the counter would overflow, and then it is readable anyway.
        let _ = self.event.write(1);
    }

    /// The slots whose devices can be ended. Main thread only.
    pub fn take_gone(&self) -> impl Iterator<Item = usize> + use<> {
        let _ = self.event.read();
        slots(self.ejected.swap(0, Ordering::AcqRel))
    }
}

const _: () = assert!(REGISTERS <= super::HOTPLUG_PORTS);

#[cfg(test)]
mod tests {
    use super::*;

    fn read(hotplug: &Hotplug, register: u16) -> u32 {
        let mut data = [0xFF; 4];
        hotplug.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn what_is_new_and_what_is_wanted_back_is_read_once() {
        let hotplug = Hotplug::new().unwrap();
        hotplug.announce(3);
        hotplug.announce(31);
        hotplug.ask(7);
        assert_eq!(read(&hotplug, ADDED), 1 << 3 | 1 << 31);
        assert_eq!(read(&hotplug, WANTED_BACK), 1 << 7);
        assert_eq!((read(&hotplug, ADDED), read(&hotplug, WANTED_BACK), read(&hotplug, EJECT)), (0, 0, 0));
    }

    #[test]
    fn a_guest_lets_go_only_what_it_was_asked_for_and_once() {
        let hotplug = Hotplug::new().unwrap();
        let write = |bits: u32| hotplug.write(EJECT, &bits.to_le_bytes()).collect::<Vec<_>>();
        assert_eq!(write(u32::MAX), [0usize; 0]);
        hotplug.ask(7);
        hotplug.ask(9);
        assert_eq!(hotplug.write(EJECT, &[0xFF]).count(), 0, "a narrow write means nothing");
        assert_eq!(hotplug.write(ADDED, &[0xFF; 4]).count(), 0);
        assert_eq!(write(1 << 7 | 1 << 1), [7]);
        assert_eq!(write(u32::MAX), [9]);
        assert_eq!(write(u32::MAX), [0usize; 0]);
        hotplug.gone(7);
        hotplug.gone(9);
        assert_eq!(hotplug.event.read().unwrap(), 2);
        assert_eq!(hotplug.take_gone().collect::<Vec<_>>(), [7, 9]);
        assert_eq!(hotplug.take_gone().count(), 0);
    }
}
