//! Saved device state that was altered: restoring it is an error, or gives a device that works as safely as any.

#![no_main]

use std::{os::fd::OwnedFd, sync::Arc};

use arbitrary::Arbitrary;
use form_fuzz::device::{
    driver::Places,
    host::{Bells, Lines},
    input::Place,
    memory::Guarded,
};
use form_vmm::{
    pci::msix::VectorState,
    virtio::{
        GuestMemory, VirtioDevice,
        balloon::Balloon,
        net::Net,
        pci::{Activations, Host, QueueSave, VirtioPci, VirtioPciState},
        rng::Rng,
        vsock::Vsock,
    },
};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

const BAR: u64 = 0x80_0000_0000;

/// What is not as it was saved.
#[derive(Arbitrary, Debug)]
enum Change {
    Config {
        at: u8,
        value: u8,
    },
    ConfigLength(u16),
    Vectors(u8),
    Vector {
        index: u8,
        address: u64,
        data: u32,
        masked: bool,
        pending: bool,
    },
    Features(u64),
    Selectors(u32, u32, u16),
    Status(u8),
    ConfigVector(u16),
    Queues(u8),
    Queue {
        index: u8,
        size: u16,
        ready: bool,
        vector: u16,
        table: Place,
        available: Place,
        used: Place,
    },
    Indices {
        index: u8,
        available: u16,
        used: u16,
    },
    NeedsReset(bool),
    Device(Vec<u8>),
    /// What guest memory holds.
    Memory {
        at: Place,
        bytes: [u8; 16],
    },
}

fn device(kind: u8) -> (Box<dyn VirtioDevice>, Option<OwnedFd>) {
    match kind % 4 {
        0 => {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (wire, tap) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).expect("two sockets");
            (Box::new(Net::over_socket("net".to_owned(), tap, [2, 0, 0, 0, 0, 9], 1500).expect("an eventfd")), Some(wire))
        }
        1 => (Box::new(Vsock::new(3).expect("an eventfd")), None),
        2 => (Box::new(Rng::new("rng".to_owned())), None),
        _ => (Box::new(Balloon::new("balloon".to_owned())), None),
    }
}

fn transport(kind: u8, memory: &Guarded) -> (VirtioPci, Option<OwnedFd>) {
    let (device, wire) = device(kind);
    let host = Host {
        memory: GuestMemory::new(memory.memory()),
        router: Arc::new(Lines::default()),
        doorbells: Arc::new(Bells::default()),
        activations: Arc::new(Activations::new().expect("an eventfd")),
        kernel: Arc::default(),
    };
    (VirtioPci::new(0, device, BAR, host).expect("eventfds"), wire)
}

/// The state of a device whose driver is up.
fn working(state: &mut VirtioPciState) {
    state.common.status = 1 | 2 | 4 | 8;
    state.common.driver_features = 1 << 32;
    state.config[4] = 6;
    for (index, queue) in state.common.queues.iter_mut().enumerate() {
        let places = Places::of(index);
        *queue = QueueSave { ready: true, desc_table: places.table, avail_ring: places.available, used_ring: places.used, ..queue.clone() };
    }
}

fn alter(state: &mut VirtioPciState, memory: &mut Guarded, change: Change) {
    let queues = state.common.queues.len().max(1);
    let vectors = state.vectors.len().max(1);
    match change {
        Change::Config { at, value } => {
            if let Some(byte) = state.config.get_mut(usize::from(at)) {
                *byte = value;
            }
        }
        Change::ConfigLength(length) => state.config.resize(usize::from(length), 0),
        Change::Vectors(count) => {
            let blank = VectorState { address: 0, data: 0, masked: true, pending: false };
            state.vectors.resize(usize::from(count), blank);
        }
        Change::Vector { index, address, data, masked, pending } => {
            if let Some(vector) = state.vectors.get_mut(usize::from(index) % vectors) {
                *vector = VectorState { address, data, masked, pending };
            }
        }
        Change::Features(features) => state.common.driver_features = features,
        Change::Selectors(device, driver, queue) => {
            state.common.device_feature_select = device;
            state.common.driver_feature_select = driver;
            state.common.queue_select = queue;
        }
        Change::Status(status) => state.common.status = status,
        Change::ConfigVector(vector) => state.common.config_vector = vector,
        Change::Queues(count) => {
            if let Some(first) = state.common.queues.first().cloned() {
                state.common.queues.resize(usize::from(count % 8), first);
            }
        }
        Change::Queue { index, size, ready, vector, table, available, used } => {
            if let Some(queue) = state.common.queues.get_mut(usize::from(index) % queues) {
                let (desc_table, avail_ring, used_ring) = (table.address(), available.address(), used.address());
                *queue = QueueSave { size, ready, vector, desc_table, avail_ring, used_ring, ..queue.clone() };
            }
        }
        Change::Indices { index, available, used } => {
            if let Some(queue) = state.common.queues.get_mut(usize::from(index) % queues) {
                (queue.next_avail, queue.next_used) = (available, used);
            }
        }
        Change::NeedsReset(needed) => state.needs_reset = needed,
        Change::Device(text) => {
            if let Ok(value) = serde_json::from_slice(&text) {
                state.device = value;
            }
        }
        Change::Memory { at, bytes } => memory.write(at.address(), &bytes),
    }
}

thread_local! {
    static MEMORY: std::cell::RefCell<Guarded> = std::cell::RefCell::default();
}

fuzz_target!(|input: (u8, Vec<Change>)| {
    let (kind, changes) = input;
    MEMORY.with_borrow_mut(|memory| {
        memory.clear();
        let mut state = transport(kind, memory).0.save();
        working(&mut state);
        for change in changes.into_iter().take(32) {
            alter(&mut state, memory, change);
        }
        let (mut restored, _wire) = transport(kind, memory);
        if restored.restore(&state).is_ok() {
            restored.activate();
            restored.pause();
            let saved = serde_json::to_string(&restored.save()).expect("the state has a JSON form");
            let again: VirtioPciState = serde_json::from_str(&saved).expect("what was saved can be read");
            restored.activate();
            drop(restored);
            // What a device that took the state saves, another one takes.
            assert!(transport(kind, memory).0.restore(&again).is_ok());
        }
        memory.check_surroundings();
    });
});
