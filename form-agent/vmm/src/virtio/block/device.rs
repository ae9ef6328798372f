//! The device.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::{
    DiskBackend, Limiter,
    request::{DISCARD_SECTORS_MAX, Limits, RANGES_MAX, SECTOR, SERIAL, ZEROES_SECTORS_MAX},
    state::{self, BlockState},
    uring::Uring,
    worker::Worker,
};
use crate::{
    control::DiskMetrics,
    virtio::{
        Activation, DeviceError, VirtioDevice,
        features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, read_config},
        ring::{Ring, rings},
        task::Task,
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

/// What a disk has done since boot.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) errors: AtomicU64,
    /// Whether requests can be under way in the kernel ([`Uring`]).
    io_uring: AtomicBool,
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
            io_uring: self.io_uring.load(Relaxed),
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
    /// Of a disk that has a use for one, if there was one; `None` also while the worker has it.
    uring: Option<Uring>,
    worker: Option<Task<Worker>>,
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
        let uring = backend.file().and_then(|_| Uring::take());
        Ok(Self {
            id,
            serial: padded,
            limits: Limits { sectors: backend.size() / SECTOR, read_only, discard: !read_only && backend.can_discard() },
            counters: Arc::default(),
            limiter: Limiter::new()?,
            backend: Some(backend),
            uring,
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
    pub(super) fn set_uring(&mut self, uring: Option<Uring>) {
        self.uring = uring;
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
        let uring = self.uring.take().filter(|_| backend.file().is_some());
        self.counters.io_uring.store(uring.is_some(), Relaxed);
        let worker = Worker {
            session,
            ring,
            backend,
            uring,
            serial: self.serial,
            limits: self.limits,
            counters: Arc::clone(&self.counters),
            limiter: self.limiter.clone(),
            write_through,
            untold: 0,
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
        self.uring = worker.uring;
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
