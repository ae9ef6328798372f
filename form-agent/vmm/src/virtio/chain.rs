//! Descriptor chains (virtio 1.2, section 2.7.5), read strictly.
//!
//! The chain iterator of `virtio-queue` ends a malformed chain early, so a loop or a bad index looks like a shorter request.
//! Here each of them is an error, and a chain that was read refers to guest memory only.

use std::ops::Range;

use virtio_queue::{Queue, QueueT, desc::split::Descriptor};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, bitmap::Bitmap};

use super::iovec::IoVecs;
use crate::memory::GuestMemoryMmap;

/// The longest indirect table we read. Linux makes them up to the number of segments of a request, a few hundred at most.
const INDIRECT_MAX: u32 = 1024;
const DESCRIPTOR_SIZE: u32 = 16;

/// What is wrong with a chain. Only a driver that is broken or hostile makes one.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    #[error("descriptor index {index} lies outside a table of {size}")]
    Index { index: u16, size: u16 },
    #[error("the chain is longer than its table: it loops")]
    Loop,
    #[error("an indirect descriptor with a length of {0} bytes, not 1 to 1024 entries of 16")]
    IndirectLength(u32),
    #[error("an indirect descriptor inside an indirect table, or one that has a successor")]
    IndirectNested,
    #[error("a readable descriptor after a writable one")]
    Order,
    #[error("{length} bytes at {address:#x} are not guest memory")]
    Outside { address: u64, length: u32 },
    #[error("the chain describes 4 GiB or more")]
    TooLarge,
    #[error("the descriptor table cannot be read")]
    Table(#[source] GuestMemoryError),
    #[error("bytes {from} to {to} of a buffer of {length}")]
    Range { from: usize, to: usize, length: usize },
    #[error("guest memory cannot be reached")]
    Memory(#[source] GuestMemoryError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    address: GuestAddress,
    length: u32,
}

/// Pieces of guest memory, seen as one run of bytes. Every piece was checked to lie in guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    list: Vec<Segment>,
    length: usize,
}

impl Segments {
    /// The length in bytes, below 4 GiB.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    fn clear(&mut self) {
        self.list.clear();
        self.length = 0;
    }

    fn push(&mut self, address: GuestAddress, length: u32) {
        // Empty descriptors are allowed and mean nothing.
        if length > 0 {
            self.list.push(Segment { address, length });
            self.length += length as usize;
        }
    }

    /// The pieces that make up `range`: address and length.
    fn pieces(&self, range: Range<usize>) -> Result<impl Iterator<Item = (GuestAddress, usize)> + '_, ChainError> {
        if range.start > range.end || range.end > self.length {
            return Err(ChainError::Range { from: range.start, to: range.end, length: self.length });
        }
        let mut skip = range.start;
        let mut left = range.end - range.start;
        Ok(self.list.iter().filter_map(move |segment| {
            let length = segment.length as usize;
            if skip >= length {
                skip -= length;
                return None;
            }
            let take = (length - skip).min(left);
            // Within a segment that was checked, so this cannot overflow.
            let address = segment.address.unchecked_add(skip as u64);
            skip = 0;
            left -= take;
            (take > 0).then_some((address, take))
        }))
    }

    /// Copies out of guest memory, from byte `offset` on, as many bytes as `into` has.
    ///
    /// # Errors
    /// When the segments are shorter than that.
    pub fn read(&self, memory: &GuestMemoryMmap, offset: usize, into: &mut [u8]) -> Result<(), ChainError> {
        let mut done = 0;
        for (address, length) in self.pieces(offset..offset.saturating_add(into.len()))? {
            memory.read_slice(&mut into[done..done + length], address).map_err(ChainError::Memory)?;
            done += length;
        }
        Ok(())
    }

    /// Copies `from` into guest memory, from byte `offset` on.
    ///
    /// # Errors
    /// When the segments are shorter than that.
    pub fn write(&self, memory: &GuestMemoryMmap, offset: usize, from: &[u8]) -> Result<(), ChainError> {
        let mut done = 0;
        for (address, length) in self.pieces(offset..offset.saturating_add(from.len()))? {
            memory.write_slice(&from[done..done + length], address).map_err(ChainError::Memory)?;
            done += length;
        }
        Ok(())
    }

    /// The `range` as vectors for system calls that move bytes straight from or to guest memory.
    ///
    /// # Errors
    /// When the segments are shorter than that.
    pub fn iovecs<'m>(&self, memory: &'m GuestMemoryMmap, range: Range<usize>) -> Result<IoVecs<'m>, ChainError> {
        let mut vectors = IoVecs::with_capacity(self.list.len());
        for (address, length) in self.pieces(range)? {
            for slice in GuestMemoryBackend::get_slices(memory, address, length) {
                vectors.push(slice.map_err(ChainError::Memory)?);
            }
        }
        Ok(vectors)
    }

    /// Tells the dirty log that a system call wrote the first `length` bytes.
    ///
    /// # Errors
    /// When the segments are shorter than that.
    pub fn mark_written(&self, memory: &GuestMemoryMmap, length: usize) -> Result<(), ChainError> {
        for (address, length) in self.pieces(0..length)? {
            let slice = GuestMemoryBackend::get_slice(memory, address, length).map_err(ChainError::Memory)?;
            slice.bitmap().mark_dirty(0, length);
        }
        Ok(())
    }

    /// The pieces as guest addresses and lengths, for devices that work on memory itself.
    pub fn iter(&self) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        self.list.iter().map(|segment| (segment.address, segment.length))
    }
}

