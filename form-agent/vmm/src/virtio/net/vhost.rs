//! vhost-net: the host's kernel moves the packets between the tap and guest memory, without a thread of ours (linux/vhost.h). KVM tells it of the
//! driver's kicks and takes its interrupts.
//!
//! These are a dozen ioctls, made here as the tap's are: rust-vmm's `vhost` crate adds a trait for each backend that there is and a memory
//! model of its own, and what is hard (where the rings stand, what was written) is the caller's with it too.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::{Arc, atomic::Ordering},
};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    memory::{GuestMemoryMmap, log::WriteLog},
    virtio::{
        Activation, GuestMemory, Interrupt,
        features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1},
    },
};

// From linux/vhost.h: _IO, _IOR, _IOW and _IOWR of VHOST_VIRTIO, 0xAF.
const GET_FEATURES: libc::c_ulong = 0x8008_AF00;
const SET_FEATURES: libc::c_ulong = 0x4008_AF00;
const SET_OWNER: libc::c_ulong = 0xAF01;
const SET_MEM_TABLE: libc::c_ulong = 0x4008_AF03;
const SET_LOG_BASE: libc::c_ulong = 0x4008_AF04;
const SET_VRING_NUM: libc::c_ulong = 0x4008_AF10;
const SET_VRING_ADDR: libc::c_ulong = 0x4028_AF11;
const SET_VRING_BASE: libc::c_ulong = 0x4008_AF12;
const GET_VRING_BASE: libc::c_ulong = 0xC008_AF12;
const SET_VRING_KICK: libc::c_ulong = 0x4008_AF20;
const SET_VRING_CALL: libc::c_ulong = 0x4008_AF21;
const NET_SET_BACKEND: libc::c_ulong = 0x4008_AF30;

const F_MRG_RXBUF: u64 = 1 << 15;
/// `VHOST_F_LOG_ALL`: the kernel notes which pages it writes to.
const F_LOG_ALL: u64 = 1 << 26;
/// `VHOST_VRING_F_LOG`: also when they are the used ring's.
const RING_IS_LOGGED: u32 = 1;
/// What of the negotiated features is between the driver and whoever works on the rings; all else is the tap's.
const OF_RINGS: u64 = VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC | F_MRG_RXBUF;
/// The kernel knows the length of the tap's header by the first. Without the second it leaves the number of buffers in that header as it was
/// (before Linux 6.14), against section 5.1.6.4.
const NEEDED: u64 = VERSION_1 | F_MRG_RXBUF;
/// More the module does not take unless it is told to (`max_mem_regions`).
const REGIONS_MAX: usize = 64;

/// `struct vhost_memory` with room for all regions.
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; REGIONS_MAX],
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest: u64,
    size: u64,
    address: u64,
    flags: u64,
}

