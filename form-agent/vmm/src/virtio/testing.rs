//! The driver's side of a device, for tests: memory, rings, and requests as a guest would make them.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, GuestMemory, Interrupt, chain::Chain};
use crate::memory::GuestMemoryMmap;

/// Where a second piece of guest memory lies, behind a hole.
pub const HIGH: u64 = 1 << 32;
const LOW_SIZE: usize = 8 << 20;
const HIGH_SIZE: usize = 1 << 20;
/// Rings of queue `i` lie here, buffers behind all of them.
const RING_AREA: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Everything but the event index, whose suppression of kicks a test would have to follow.
pub const NO_EVENT_IDX: u64 = !super::features::RING_EVENT_IDX;

#[derive(Default)]
pub struct Counter {
    pub queues: [AtomicUsize; 8],
    pub config: AtomicUsize,
}

impl Interrupt for Counter {
    fn queue(&self, index: u16) -> io::Result<()> {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn config(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// What is signalled past this process nobody looks at.
    fn direct(&self, _index: u16, _event: Option<&EventFd>) -> io::Result<()> {
        Ok(())
    }
}

/// A piece of a request.
pub enum Buffer<'a> {
    /// The device reads these bytes.
    Out(&'a [u8]),
    /// The device may write this many.
    In(usize),
}

#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A request that was made: its head and where its writable buffers lie.
#[derive(Clone, Debug)]
pub struct Made {
    pub head: u16,
    writable: Vec<(u64, usize)>,
}

impl Made {
    /// The writable buffers again, for another request in the same memory.
    pub fn descriptors(&self) -> Vec<Descriptor> {
        self.writable.iter().map(|&(address, length)| Descriptor { address, length: length as u32, flags: WRITE, next: 0 }).collect()
    }

    pub fn with_head(self, head: u16) -> Self {
        Self { head, ..self }
    }
}

struct DriverRing {
    size: u16,
    table: u64,
    available: u64,
    used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
    kick: EventFd,
}

/// A driver with a queue of each of the given sizes.
pub struct Driver {
    pub memory: GuestMemory,
    pub interrupts: Arc<Counter>,
    pub needs_reset: Arc<AtomicBool>,
    rings: Vec<DriverRing>,
    next_buffer: u64,
}

pub fn guest_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LOW_SIZE), (GuestAddress(HIGH), HIGH_SIZE)]).unwrap()
}

impl Driver {
    pub fn new(sizes: &[u16]) -> Self {
        let rings = sizes
            .iter()
            .zip(0_u64..)
            .map(|(&size, at)| {
                let table = RING_AREA + at * 0x1_0000;
                DriverRing {
                    size,
                    table,
                    available: table + 0x4000,
                    used: table + 0x8000,
                    next_descriptor: 0,
                    next_available: 0,
                    next_used: 0,
                    kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                }
            })
            .collect();
        Self {
            memory: GuestMemory::new(guest_memory()),
            interrupts: Arc::default(),
            needs_reset: Arc::default(),
            rings,
            next_buffer: BUFFERS,
        }
    }

    /// The queue as the transport would hand it over.
    pub fn queue(&self, index: usize) -> Queue {
        let ring = &self.rings[index];
        let mut queue = Queue::new(ring.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(ring.table)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(ring.available)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(ring.used)).unwrap();
        queue.set_ready(true);
        queue
    }

    pub fn activation(&self, features: u64) -> Activation {
        let queues = (0..self.rings.len())
            .map(|index| {
                let mut queue = self.queue(index);
                queue.set_event_idx(features & super::features::RING_EVENT_IDX != 0);
                (index as u16, queue, self.rings[index].kick.try_clone().unwrap())
            })
            .collect();
        self.activation_of(queues, features)
    }

    /// An activation that goes on with queues that a device gave back.
    pub fn activation_of(&self, queues: Vec<(u16, Queue, EventFd)>, features: u64) -> Activation {
        Activation {
            memory: self.memory.clone(),
            interrupt: Arc::clone(&self.interrupts) as Arc<dyn Interrupt>,
            queues,
            features,
            needs_reset: Arc::clone(&self.needs_reset),
            kernel: Arc::default(),
        }
    }