/// One chain: what the device may read, then what it may write. Kept and loaded again, so that the vectors are reused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// What goes back into the used ring.
    pub head: u16,
    pub readable: Segments,
    pub writable: Segments,
}

/// Where descriptors are read from: the ring's own table, or an indirect one.
struct Table {
    address: GuestAddress,
    size: u16,
    indirect: bool,
}

impl Chain {
    /// Reads the chain that begins at `head` of `queue`'s descriptor table.
    ///
    /// # Errors
    /// When the chain is malformed or refers to anything but guest memory; the content of `self` is then unspecified.
    pub fn load(&mut self, memory: &GuestMemoryMmap, queue: &Queue, head: u16) -> Result<(), ChainError> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let mut table = Table { address: GuestAddress(queue.desc_table()), size: queue.size(), indirect: false };
        let mut index = head;
        let mut left = table.size;
        loop {
            let descriptor = table.entry(memory, index)?;
            if left == 0 {
                return Err(ChainError::Loop);
            }
            left -= 1;
            if descriptor.refers_to_indirect_table() {
                table = table.enter(&descriptor)?;
                index = 0;
                left = table.size;
                continue;
            }
            self.take(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn take(&mut self, memory: &GuestMemoryMmap, descriptor: &Descriptor) -> Result<(), ChainError> {
        let (address, length) = (descriptor.addr(), descriptor.len());
        if length > 0 && !GuestMemoryBackend::check_range(memory, address, length as usize) {
            return Err(ChainError::Outside { address: address.raw_value(), length });
        }
        if descriptor.is_write_only() {
            self.writable.push(address, length);
        } else if self.writable.is_empty() {
            self.readable.push(address, length);
        } else {
            return Err(ChainError::Order);
        }
        if self.readable.len() + self.writable.len() > u32::MAX as usize {
            return Err(ChainError::TooLarge);
        }
        Ok(())
    }
}

impl Table {
    fn entry(&self, memory: &GuestMemoryMmap, index: u16) -> Result<Descriptor, ChainError> {
        if index >= self.size {
            return Err(ChainError::Index { index, size: self.size });
        }
        let address = self
            .address
            .checked_add(u64::from(index) * u64::from(DESCRIPTOR_SIZE))
            .ok_or(ChainError::Outside { address: self.address.raw_value(), length: DESCRIPTOR_SIZE })?;
        memory.read_obj(address).map_err(ChainError::Table)
    }

    fn enter(&self, descriptor: &Descriptor) -> Result<Self, ChainError> {
        // Section 2.7.5.3.1: neither nested nor followed by another descriptor.
        if self.indirect || descriptor.has_next() {
            return Err(ChainError::IndirectNested);
        }
        let entries = descriptor.len() / DESCRIPTOR_SIZE;
        if !descriptor.len().is_multiple_of(DESCRIPTOR_SIZE) || entries == 0 || entries > INDIRECT_MAX {
            return Err(ChainError::IndirectLength(descriptor.len()));
        }
        Ok(Self { address: descriptor.addr(), size: entries as u16, indirect: true })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::{Descriptor as Raw, Driver, HIGH, INDIRECT, NEXT, WRITE, guest_memory, hostile_table, load_hostile};

    fn raw(address: u64, length: u32, flags: u16, next: u16) -> Raw {
        Raw { address, length, flags, next }
    }

    fn load(table: &[Raw], head: u16) -> Result<Chain, ChainError> {
        let driver = Driver::new(&[4]);
        for (index, descriptor) in (0..).zip(table) {
            driver.set_descriptor(0, index, *descriptor);
        }
        let mut chain = Chain::default();
        use vm_memory::GuestAddressSpace;
        chain.load(&driver.memory.memory(), &driver.queue(0), head).map(|()| chain)
    }

    #[test]
    fn a_chain_is_read_in_order() {
        let chain = load(&[raw(0x1000, 8, NEXT, 2), raw(0, 0, 0, 0), raw(0x2000, 0, NEXT, 3), raw(HIGH, 5, WRITE, 0)], 0).unwrap();
        assert_eq!(chain.readable.iter().collect::<Vec<_>>(), [(GuestAddress(0x1000), 8)]);
        assert_eq!(chain.writable.iter().collect::<Vec<_>>(), [(GuestAddress(HIGH), 5)]);
    }

    #[test]
    fn each_fault_has_its_error() {
        let here = 0x1000;
        assert!(matches!(load(&[], 4), Err(ChainError::Index { index: 4, size: 4 })));
        assert!(matches!(load(&[raw(here, 1, NEXT, 9)], 0), Err(ChainError::Index { index: 9, .. })));
        assert!(matches!(load(&[raw(here, 1, NEXT, 1), raw(here, 1, NEXT, 0)], 0), Err(ChainError::Loop)));
        assert!(matches!(load(&[raw(here, 1, NEXT | WRITE, 1), raw(here, 1, 0, 0)], 0), Err(ChainError::Order)));
        assert!(matches!(load(&[raw(HIGH - 1, 1, 0, 0)], 0), Err(ChainError::Outside { .. })));
        assert!(matches!(load(&[raw(u64::MAX, 2, 0, 0)], 0), Err(ChainError::Outside { .. })));
        assert!(matches!(load(&[raw(0, u32::MAX, 0, 0)], 0), Err(ChainError::Outside { .. })));
        assert!(matches!(load(&[raw(here, 16, INDIRECT | NEXT, 1)], 0), Err(ChainError::IndirectNested)));
        for length in [0, 8, 24, 16 * 1025] {
            assert!(matches!(load(&[raw(here, length, INDIRECT, 0)], 0), Err(ChainError::IndirectLength(_))), "{length}");
        }
        assert!(matches!(load(&[raw(HIGH - 16, 16, INDIRECT, 0)], 0), Err(ChainError::Table(_))));
    }

    #[test]
    fn an_indirect_table_is_followed_once() {
        let mut driver = Driver::new(&[4]);
        let table = driver.allocate(48);
        driver.write(table, &raw(0x1000, 3, NEXT, 2).bytes());
        driver.write(table + 32, &raw(0x2000, 4, WRITE, 0).bytes());
        driver.set_descriptor(0, 1, raw(table, 48, INDIRECT, 0));
        let memory = vm_memory::GuestAddressSpace::memory(&driver.memory);
        let mut chain = Chain::default();
        chain.load(&memory, &driver.queue(0), 1).unwrap();
        assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (1, 3, 4));

        driver.write(table, &raw(table, 16, INDIRECT, 0).bytes());
        assert!(matches!(chain.load(&memory, &driver.queue(0), 1), Err(ChainError::IndirectNested)));
    }

    #[test]
    fn bytes_are_copied_across_pieces() {
        let memory = guest_memory();
        let mut segments = Segments::default();
        for address in [0x1000, HIGH, 0x3000] {
            segments.push(GuestAddress(address), 3);
        }
        segments.write(&memory, 1, b"abcdefg").unwrap();
        let mut bytes = [0; 9];
        segments.read(&memory, 0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0abcdefg\0");
        assert!(segments.read(&memory, 1, &mut bytes).is_err());
        assert!(segments.write(&memory, usize::MAX, b"x").is_err());
        assert_eq!(segments.iovecs(&memory, 2..8).unwrap().len(), 6);
        assert!(segments.iovecs(&memory, 2..10).is_err());
    }

    proptest! {
        #[test]
        fn what_loads_lies_in_guest_memory(table in hostile_table(), head in 0_u16..20) {
            if let Some((memory, chain)) = load_hostile(&table, head, b"") {
                for (address, length) in chain.readable.iter().chain(chain.writable.iter()) {
                    prop_assert!(GuestMemoryBackend::check_range(&memory, address, length as usize));
                }
                prop_assert!(chain.readable.len() + chain.writable.len() <= u32::MAX as usize);
            }
        }
    }
}
