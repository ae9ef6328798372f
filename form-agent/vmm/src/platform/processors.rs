//! Registers of vCPU hotplug: which vCPUs are there, which came, which the host wants back, and the guest's word that it let one go.
//! The ACPI methods of the processor devices read and write them (ACPI 6.5, sections 5.6.6, 6.3.3 and 8.4); the generic event device
//! says when to look.

use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// A vCPU each bit: bit `ID % 32` of word `ID / 32`.
pub const WORDS: usize = 4;
/// The vCPUs that a VM can have.
pub const MOST: u8 = 128;
/// Offsets from `PROCESSORS_PORT`: each is the first of as many registers of 32 bits as there are words.
pub const PRESENT: u16 = 0;
pub const ADDED: u16 = 0x10;
pub const WANTED_BACK: u16 = 0x20;
pub const EJECT: u16 = 0x30;
const REGISTERS: u16 = 0x40;

const _: () = assert!(REGISTERS <= super::PROCESSORS_PORTS && MOST as usize == WORDS * 32);

/// What is saved of the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessorsState {
    /// How many vCPUs the guest can have: their ids are below.
    pub most: u8,
    pub present: [u32; WORDS],
    /// What the guest has not looked at yet.
    pub added: [u32; WORDS],
    pub wanted_back: [u32; WORDS],
    /// What it was asked for and has not let go.
    pub asked: [u32; WORDS],
}

impl ProcessorsState {
    /// Of a VM that starts with `count` of at most `most`.
    #[must_use]
    pub fn new(count: u8, most: u8) -> Self {
        let none = [0; WORDS];
        let mut present = none;
        for id in 0..count.min(most) {
            present[word(id)] |= bit(id);
        }
        ProcessorsState { most, present, added: none, wanted_back: none, asked: none }
    }

    /// The ids of the vCPUs that are there, in ascending order.
    #[must_use]
    pub fn ids(&self) -> Vec<u8> {
        ids(self.present).collect()
    }

    /// Whether a VM can be like this: the first vCPU is there, and nothing is said of what is not.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let possible = ProcessorsState::new(self.most, self.most).present;
        let within = |words: [u32; WORDS], limit: [u32; WORDS]| words.iter().zip(limit).all(|(word, limit)| word & !limit == 0);
        (1..=MOST).contains(&self.most)
            && self.present[0] & 1 != 0
            && within(self.present, possible)
            && within(self.added, self.present)
            && within(self.wanted_back, self.asked)
            && within(self.asked, self.present)
            && (self.asked[0] | self.wanted_back[0]) & 1 == 0
    }
}

const fn word(id: u8) -> usize {
    (id / 32) as usize % WORDS
}

const fn bit(id: u8) -> u32 {
    1 << (id % 32)
}

fn ids(words: [u32; WORDS]) -> impl Iterator<Item = u8> {
    (0..MOST).filter(move |id| words[word(*id)] & bit(*id) != 0)
}

type Bits = [AtomicU32; WORDS];

fn set(bits: &Bits, id: u8) {
    bits[word(id)].fetch_or(bit(id), Ordering::AcqRel);
}

fn clear(bits: &Bits, id: u8) {
    bits[word(id)].fetch_and(!bit(id), Ordering::AcqRel);
}

fn load(bits: &Bits) -> [u32; WORDS] {
    std::array::from_fn(|at| bits[at].load(Ordering::Acquire))
}

pub struct Processors {
    most: u8,
    present: Bits,
    /// vCPUs that the guest has not looked at since they came; reading clears them.
    added: Bits,
    /// vCPUs that the guest has not yet been told to let go; reading clears them.
    wanted_back: Bits,
    /// vCPUs that the guest was asked for: it can eject no others.
    asked: Bits,
    /// vCPUs that it let go, for the main thread.
    ejected: Bits,
    /// Wakes the main thread.
    event: EventFd,
}

impl Processors {
    /// Registers as `state` has them, which has to be sound; `event` is written to when a vCPU was let go.
    #[must_use]
    pub fn new(state: &ProcessorsState, event: EventFd) -> Self {
        let bits = |words: [u32; WORDS]| words.map(AtomicU32::new);
        Processors {
            most: state.most,
            present: bits(state.present),
            added: bits(state.added),
            wanted_back: bits(state.wanted_back),
            asked: bits(state.asked),
            ejected: Bits::default(),
            event,
        }
    }

    #[must_use]
    pub fn save(&self) -> ProcessorsState {
        ProcessorsState {
            most: self.most,
            present: load(&self.present),
            added: load(&self.added),
            wanted_back: load(&self.wanted_back),
            asked: load(&self.asked),
        }
    }

    /// How many vCPUs the guest can have.
    #[must_use]
    pub fn most(&self) -> u8 {
        self.most
    }

    /// The ids of the vCPUs that are there, in ascending order.
    #[must_use]
    pub fn present(&self) -> Vec<u8> {
        ids(load(&self.present)).collect()
    }

    /// There is a vCPU `id`. The event interrupt has to follow.
    pub fn announce(&self, id: u8) {
        set(&self.present, id);
        set(&self.added, id);
    }

    /// The vCPU `id` is wanted back; the first one never is. The event interrupt has to follow.
    pub fn ask(&self, id: u8) {
        if id != 0 && self.present[word(id)].load(Ordering::Acquire) & bit(id) != 0 {
            set(&self.asked, id);
            set(&self.wanted_back, id);
        }
    }

    /// The vCPU `id` is not wanted back any more: the guest cannot let it go from now on.
    pub fn keep(&self, id: u8) {
        clear(&self.wanted_back, id);
        clear(&self.asked, id);
    }