    /// Memory for a buffer.
    pub fn allocate(&mut self, length: usize) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += (length as u64).next_multiple_of(64);
        assert!(self.next_buffer < LOW_SIZE as u64, "the test uses more memory than there is");
        address
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Makes a request available and kicks.
    pub fn add(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> Made {
        let mut descriptors = Vec::new();
        let mut writable = Vec::new();
        for buffer in buffers {
            let (length, flags) = match buffer {
                Buffer::Out(bytes) => (bytes.len(), 0),
                Buffer::In(length) => (*length, WRITE),
            };
            let address = self.allocate(length);
            match buffer {
                Buffer::Out(bytes) => self.write(address, bytes),
                Buffer::In(_) => writable.push((address, length)),
            }
            descriptors.push(Descriptor { address, length: length as u32, flags, next: 0 });
        }
        Made { head: self.add_chain(queue, &descriptors), writable }
    }

    /// Links the descriptors to a chain, makes it available and kicks; gives its head.
    pub fn add_chain(&mut self, queue: usize, descriptors: &[Descriptor]) -> u16 {
        let ring = &mut self.rings[queue];
        let size = ring.size;
        let head = ring.next_descriptor;
        ring.next_descriptor = (head + descriptors.len() as u16) % size;
        for (at, descriptor) in descriptors.iter().enumerate() {
            let mut descriptor = *descriptor;
            if at + 1 < descriptors.len() {
                descriptor.flags |= NEXT;
                descriptor.next = (head + at as u16 + 1) % size;
            }
            self.set_descriptor(queue, (head + at as u16) % size, descriptor);
        }
        self.offer(queue, head);
        head
    }

    pub fn set_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        self.write(self.rings[queue].table + u64::from(index) * 16, &descriptor.bytes());
    }

    /// Puts a head into the available ring and kicks.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.available + 4 + u64::from(ring.next_available % ring.size) * 2;
        ring.next_available = ring.next_available.wrapping_add(1);
        let (index_at, index) = (ring.available + 2, ring.next_available);
        self.write(slot, &head.to_le_bytes());
        self.memory.memory().store(index, GuestAddress(index_at), Ordering::SeqCst).unwrap();
        self.kick(queue);
    }

    /// Claims that the available ring stands at `index`.
    pub fn set_available(&self, queue: usize, index: u16) {
        self.memory.memory().store(index, GuestAddress(self.rings[queue].available + 2), Ordering::SeqCst).unwrap();
        self.kick(queue);
    }

    pub fn kick(&self, queue: usize) {
        self.rings[queue].kick.write(1).unwrap();
    }

    /// The next entry of the used ring, if there is one: head and length.
    pub fn try_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let memory = self.memory.memory();
        let index: u16 = memory.load(GuestAddress(ring.used + 2), Ordering::SeqCst).unwrap();
        if index == ring.next_used {
            return None;
        }
        let entry = ring.used + 4 + u64::from(ring.next_used % ring.size) * 8;
        ring.next_used = ring.next_used.wrapping_add(1);
        let head: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = memory.read_obj(GuestAddress(entry + 4)).unwrap();
        Some((head as u16, length))
    }

    /// Waits for the next entry of the used ring.
    pub fn used(&mut self, queue: usize) -> (u16, u32) {
        eventually(|| self.try_used(queue))
    }

    pub fn await_needs_reset(&self) {
        eventually(|| self.needs_reset.load(Ordering::SeqCst).then_some(()));
    }

    /// What lies in the writable buffers of a request.
    pub fn written(&self, made: &Made) -> Vec<u8> {
        made.writable.iter().flat_map(|(address, length)| self.read(*address, *length)).collect()
    }
}

/// Asks until there is an answer, for a minute.
pub fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "nothing happened within a minute");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Descriptor tables of a hostile driver: mostly plausible, so that they reach past the first check.
pub fn hostile_table() -> impl Strategy<Value = Vec<Descriptor>> {
    let address = prop_oneof![
        6 => BUFFERS..BUFFERS + 0x1000,
        1 => RING_AREA..RING_AREA + 0x100,
        1 => (LOW_SIZE as u64 - 64)..(LOW_SIZE as u64 + 64),
        1 => HIGH - 16..HIGH + 16,
        1 => (HIGH + HIGH_SIZE as u64 - 32)..(HIGH + HIGH_SIZE as u64 + 32),
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        6 => 0_u32..256,
        1 => Just(16),
        1 => Just(44),
        1 => 0_u32..0x2_0000,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0_u16..4, 1 => 0_u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0_u16..16, 1 => any::<u16>()];
    prop::collection::vec(
        (address, length, flags, next).prop_map(|(address, length, flags, next)| Descriptor { address, length, flags, next }),
        16,
    )
}

/// Loads the chain at `head` of a table over memory that holds `content` where most buffers point; `None` when it was refused.
pub fn load_hostile(table: &[Descriptor], head: u16, content: &[u8]) -> Option<(GuestMemoryMmap, Chain)> {
    let driver = Driver::new(&[16]);
    for (index, descriptor) in (0..).zip(table) {
        driver.set_descriptor(0, index, *descriptor);
    }
    driver.write(BUFFERS, content);
    let mut chain = Chain::default();
    let memory = guest_memory_of(&driver);
    chain.load(&memory, &driver.queue(0), head).ok()?;
    Some((memory, chain))
}

fn guest_memory_of(driver: &Driver) -> GuestMemoryMmap {
    GuestMemoryMmap::clone(&driver.memory.memory())
}
