//! What the device may write, found by another reading of the rings than the device's own, and a more generous one: whatever
//! any entry of an available ring leads to.

use std::collections::BTreeSet;

use super::memory::Guarded;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A queue as the transport's registers show it.
#[derive(Clone, Copy, Debug)]
pub struct QueueRegisters {
    pub size: u16,
    pub table: u64,
    pub available: u64,
    pub used: u64,
}

/// Ranges as start and length.
#[derive(Default)]
pub struct Permitted {
    writable: BTreeSet<(u64, u64)>,
    /// Where the device reads what to do.
    structures: BTreeSet<(u64, u64)>,
}

impl Permitted {
    pub fn clear(&mut self) {
        self.writable.clear();
        self.structures.clear();
    }

    /// Adds what the queue permits as it is now.
    pub fn add(&mut self, memory: &Guarded, queue: QueueRegisters) {
        let size = u64::from(queue.size);
        self.writable.insert((queue.used, 6 + 8 * size));
        self.structures.insert((queue.table, 16 * size));
        self.structures.insert((queue.available, 6 + 2 * size));
        let heads: BTreeSet<u16> = (0..size)
            .filter_map(|at| memory.read_u16(queue.available.checked_add(4 + at * 2)?))
            .filter(|head| *head < queue.size)
            .collect();
        for head in heads {
            self.walk(memory, queue.table, queue.size, head, true);
        }
    }

    fn walk(&mut self, memory: &Guarded, table: u64, size: u16, head: u16, enter: bool) {
        let mut index = head;
        for _ in 0..size {
            let entry = table.checked_add(u64::from(index) * 16).and_then(|address| memory.read(address, 16));
            let Some(entry) = entry.filter(|_| index < size) else { return };
            let number = |from: usize, to: usize| entry[from..to].iter().rev().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
            let (address, length, flags, next) = (number(0, 8), number(8, 12), number(12, 14) as u16, number(14, 16) as u16);
            if flags & INDIRECT != 0 {
                if enter {
                    let entries = (length / 16).min(1024);
                    self.structures.insert((address, length));
                    self.walk(memory, address, entries as u16, 0, false);
                }
                return;
            }
            if flags & WRITE != 0 {
                self.writable.insert((address, length));
            }
            if flags & NEXT == 0 {
                return;
            }
            index = next;
        }
    }

    /// The ranges; `None` when the guest let the device write where it reads what to do: then nothing can be said beforehand.
    pub fn ranges(&self) -> Option<Vec<(u64, u64)>> {
        let overlap =
            |one: &(u64, u64), other: &(u64, u64)| one.0 < other.0.saturating_add(other.1) && other.0 < one.0.saturating_add(one.1);
        let tangled = self.writable.iter().any(|range| self.structures.iter().any(|structure| overlap(range, structure)));
        (!tangled).then(|| self.writable.iter().copied().collect())
    }
}
