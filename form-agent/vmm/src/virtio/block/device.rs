//! The device and its worker.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    DiskBackend, Limiter, Payload,
    request::{
        self, DISCARD_SECTORS_MAX, HEADER, Limits, Operation, RANGES_MAX, Request, RequestError, SECTOR, SERIAL, Status, ZEROES_SECTORS_MAX,
    },
    state::{self, BlockState},
};
use crate::memory::GuestMemoryMmap;
use crate::{
    control::DiskMetrics,
    virtio::{
        Activation, DeviceError, VirtioDevice,
        chain::Chain,
        features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, read_config},
        ring::{Fault, Ring, Session, rings},
        task::{Exit, Poller, Task},
        worker::WorkerKind,
    },
};

const QUEUE_SIZE: u16 = 256;
/// Header and status take a descriptor each.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const EXIT: u64 = 0;
const KICK: u64 = 1;
const LIMITS: u64 = 2;

/// Completions the driver may have to wait for while we go on with the next request.
const NOTIFY_EVERY: u32 = 8;

/// What a disk has done since boot.
#[derive(Debug, Default)]
pub struct Counters {
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    pub fn metrics(&self, id: &str) -> DiskMetrics {
        DiskMetrics {
            id: id.to_owned(),
            read_bytes: self.read_bytes.load(Relaxed),
            written_bytes: self.written_bytes.load(Relaxed),
            reads: self.reads.load(Relaxed),
            writes: self.writes.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
    }
}

/// A disk.
pub struct Block {
    id: String,
    serial: [u8; SERIAL],
    limits: Limits,
    counters: Arc<Counters>,
    limiter: Limiter,
    /// `None` while the worker has it.
    backend: Option<Box<dyn DiskBackend>>,
    worker: Option<Task<BlockWorker>>,
}

impl Block {
    /// A disk whose content is `backend`, without limits. Of `serial` the first 20 bytes count.
    ///
    /// # Errors
    /// When the operating system has no eventfd left.
    pub fn new(id: String, serial: &str, backend: Box<dyn DiskBackend>, read_only: bool) -> io::Result<Self> {
        let mut padded = [0; SERIAL];
        let length = serial.len().min(SERIAL);
        padded[..length].copy_from_slice(&serial.as_bytes()[..length]);
        Ok(Self {
            id,
            serial: padded,
            limits: Limits { sectors: backend.size() / SECTOR, read_only, discard: !read_only && backend.can_discard() },
            counters: Arc::default(),
            limiter: Limiter::new()?,
            backend: Some(backend),
            worker: None,
        })
    }

    /// What sets the limits of the disk, also while it works.
    pub fn limiter(&self) -> Limiter {
        self.limiter.clone()
    }

    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Puts other storage with the same content under the disk. Only between `stop` and `activate`.
    ///
    /// # Errors
    /// When the device runs, or the size differs; the old backend is kept.
    pub fn replace_backend(&mut self, backend: Box<dyn DiskBackend>) -> Result<Box<dyn DiskBackend>, DeviceError> {
        let refuse =
            |reason: &'static str| DeviceError::Io { device: "block", context: reason, source: io::ErrorKind::InvalidInput.into() };
        if backend.size() / SECTOR != self.limits.sectors {
            return Err(refuse("the new storage has another size"));
        }
        let old = self.backend.replace(backend);
        old.ok_or_else(|| {
            self.backend = None;
            refuse("the disk is in use: pause the VM first")
        })
    }

    #[cfg(test)]
    pub(super) fn set_limiter(&mut self, limiter: Limiter) {
        self.limiter = limiter;
    }

    fn state(&self) -> BlockState {
        let end = self.serial.iter().position(|byte| *byte == 0).unwrap_or(SERIAL);
        BlockState {
            version: state::VERSION,
            serial: String::from_utf8_lossy(&self.serial[..end]).into_owned(),
            sectors: self.limits.sectors,
            read_only: self.limits.read_only,
        }
    }