    pub fn read(&self, register: u16, data: &mut [u8]) {
        data.fill(0);
        let at = usize::from(register % 0x10 / 4);
        let value = match register {
            _ if !register.is_multiple_of(4) => return,
            PRESENT..ADDED => self.present[at].load(Ordering::Acquire),
            ADDED..WANTED_BACK => self.added[at].swap(0, Ordering::AcqRel),
            WANTED_BACK..EJECT => self.wanted_back[at].swap(0, Ordering::AcqRel),
            _ => return,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// Takes the vCPUs that the guest lets go with this write, of those that it was asked for.
    pub fn write(&self, register: u16, data: &[u8]) {
        let (EJECT..REGISTERS, [a, b, c, d], 0) = (register, data, register % 4) else { return };
        let at = usize::from((register - EJECT) / 4);
        let value = u32::from_le_bytes([*a, *b, *c, *d]);
        let gone = self.asked[at].fetch_and(!value, Ordering::AcqRel) & value;
        if gone == 0 {
            return;
        }
        for bits in [&self.present, &self.added, &self.wanted_back] {
            bits[at].fetch_and(!gone, Ordering::AcqRel);
        }
        self.ejected[at].fetch_or(gone, Ordering::AcqRel);
        // Fails only when the counter would overflow, and then it is readable anyway.
        let _ = self.event.write(1);
    }

    /// The vCPUs whose threads can be held. Main thread only.
    pub fn take_gone(&self) -> impl Iterator<Item = u8> + use<> {
        ids(std::array::from_fn(|at| self.ejected[at].swap(0, Ordering::AcqRel)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processors(count: u8, most: u8) -> Processors {
        Processors::new(&ProcessorsState::new(count, most), EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    fn read(processors: &Processors, register: u16) -> u32 {
        let mut data = [0xFF; 4];
        processors.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn what_came_and_what_is_wanted_back_is_read_once_and_what_is_there_always() {
        let processors = processors(1, 128);
        processors.announce(3);
        processors.announce(127);
        processors.ask(3);
        processors.ask(0);
        processors.ask(5);
        assert_eq!((read(&processors, ADDED), read(&processors, ADDED + 12)), (1 << 3, 1 << 31));
        assert_eq!(read(&processors, WANTED_BACK), 1 << 3, "neither the first one nor one that is not there");
        for _ in 0..2 {
            assert_eq!((read(&processors, PRESENT), read(&processors, PRESENT + 12)), (1 | 1 << 3, 1 << 31));
        }
        for register in [ADDED, ADDED + 12, WANTED_BACK, EJECT, EJECT + 12, PRESENT + 4, PRESENT + 1, 0x40, u16::MAX] {
            assert_eq!(read(&processors, register), 0, "{register:#x}");
        }
        assert_eq!(processors.present(), [0, 3, 127]);
    }

    #[test]
    fn a_guest_lets_go_only_what_it_was_asked_for_and_once() {
        let processors = processors(4, 8);
        let write = |bits: u32| processors.write(EJECT, &bits.to_le_bytes());
        write(u32::MAX);
        assert_eq!(processors.present(), [0, 1, 2, 3]);
        processors.ask(2);
        processors.ask(3);
        processors.write(EJECT, &[0xFF]);
        processors.write(ADDED, &[0xFF; 4]);
        processors.write(EJECT + 1, &[0xFF; 4]);
        assert_eq!(processors.take_gone().count(), 0, "narrow and crooked writes mean nothing");
        // What it is told already cannot be taken back from it, but what it then says is not listened to.
        processors.keep(2);
        write(1 | 1 << 2 | 1 << 3);
        assert_eq!(read(&processors, PRESENT), 0b111);
        assert_eq!(processors.take_gone().collect::<Vec<_>>(), [3]);
        assert_eq!(processors.take_gone().count(), 0);
        assert_eq!(processors.event.read().unwrap(), 1);
        write(u32::MAX);
        assert_eq!(processors.take_gone().count(), 0);
        assert_eq!(read(&processors, WANTED_BACK), 0);
        // And comes again.
        processors.announce(3);
        assert_eq!((processors.present().len(), read(&processors, ADDED)), (4, 1 << 3));
    }

    #[test]
    fn saved_registers_come_back() {
        let processors = processors(2, 4);
        processors.announce(2);
        processors.ask(1);
        let state = processors.save();
        assert!(state.is_sound());
        assert_eq!(state.ids(), [0, 1, 2]);
        let again = Processors::new(&serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap(), EventFd::new(0).unwrap());
        assert_eq!(again.save(), state);
        assert_eq!((read(&again, ADDED), read(&again, WANTED_BACK)), (1 << 2, 1 << 1));
    }

    #[test]
    fn a_state_that_no_vm_has_is_known() {
        assert!(ProcessorsState::new(1, 1).is_sound() && ProcessorsState::new(128, 128).is_sound());
        let sound = ProcessorsState::new(2, 4);
        let one = |id: u8| ProcessorsState::new(id + 1, MOST).present.map(|word| word & bit(id));
        let unsound = [
            ProcessorsState { most: 0, ..sound },
            ProcessorsState { most: 129, ..sound },
            ProcessorsState { most: 1, ..sound },
            ProcessorsState { present: one(1), ..sound },
            ProcessorsState { present: [1, 1, 0, 0], ..sound },
            ProcessorsState { added: one(2), ..sound },
            ProcessorsState { asked: one(2), ..sound },
            ProcessorsState { asked: one(0), ..sound },
            ProcessorsState { wanted_back: one(1), ..sound },
        ];
        for state in unsound {
            assert!(!state.is_sound(), "{state:?}");
        }
    }
}
