//! The PCI root bus with one device of each kind that needs nothing of the host: configuration space by both mechanisms, BARs
//! that move and overlap, the common configuration, MSI-X tables; accesses of any width at any address.

#![no_main]

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use arbitrary::Arbitrary;
use form_fuzz::device::{
    host::{Bells, Lines},
    memory::Guarded,
};
use form_vmm::{
    layout::{ECAM_SIZE, ECAM_START},
    pci::bus::PciBus,
    virtio::{
        GuestMemory, VirtioDevice,
        balloon::Balloon,
        net::Net,
        pci::{Activations, BAR_SIZE, Host, VirtioPci},
        rng::Rng,
        vsock::Vsock,
    },
};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

const DEVICES: u64 = 4;
const BARS: u64 = 0x80_0000_0000;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    /// A register of a device's configuration space.
    Config {
        slot: u8,
        register: u8,
    },
    Ecam(u32),
    Bar {
        slot: u8,
        area: u8,
        offset: u8,
    },
    /// Where a BAR may have been moved to.
    Moved {
        at: u8,
        offset: u16,
    },
    Any(u64),
}

impl Address {
    fn value(self) -> u64 {
        match self {
            Self::Config { slot, register } => ECAM_START + u64::from(slot % 8) * 0x8000 + u64::from(register),
            Self::Ecam(offset) => ECAM_START + u64::from(offset) % (ECAM_SIZE + 8),
            Self::Bar { slot, area, offset } => {
                BARS + u64::from(slot) % DEVICES * BAR_SIZE + u64::from(area % 9) * 0x1000 + u64::from(offset)
            }
            Self::Moved { at, offset } => u64::from(at) * 0x1_0000 + u64::from(offset),
            Self::Any(address) => address,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    Read {
        at: Address,
        width: u8,
    },
    Write {
        at: Address,
        width: u8,
        value: u64,
    },
    PortRead {
        port: u8,
        width: u8,
    },
    PortWrite {
        port: u8,
        width: u8,
        value: u32,
    },
    /// Moves a BAR.
    Move {
        slot: u8,
        to: u8,
        high: u32,
    },
    /// A vector of a device's table, and what it needs to be used.
    Vector {
        slot: u8,
        index: u8,
        address: u64,
        data: u32,
        masked: bool,
    },
    Common {
        slot: u8,
        offset: u8,
        width: u8,
        value: u64,
    },
    /// The main thread activates what asked for it.
    Activate,
    Pause {
        slot: u8,
    },
    Save {
        slot: u8,
    },
    /// Taken from the bus, or put there again, as hotplug does it.
    Unplug {
        slot: u8,
    },
    Plug {
        slot: u8,
    },
}

fn width(choice: u8) -> usize {
    // Hardware makes 1, 2, 4 and 8; a string instruction more at once.
    [1, 2, 4, 8, 3, 7, 16, 64][usize::from(choice % 8)]
}

struct Machine {
    bus: PciBus,
    devices: Vec<Arc<Mutex<VirtioPci>>>,
    activations: Arc<Activations>,
    _wire: OwnedFd,
}

impl Machine {
    fn new(memory: &Guarded) -> Self {
        let bus = PciBus::default();
        let activations = Arc::new(Activations::new().expect("an eventfd"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (wire, tap) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).expect("two sockets");
        let kinds: [Box<dyn VirtioDevice>; DEVICES as usize] = [
            Box::new(Net::over_socket("net".to_owned(), tap, [2, 0, 0, 0, 0, 9], 1500).expect("an eventfd")),
            Box::new(Vsock::new(3).expect("an eventfd")),
            Box::new(Rng::new("rng".to_owned())),
            Box::new(Balloon::new("balloon".to_owned())),
        ];
        let router = Arc::new(Lines::default());
        let mut devices = Vec::new();
        for (slot, device) in (1..).zip(kinds) {
            let host = Host {
                memory: GuestMemory::new(memory.memory()),
                router: Arc::clone(&router) as _,
                doorbells: Arc::new(Bells::default()),
                activations: Arc::clone(&activations),
                kernel: Arc::default(),
            };
            let device = VirtioPci::new(slot, device, BARS + (slot as u64 - 1) * BAR_SIZE, host).expect("eventfds");
            let device = Arc::new(Mutex::new(device));
            bus.add(slot, Arc::clone(&device) as _).expect("a free slot");
            devices.push(device);
        }
        Self { bus, devices, activations, _wire: wire }
    }

    fn device(&self, slot: u8, act: impl FnOnce(&mut VirtioPci)) {
        let device = &self.devices[usize::from(slot) % self.devices.len()];
        act(&mut device.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        match address.checked_sub(ECAM_START) {
            Some(offset) if offset < ECAM_SIZE => self.bus.read_ecam(offset, data),
            _ => _ = self.bus.read_memory(address, data),
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        match address.checked_sub(ECAM_START) {
            Some(offset) if offset < ECAM_SIZE => self.bus.write_ecam(offset, data),
            _ => _ = self.bus.write_memory(address, data),
        }
    }

    fn bar(slot: u8) -> u64 {
        BARS + u64::from(slot) % DEVICES * BAR_SIZE
    }

    fn config(slot: u8) -> u64 {
        // Slot 0 is the host bridge.
        ECAM_START + (u64::from(slot) % DEVICES + 1) * 0x8000
    }

    fn play(&self, step: &Step) {
        match *step {
            Step::Read { at, width: choice } => self.read(at.value(), &mut vec![0; width(choice)]),
            Step::Write { at, width: choice, value } => self.write(at.value(), &value.to_le_bytes().repeat(8)[..width(choice)]),
            Step::PortRead { port, width: choice } => self.bus.read_port(u16::from(port % 8), &mut vec![0; width(choice)]),
            Step::PortWrite { port, width: choice, value } => {
                self.bus.write_port(u16::from(port % 8), &value.to_le_bytes().repeat(16)[..width(choice)]);
            }
            Step::Move { slot, to, high } => {
                self.write(Self::config(slot) + 0x10, &(u32::from(to) * 0x1_0000).to_le_bytes());
                self.write(Self::config(slot) + 0x14, &high.to_le_bytes());
            }
            Step::Vector { slot, index, address, data, masked } => {
                let entry = Self::bar(slot) + 0x4000 + u64::from(index % 5) * 16;
                self.write(entry, &address.to_le_bytes());
                self.write(entry + 8, &data.to_le_bytes());
                self.write(entry + 12, &u32::from(masked).to_le_bytes());
            }
            Step::Common { slot, offset, width: choice, value } => {
                self.write(Self::bar(slot) + u64::from(offset % 64), &value.to_le_bytes().repeat(8)[..width(choice)]);
            }
            Step::Activate => {
                for slot in self.activations.take() {
                    self.device(slot as u8 - 1, VirtioPci::activate);
                }
            }
            Step::Pause { slot } => self.device(slot, |device| {
                device.pause();
                device.activate();
            }),
            Step::Save { slot } => self.device(slot, |device| {
                device.pause();
                let state = serde_json::to_string(&device.save()).expect("the state has a JSON form");
                assert!(serde_json::from_str::<form_vmm::virtio::pci::VirtioPciState>(&state).is_ok());
                device.activate();
            }),
            Step::Unplug { slot } => self.bus.remove(usize::from(slot) % self.devices.len() + 1),
            Step::Plug { slot } => {
                let index = usize::from(slot) % self.devices.len();
                // It may be there.
                let _ = self.bus.add(index + 1, Arc::clone(&self.devices[index]) as _);
            }
        }
    }
}

thread_local! {
    static MEMORY: std::cell::RefCell<Guarded> = std::cell::RefCell::default();
}

fuzz_target!(|steps: Vec<Step>| {
    MEMORY.with_borrow_mut(|memory| {
        memory.clear();
        let machine = Machine::new(memory);
        // Memory and bus mastering on, as firmware leaves it.
        (0..DEVICES as u8).for_each(|slot| machine.write(Machine::config(slot) + 4, &[6, 0]));
        steps.iter().take(64).for_each(|step| machine.play(step));
        drop(machine);
        memory.check_surroundings();
    });
});