    /// `struct virtio_blk_config` (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        config[0..8].copy_from_slice(&self.limits.sectors.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        // Eight logical blocks a physical one: page cache and file systems of the host work in 4 KiB.
        config[24] = 3;
        config[26..28].copy_from_slice(&8_u16.to_le_bytes());
        config[32] = 1; // writeback
        config[34..36].copy_from_slice(&1_u16.to_le_bytes());
        if self.limits.discard {
            config[36..40].copy_from_slice(&DISCARD_SECTORS_MAX.to_le_bytes());
            config[40..44].copy_from_slice(&(RANGES_MAX as u32).to_le_bytes());
            config[44..48].copy_from_slice(&8_u32.to_le_bytes());
        }
        config[48..52].copy_from_slice(&ZEROES_SECTORS_MAX.to_le_bytes());
        config[52..56].copy_from_slice(&(RANGES_MAX as u32).to_le_bytes());
        config[56] = 1; // write_zeroes_may_unmap
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        2
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        let mut features = VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY;
        if self.limits.read_only {
            features |= F_RO;
        } else {
            features |= F_WRITE_ZEROES;
        }
        if self.limits.discard {
            features |= F_DISCARD;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // Section 5.2.5.2: a driver that cannot flush relies on every write being stable.
        let write_through = activation.features & F_FLUSH == 0;
        let (session, rings) = rings("block", &self.id, activation, 1)?;
        let ([ring], Some(backend)) = (<[Ring; 1]>::try_from(rings).map_err(|rings| too_many(rings.len()))?, self.backend.take()) else {
            return Err(DeviceError::State { device: "block", reason: "an earlier failure took the disk's storage".into() });
        };
        let worker = BlockWorker {
            session,
            ring,
            backend,
            serial: self.serial,
            limits: self.limits,
            counters: Arc::clone(&self.counters),
            limiter: self.limiter.clone(),
            write_through,
        };
        // When the thread cannot start the backend is lost with it: the disk then stays out of order.
        let task = Task::start(WorkerKind::Block, &self.id, move |exit| worker.run(exit)).map_err(|source| DeviceError::Io {
            device: "block",
            context: "could not start the disk's thread",
            source,
        })?;
        self.worker = Some(task);
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue, EventFd)> {
        let Some(worker) = self.worker.take().and_then(Task::stop) else {
            return Vec::new();
        };
        self.backend = Some(worker.backend);
        vec![worker.ring.into_parts()]
    }

    fn grow(&mut self, size_bytes: u64) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Io { device: "block", context: "cannot make the disk larger", source };
        if self.limits.read_only {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is read-only")));
        }
        let Some(backend) = &mut self.backend else {
            return Err(failed(io::Error::other("an earlier failure took the disk's storage")));
        };
        backend.grow(size_bytes).map_err(failed)?;
        self.limits.sectors = backend.size() / SECTOR;
        Ok(())
    }

    fn save(&self) -> serde_json::Value {
        serde_json::to_value(self.state()).unwrap_or_default()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        self.state().check(state)
    }
}

fn too_many(found: usize) -> DeviceError {
    DeviceError::Queues { device: "block", needed: 1, found }
}

/// Everything the disk's thread holds; it gives all of it back when it stops.
struct BlockWorker {
    session: Session,
    ring: Ring,
    backend: Box<dyn DiskBackend>,
    serial: [u8; SERIAL],
    limits: Limits,
    counters: Arc<Counters>,
    limiter: Limiter,
    write_through: bool,
}

impl BlockWorker {
    fn run(mut self, exit: &Exit) -> Self {
        if let Err(fault) = self.serve(exit) {
            self.session.report(&fault);
        }
        // What is saved or copied while the device rests is complete.
        if !self.limits.read_only
            && let Err(error) = self.backend.flush()
        {
            eprintln!("{}: could not flush: {error}", self.session.id);
        }
        self
    }

    fn serve(&mut self, exit: &Exit) -> Result<(), Fault> {
        let host = |source| Fault::Host { context: "could not wait for the driver", source };
        let mut poller = Poller::new(3).map_err(host)?;
        poller.add(exit.as_raw_fd(), EXIT, EventSet::IN).map_err(host)?;
        poller.add(self.ring.kick_fd(), KICK, EventSet::IN).map_err(host)?;
        poller.add(self.limiter.0.as_raw_fd(), LIMITS, EventSet::IN).map_err(host)?;
        let mut chain = Chain::default();
        // First without a kick: after a pause requests may be waiting.
        let mut limited = self.drain(exit, &mut chain)?;
        while !exit.requested() {
            let events = poller.wait(limited).map_err(host)?;
            let mut look = events.is_empty();
            for event in events {
                match event.data() {
                    KICK => self.ring.take_kick(),
                    LIMITS => self.limiter.0.take_event(),
                    _ => continue,
                }
                look = true;
            }
            if look {
                limited = self.drain(exit, &mut chain)?;
            }
        }
        Ok(())
    }