/// `struct vhost_vring_state`, and, with a descriptor as its value, `struct vhost_vring_file`.
#[repr(C)]
struct RingValue {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// A queue, its index, and the eventfd of its kicks.
type OneRing = (u16, Queue, EventFd);

/// What is working, until it is stopped.
struct Running {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    queues: Vec<OneRing>,
    log: Option<WriteLog>,
}

/// `/dev/vhost-net`, opened for one interface.
pub struct Vhost {
    /// None after it did not do what it was told: only closed it surely does nothing more.
    fd: Option<OwnedFd>,
    /// It works in the name of this process, which can be said once.
    is_owned: bool,
    running: Option<Running>,
}

impl Vhost {
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd: Some(fd), is_owned: false, running: None }
    }

    /// Has the kernel move packets between the rings of `activation` and `tap`. `false`: it cannot for this driver.
    ///
    /// # Errors
    /// Those of the ioctls; nothing is begun then.
    pub fn start(&mut self, activation: &Activation, tap: RawFd) -> io::Result<bool> {
        let features = activation.features & OF_RINGS;
        let log = if activation.kernel.notes() { F_LOG_ALL } else { 0 };
        let memory = activation.memory.memory();
        let is_pair = activation.queues.iter().map(|(index, ..)| *index).eq([0, 1]);
        if !is_pair || features & NEEDED != NEEDED || memory.num_regions() > REGIONS_MAX {
            return Ok(false);
        }
        let mut known = 0_u64;
        self.ioctl(GET_FEATURES, &mut known)?;
        if (features | log) & !known != 0 {
            return Ok(false);
        }
        if !self.is_owned {
            self.ioctl(SET_OWNER, &mut ())?;
            self.is_owned = true;
        }
        self.ioctl(SET_FEATURES, &mut (features | log))?;
        self.ioctl(SET_MEM_TABLE, &mut table(&memory))?;
        let log = (log != 0).then(|| WriteLog::new(&memory));
        if let Some(log) = &log {
            self.ioctl(SET_LOG_BASE, &mut log.address())?;
        }
        let begun = self.begin(activation, &memory, log.is_some(), tap);
        match begun {
            Ok(queues) => {
                let (memory, interrupt) = (activation.memory.clone(), Arc::clone(&activation.interrupt));
                self.running = Some(Running { memory, interrupt, queues, log });
                Ok(true)
            }
            Err(error) => {
                // Whether or not it could be stopped, the first error is what is told.
                let _ = self.end(&*activation.interrupt);
                // What it may have written before it was stopped.
                if let Some(log) = log {
                    log.merge(&memory);
                }
                Err(error)
            }
        }
    }

    fn begin(&self, activation: &Activation, memory: &GuestMemoryMmap, is_logged: bool, tap: RawFd) -> io::Result<Vec<OneRing>> {
        let mut queues = Vec::with_capacity(activation.queues.len());
        for (index, queue, kick) in &activation.queues {
            let call = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            let ring = |value: u32| RingValue { index: u32::from(*index), value };
            self.ioctl(SET_VRING_NUM, &mut ring(u32::from(queue.size())))?;
            self.ioctl(SET_VRING_BASE, &mut ring(u32::from(queue.next_avail())))?;
            self.ioctl(SET_VRING_ADDR, &mut addresses(*index, queue, memory, is_logged)?)?;
            self.ioctl(SET_VRING_CALL, &mut ring(call.as_raw_fd().cast_unsigned()))?;
            self.ioctl(SET_VRING_KICK, &mut ring(kick.as_raw_fd().cast_unsigned()))?;
            activation.interrupt.direct(*index, Some(&call))?;
            queues.push((*index, Queue::try_from(queue.state()).map_err(io::Error::other)?, kick.try_clone()?));
        }
        for (index, _, kick) in &queues {
            self.set_backend(*index, tap)?;
            // What was kicked before the kernel had the tap it has let pass.
            kick.write(1)?;
        }
        Ok(queues)
    }

    /// Has the kernel stop, and gives the queues back as they stand. `None` when it did not run. An error leaves it of no further use.
    pub fn stop(&mut self) -> Option<(Vec<OneRing>, io::Result<()>)> {
        let Running { memory, interrupt, mut queues, log } = self.running.take()?;
        let mut result = self.end(&*interrupt);
        let memory = memory.memory();
        for (index, queue, _) in &mut queues {
            let mut ring = RingValue { index: u32::from(*index), value: 0 };
            let used = queue.used_idx(&*memory, Ordering::Acquire).map_or(queue.next_used(), |used| used.0);
            let taken = self.ioctl(GET_VRING_BASE, &mut ring).map(|()| ring.value);
            set_positions(queue, taken.as_ref().ok().copied(), used);
            result = result.and(taken.map(|_| ()));
        }
        if let Some(log) = log {
            log.merge(&memory);
        }
        Some((queues, result))
    }

    /// Waits until the kernel is done with what it began; it begins nothing more.
    fn end(&mut self, interrupt: &dyn Interrupt) -> io::Result<()> {
        let ended = self.set_backend(0, -1).and_then(|()| self.set_backend(1, -1));
        if ended.is_err() {
            self.fd = None;
        }
        // Nobody signals any more.
        ended.and(interrupt.direct(0, None)).and(interrupt.direct(1, None))
    }

    fn set_backend(&self, index: u16, tap: RawFd) -> io::Result<()> {
        self.ioctl(NET_SET_BACKEND, &mut RingValue { index: u32::from(index), value: tap.cast_unsigned() })
    }

    /// `argument` is what linux/vhost.h names for `request`.
    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        let fd = self.fd.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        // SAFETY: each request of this module reads or writes no more than the structure that it is given here, which is laid out as in
        // linux/vhost.h and outlives the call. What they name beyond it lives as long as the kernel works on it: guest memory and the log
        // until `end`, and the descriptors are taken over by the kernel.
        if unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A device that is dropped while the kernel works leaves nothing that works on: guest memory may go after it.
