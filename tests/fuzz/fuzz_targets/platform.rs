//! The devices that are not on PCI, by their ports: the serial console with input from the host's side, the power registers, the
//! keyboard controller, the registers of PCI and vCPU hotplug; and every other port.

#![no_main]

use std::{collections::BTreeSet, sync::Arc};

use arbitrary::Arbitrary;
use form_vmm::{
    bus::Bus,
    log_ring,
    pci::bus::PciBus,
    platform::{
        HOTPLUG_PORT, I8042_COMMAND, PCI_CONFIG_PORT, POWER_PORT, PROCESSORS_PORT, SERIAL_PORT,
        hotplug::Hotplug,
        power::Power,
        processors::{Processors, ProcessorsState},
        serial::{SerialPort, SerialPortState, Sink},
    },
};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Port {
    Serial(u8),
    Power(u8),
    Keyboard,
    Pci(u8),
    Any(u16),
    Hotplug(u8),
    Processors(u8),
}

impl Port {
    fn number(self) -> u16 {
        match self {
            Self::Serial(register) => SERIAL_PORT + u16::from(register % 9),
            Self::Power(register) => POWER_PORT + u16::from(register % 17),
            Self::Keyboard => I8042_COMMAND,
            Self::Pci(offset) => PCI_CONFIG_PORT + u16::from(offset % 9),
            Self::Any(port) => port,
            Self::Hotplug(register) => HOTPLUG_PORT + u16::from(register % 17),
            Self::Processors(register) => PROCESSORS_PORT + u16::from(register % 65),
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    Read {
        port: Port,
        width: u8,
    },
    Write {
        port: Port,
        width: u8,
        value: u64,
    },
    /// What the guest prints.
    Print(Vec<u8>),
    Type(Vec<u8>),
    Attach(bool),
    Take,
    Button,
    /// Saved and restored as it is.
    Save,
    /// Another state than any that was saved.
    Restore(State),
    /// A device came, or is wanted back.
    Announce(u8),
    Ask(u8),
    /// A vCPU came, is wanted back, or is not wanted back any more.
    Plug(u8),
    AskProcessor(u8),
    Keep(u8),
    /// As they are, or otherwise.
    RestoreProcessors(Option<[[u32; 4]; 4]>),
}

#[derive(Arbitrary, Debug)]
struct State {
    registers: [u8; 9],
    received: Vec<u8>,
    waiting: Vec<u8>,
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

fn ring() -> Sink {
    let file = std::fs::File::from(memfd_create("log", MemfdFlags::CLOEXEC).expect("a file in memory"));
    log_ring::create(&file, 4096).expect("room in memory");
    Sink::Ring(log_ring::Writer::open(&file).expect("a log"))
}

fn width(choice: u8) -> usize {
    [1, 2, 4, 8, 3, 64][usize::from(choice % 6)]
}

fuzz_target!(|steps: Vec<Step>| {
    let serial = SerialPort::new(ring(), event()).expect("an eventfd");
    let hotplug = Hotplug::new().expect("an eventfd");
    let mut bus = Bus {
        serial: Arc::new(serial),
        power: Arc::new(Power::new(event())),
        pci: Arc::new(PciBus::default()),
        hotplug: Arc::new(hotplug),
        processors: Arc::new(Processors::new(&ProcessorsState::new(2, 128), event())),
    };
    let mut asked_processors = BTreeSet::new();
    let mut asked = BTreeSet::new();
    for step in steps.into_iter().take(64) {
        match step {
            Step::Read { port, width: choice } => bus.read_port(port.number(), &mut vec![0; width(choice)]),
            Step::Write { port, width: choice, value } => {
                let _ = bus.write_port(port.number(), &value.to_le_bytes().repeat(8)[..width(choice)]);
            }
            Step::Print(bytes) => _ = bus.write_port(SERIAL_PORT, &bytes),
            Step::Type(bytes) => _ = bus.serial.input(&bytes),
            Step::Attach(active) => bus.serial.attached().set_active(active),
            Step::Take => _ = bus.serial.attached().take(),
            Step::Announce(slot) => bus.hotplug.announce(usize::from(slot % 32)),
            Step::Ask(slot) => {
                asked.insert(usize::from(slot % 32));
                bus.hotplug.ask(usize::from(slot % 32));
            }
            Step::Plug(id) => bus.processors.announce(id % 128),
            Step::AskProcessor(id) => {
                asked_processors.insert(id % 128);
                bus.processors.ask(id % 128);
            }
            Step::Keep(id) => {
                asked_processors.remove(&(id % 128));
                bus.processors.keep(id % 128);
            }
            Step::RestoreProcessors(changed) => {
                let state = bus.processors.save();
                assert!(state.is_sound(), "{state:?}");
                let state = match changed {
                    Some([present, added, wanted_back, asked]) => ProcessorsState { most: 128, present, added, wanted_back, asked },
                    None => state,
                };
                if state.is_sound() {
                    asked_processors.extend((0..128_u8).filter(|id| state.asked[usize::from(*id) / 32] >> (id % 32) & 1 != 0));
                    bus.processors = Arc::new(Processors::new(&state, event()));
                    assert_eq!(bus.processors.save(), state, "saving changed the state");
                }
            }
            Step::Button => _ = bus.power.press_button(),
            Step::Save => {
                let state = bus.serial.save();
                let restored = SerialPort::restore(&state, ring(), event()).expect("a state that was saved");
                assert_eq!(restored.save(), state, "saving changed the state");
                bus.serial = Arc::new(restored);
            }
            Step::Restore(State {
                registers: [low, high, enable, identification, control, status, modem, modem_status, scratch],
                received,
                waiting,
            }) => {
                let state = SerialPortState {
                    baud_divisor: [low, high],
                    interrupt_enable: enable,
                    interrupt_identification: identification,
                    line_control: control,
                    line_status: status,
                    modem_control: modem,
                    modem_status,
                    scratch,
                    received,
                    waiting,
                };
                if let Ok(restored) = SerialPort::restore(&state, ring(), event()) {
                    bus.serial = Arc::new(restored);
                }
            }
        }
        assert!(bus.processors.present().contains(&0), "the first vCPU is gone");
        for id in bus.processors.take_gone() {
            assert!(asked_processors.contains(&id), "vCPU {id} was let go, and nobody had asked for it");
            assert!(!bus.processors.present().contains(&id), "vCPU {id} is gone and there");
        }
        for slot in bus.hotplug.take_gone() {
            assert!(asked.remove(&slot), "slot {slot} was let go, and nobody had asked for it");
        }
    }
});