    /// Serves what the driver made available until there is no more, or the limits of the disk are reached: then it gives the time after
    /// which the next request, which stays in the ring, may be served. The driver is not asked to kick meanwhile.
    fn drain(&mut self, exit: &Exit, chain: &mut Chain) -> Result<Option<Duration>, Fault> {
        let mut memory = self.session.memory.memory();
        loop {
            self.ring.disarm(&memory)?;
            let mut waiting = 0;
            let mut limited = None;
            while !exit.requested() && {
                memory = self.session.memory.memory();
                self.ring.pop(&memory, chain)?
            } {
                let request = self.parse(&memory, chain)?;
                if let Err(wait) = self.limiter.take(request.cost(chain)) {
                    self.ring.undo_pop(1);
                    limited = Some(wait);
                    break;
                }
                let written = self.perform(&memory, chain, &request)?;
                self.ring.complete(&memory, chain.head, written)?;
                waiting += 1;
                if waiting == NOTIFY_EVERY {
                    self.ring.notify(&memory)?;
                    waiting = 0;
                }
            }
            if waiting > 0 {
                self.ring.notify(&memory)?;
            }
            if limited.is_some() {
                return Ok(limited);
            }
            if !self.ring.arm(&memory)? || exit.requested() {
                return Ok(None);
            }
        }
    }

    fn parse(&self, memory: &GuestMemoryMmap, chain: &Chain) -> Result<Request, Fault> {
        request::parse(memory, chain, self.limits).map_err(|error| match error {
            RequestError::TooShort { .. } => Fault::Request("a block request without room for header and status"),
            RequestError::Chain(source) => Fault::Chain { index: 0, source },
        })
    }

    /// Does what the chain asks for and writes the status; gives the number of bytes written to guest memory.
    fn perform(&mut self, memory: &GuestMemoryMmap, chain: &Chain, request: &Request) -> Result<usize, Fault> {
        let status_at = chain.writable.len() - 1;
        let (status, data) = match request {
            Request::Refuse(status) => (*status, 0),
            Request::Perform(operation) => match self.execute(memory, chain, operation) {
                Ok(data) => (Status::Ok, data),
                Err(error) => {
                    // A full disk fails every write: the first is told, and then ever fewer.
                    if (self.counters.errors.load(Relaxed) + 1).is_power_of_two() {
                        eprintln!("{}: {operation:?} failed: {error}", self.session.id);
                    }
                    (Status::IoError, 0)
                }
            },
        };
        if status != Status::Ok {
            self.counters.errors.fetch_add(1, Relaxed);
        }
        // A read that failed may have written any part of it.
        let changed = if status == Status::Ok { data } else { status_at };
        chain
            .writable
            .mark_written(memory, changed)
            .and_then(|()| chain.writable.write(memory, status_at, &[status as u8]))
            .map_err(|source| Fault::Chain { index: 0, source })?;
        // The length counts bytes written from the start on; the status is the very last one.
        Ok(if data == status_at { data + 1 } else { data })
    }

    /// Gives the number of bytes of data written to guest memory.
    fn execute(&mut self, memory: &GuestMemoryMmap, chain: &Chain, operation: &Operation) -> io::Result<usize> {
        let counters = &self.counters;
        match operation {
            Operation::Read { offset } => {
                let payload = Payload::new(memory, &chain.writable, 0..chain.writable.len() - 1).map_err(io::Error::other)?;
                self.backend.read(*offset, &payload)?;
                counters.reads.fetch_add(1, Relaxed);
                counters.read_bytes.fetch_add(payload.len() as u64, Relaxed);
                return Ok(payload.len());
            }
            Operation::Write { offset } => {
                let payload = Payload::new(memory, &chain.readable, HEADER..chain.readable.len()).map_err(io::Error::other)?;
                self.backend.write(*offset, &payload)?;
                counters.writes.fetch_add(1, Relaxed);
                counters.written_bytes.fetch_add(payload.len() as u64, Relaxed);
                self.settle()?;
            }
            Operation::Flush => {
                self.backend.flush()?;
                counters.flushes.fetch_add(1, Relaxed);
            }
            Operation::GetId => {
                let length = SERIAL.min(chain.writable.len() - 1);
                chain.writable.write(memory, 0, &self.serial[..length]).map_err(io::Error::other)?;
                return Ok(length);
            }
            Operation::Discard(extents) => {
                for extent in extents {
                    self.backend.discard(extent.offset, extent.length)?;
                }
                self.settle()?;
            }
            Operation::WriteZeroes { extents, unmap } => {
                for extent in extents {
                    self.backend.write_zeroes(extent.offset, extent.length, *unmap)?;
                }
                self.settle()?;
            }
        }
        Ok(0)
    }

    fn settle(&mut self) -> io::Result<()> {
        if self.write_through { self.backend.flush() } else { Ok(()) }
    }
}