impl Drop for Vhost {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

/// Where a split ring stands after the kernel worked on it. What it took it has also used: it holds nothing back. `taken` is unknown when it
/// would not say; then the used ring is what is known.
fn set_positions(queue: &mut Queue, taken: Option<u32>, used: u16) {
    let taken = taken.and_then(|taken| u16::try_from(taken).ok());
    queue.set_next_avail(taken.unwrap_or(used));
    queue.set_next_used(used);
}

fn table(memory: &GuestMemoryMmap) -> MemoryTable {
    let mut table = MemoryTable { count: memory.num_regions() as u32, padding: 0, regions: [MemoryRegion::default(); REGIONS_MAX] };
    for (entry, region) in table.regions.iter_mut().zip(memory.iter()) {
        *entry = MemoryRegion { guest: region.start_addr().0, size: region.len(), address: region.as_ptr() as u64, flags: 0 };
    }
    table
}

/// Where the parts of a queue lie in this process (section 2.7).
fn addresses(index: u16, queue: &Queue, memory: &GuestMemoryMmap, is_logged: bool) -> io::Result<RingAddresses> {
    let size = usize::from(queue.size());
    let place = |address: u64, bytes: usize| {
        let slice = memory.get_slice(GuestAddress(address), bytes).map_err(io::Error::other)?;
        Ok::<_, io::Error>(slice.ptr_guard().as_ptr() as u64)
    };
    Ok(RingAddresses {
        index: u32::from(index),
        flags: if is_logged { RING_IS_LOGGED } else { 0 },
        descriptors: place(queue.desc_table(), 16 * size)?,
        // Behind the rings are two bytes for the other's event.
        used: place(queue.used_ring(), 4 + 8 * size + 2)?,
        available: place(queue.avail_ring(), 4 + 2 * size + 2)?,
        log: queue.used_ring(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, HIGH, guest_memory};

    #[test]
    fn the_kernels_structures_have_its_sizes() {
        assert_eq!((size_of::<MemoryRegion>(), size_of::<RingValue>(), size_of::<RingAddresses>()), (32, 8, 0x28));
        assert_eq!(size_of::<MemoryTable>(), 8 + 32 * REGIONS_MAX);
    }

    #[test]
    fn rings_go_on_where_the_kernel_left_them() {
        let driver = Driver::new(&[256]);
        let mut queue = driver.queue(0);
        for (taken, used, expected) in
            [(Some(7), 7, (7, 7)), (Some(0xffff), 0xffff, (0xffff, 0xffff)), (None, 9, (9, 9)), (Some(1 << 16), 3, (3, 3))]
        {
            set_positions(&mut queue, taken, used);
            assert_eq!((queue.next_avail(), queue.next_used()), expected);
        }
    }

    #[test]
    fn the_kernel_is_told_where_memory_and_rings_lie_here() {
        let memory = guest_memory();
        let table = table(&memory);
        let guest: Vec<_> = table.regions[..2].iter().map(|region| (region.guest, region.size)).collect();
        assert_eq!((table.count, guest), (2, vec![(0, 8 << 20), (HIGH, 1 << 20)]));
        let driver = Driver::new(&[256]);
        let queue = driver.queue(0);
        let memory = driver.memory.memory();
        let begin = memory.iter().next().unwrap().as_ptr() as u64;
        let found = addresses(1, &queue, &memory, true).unwrap();
        assert_eq!((found.descriptors - begin, found.used - begin), (queue.desc_table(), queue.used_ring()));
        assert_eq!((found.index, found.flags, found.log), (1, RING_IS_LOGGED, queue.used_ring()));
        let mut outside = driver.queue(0);
        outside.try_set_used_ring_address(GuestAddress((8 << 20) - 8)).unwrap();
        assert!(addresses(0, &outside, &memory, false).is_err(), "it ends in no memory");
    }

    #[test]
    fn what_is_no_vhost_is_refused_and_nothing_is_begun() {
        let mut vhost = Vhost::new(std::fs::File::open("/dev/null").unwrap().into());
        let driver = Driver::new(&[256, 256]);
        assert!(vhost.start(&driver.activation(OF_RINGS), 0).is_err());
        assert!(!vhost.start(&driver.activation(VERSION_1), 0).unwrap(), "a driver that it does not suit");
        assert!(vhost.stop().is_none());
    }
}
