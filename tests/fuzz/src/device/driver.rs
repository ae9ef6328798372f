//! The guest's side: rings and requests in its memory.

use super::{
    input::{HostileDescriptor, Shape},
    memory::Guarded,
};

/// Queue `i` lies at `AREA + i * QUEUE_STRIDE`: table, available ring, used ring.
pub const AREA: u64 = 0x1000;
const QUEUE_STRIDE: u64 = 0x2000;
const AVAILABLE_AT: u64 = 0x1000;
const USED_AT: u64 = 0x1400;
/// Indirect tables lie here, one after the other.
const INDIRECT: u64 = 0x7000;
const INDIRECT_END: u64 = 0x8000;
pub const BUFFERS: u64 = 0x8000;
const BUFFERS_END: u64 = super::memory::LOW_SIZE as u64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

pub fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..16].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Where a queue lies.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    pub table: u64,
    pub available: u64,
    pub used: u64,
}

impl Places {
    pub fn of(queue: usize) -> Self {
        let table = AREA + queue as u64 * QUEUE_STRIDE;
        Self { table, available: table + AVAILABLE_AT, used: table + USED_AT }
    }
}

#[derive(Clone, Copy, Debug)]
struct Ring {
    size: u16,
    places: Places,
    next_descriptor: u16,
    next_available: u16,
}

/// The driver of a device with up to three queues.
#[derive(Default)]
pub struct Driver {
    rings: Vec<Ring>,
    next_buffer: u64,
    next_table: u64,
}

impl Driver {
    /// Forgets everything; queues have these sizes from now on.
    pub fn set_up(&mut self, memory: &mut Guarded, sizes: &[u16]) {
        self.rings.clear();
        for (index, &size) in sizes.iter().enumerate() {
            let places = Places::of(index);
            // A driver starts with empty rings.
            memory.write(places.available, &[0; 4]);
            memory.write(places.used, &[0; 4]);
            self.rings.push(Ring { size, places, next_descriptor: 0, next_available: 0 });
        }
        self.next_buffer = BUFFERS;
        self.next_table = INDIRECT;
    }

    fn ring(&mut self, queue: usize) -> Option<&mut Ring> {
        let count = self.rings.len().max(1);
        self.rings.get_mut(queue % count)
    }

    fn allocate(&mut self, length: u64) -> u64 {
        if self.next_buffer + length > BUFFERS_END {
            self.next_buffer = BUFFERS;
        }
        let address = self.next_buffer;
        self.next_buffer = (address + length).next_multiple_of(8);
        address
    }

    /// Puts a request into `queue`: the device may read `readable` and write `writable` bytes.
    pub fn request(&mut self, memory: &mut Guarded, queue: usize, readable: &[u8], writable: u32, shape: &Shape) {
        let mut chain = Vec::new();
        for piece in cut(readable.len(), [usize::from(shape.readable[0]), usize::from(shape.readable[1])]) {
            let bytes = &readable[piece];
            let address = self.allocate(bytes.len() as u64);
            memory.write(address, bytes);
            chain.push((address, bytes.len() as u32, 0));
        }
        let part = |at: u8| writable as usize * usize::from(at) / 256;
        for piece in cut(writable as usize, [part(shape.writable[0]), part(shape.writable[1])]) {
            let address =
                shape.place.map_or_else(|| self.allocate(piece.len() as u64), |place| place.address().wrapping_add(piece.start as u64));
            chain.push((address, piece.len() as u32, WRITE));
        }
        if chain.is_empty() {
            return;
        }
        let spoiled = shape.spoiled.as_ref().map(|(at, hostile)| (usize::from(*at) % chain.len(), hostile));
        if shape.indirect { self.indirect(memory, queue, &chain, spoiled) } else { self.direct(memory, queue, &chain, spoiled) }
    }

    fn direct(&mut self, memory: &mut Guarded, queue: usize, chain: &[(u64, u32, u16)], spoiled: Option<(usize, &HostileDescriptor)>) {
        let Some(ring) = self.ring(queue) else { return };
        let size = ring.size.max(1);
        let head = ring.next_descriptor % size;
        ring.next_descriptor = (head + chain.len() as u16) % size;
        let table = ring.places.table;
        for (at, &(address, length, flags)) in chain.iter().enumerate() {
            let (index, next) = ((head + at as u16) % size, (head + at as u16 + 1) % size);
            let flags = if at + 1 < chain.len() { flags | NEXT } else { flags };
            let bytes = match spoiled {
                Some((place, hostile)) if place == at => hostile.bytes(),
                _ => descriptor(address, length, flags, next),
            };
            memory.write(table + u64::from(index) * 16, &bytes);
        }
        self.offer(memory, queue, head);
    }

    fn indirect(&mut self, memory: &mut Guarded, queue: usize, chain: &[(u64, u32, u16)], spoiled: Option<(usize, &HostileDescriptor)>) {
        let length = chain.len() as u64 * 16;
        if self.next_table + length > INDIRECT_END {
            self.next_table = INDIRECT;
        }
        let table = self.next_table;
        self.next_table += length;
        for (at, &(address, length, flags)) in chain.iter().enumerate() {
            let flags = if at + 1 < chain.len() { flags | NEXT } else { flags };
            let bytes = match spoiled {
                Some((place, hostile)) if place == at => hostile.bytes(),
                _ => descriptor(address, length, flags, at as u16 + 1),
            };
            memory.write(table + at as u64 * 16, &bytes);
        }
        self.direct(memory, queue, &[(table, length as u32, INDIRECT_FLAG)], None);
    }

    pub fn set_descriptor(&mut self, memory: &mut Guarded, queue: usize, index: u16, bytes: &[u8; 16]) {
        if let Some(ring) = self.ring(queue) {
            memory.write(ring.places.table + u64::from(index % ring.size.max(1)) * 16, bytes);
        }
    }

    pub fn offer(&mut self, memory: &mut Guarded, queue: usize, head: u16) {
        if let Some(ring) = self.ring(queue) {
            memory.write(ring.places.available + 4 + u64::from(ring.next_available % ring.size.max(1)) * 2, &head.to_le_bytes());
            ring.next_available = ring.next_available.wrapping_add(1);
            memory.write(ring.places.available + 2, &ring.next_available.to_le_bytes());
        }
    }

    pub fn set_available(&mut self, memory: &mut Guarded, queue: usize, index: u16) {
        if let Some(ring) = self.ring(queue) {
            ring.next_available = index;
            memory.write(ring.places.available + 2, &index.to_le_bytes());
        }
    }

    pub fn suppress(&mut self, memory: &mut Guarded, queue: usize, flags: u16, event: u16) {
        if let Some(ring) = self.ring(queue) {
            memory.write(ring.places.available, &flags.to_le_bytes());
            memory.write(ring.places.available + 4 + u64::from(ring.size) * 2, &event.to_le_bytes());
        }
    }
}

/// The pieces of `0..length` when it is cut at two places; empty ones are left out.
fn cut(length: usize, mut at: [usize; 2]) -> impl Iterator<Item = std::ops::Range<usize>> {
    at.sort_unstable();
    let [first, second] = at.map(|at| at.min(length));
    [0..first, first..second, second..length].into_iter().filter(|range| !range.is_empty())
}
