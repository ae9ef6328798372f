//! The contract between a virtio device and its transport (virtio 1.2, sections 2 and 3).

pub mod balloon;
pub mod block;
pub mod chain;
pub mod features;
pub mod iovec;
pub mod limit;
pub mod mem;
pub mod net;
pub mod pci;
pub mod ring;
pub mod rng;
pub mod task;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use virtio_queue::Queue;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemoryMmap;

/// Guest memory changes while the VM runs ([`mem`]): a device looks it up anew for each chain that it takes from a queue, since the driver may
/// have got the memory that the chain names after the one before.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Tells the guest that something happened. The transport implements it with MSI-X over irqfd; tests with a counter.
pub trait Interrupt: Send + Sync {
    /// The used ring of queue `index` has grown. The device has already consulted `Queue::needs_notification`.
    fn queue(&self, index: u16) -> std::io::Result<()>;
    /// The configuration space has changed.
    fn config(&self) -> std::io::Result<()>;
    /// From now on whoever signals `event` raises the interrupt of queue `index` as well, without this process: at once, or when the driver
    /// unmasks it. `None`: nobody does any more; what was signalled is not lost.
    ///
    /// # Errors
    /// When the transport cannot do that.
    fn direct(&self, _index: u16, _event: Option<&EventFd>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// On what terms the host's kernel may work on guest memory in the place of a device's worker (vhost). The main thread changes them between a
/// device's `stop` and `activate`.
#[derive(Debug)]
pub struct KernelTerms {
    may: AtomicBool,
    notes: AtomicBool,
}

impl Default for KernelTerms {
    fn default() -> Self {
        Self { may: AtomicBool::new(true), notes: AtomicBool::new(false) }
    }
}

impl KernelTerms {
    /// Not at all from now on: it would have to be told of each block of memory that comes and goes, and takes few of them.
    pub fn forbid(&self) {
        self.may.store(false, Ordering::Release);
    }

    #[must_use]
    pub fn may(&self) -> bool {
        self.may.load(Ordering::Acquire)
    }

    /// It has to note what it writes from now on, for [`crate::memory::changes`].
    pub fn must_note(&self) {
        self.notes.store(true, Ordering::Release);
    }

    #[must_use]
    pub fn notes(&self) -> bool {
        self.notes.load(Ordering::Acquire)
    }
}

/// Everything a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    pub memory: GuestMemory,
    pub interrupt: Arc<dyn Interrupt>,
    /// One entry a queue that the driver enabled: its index, the queue itself and the eventfd that the driver's kick signals (ioeventfd).
    pub queues: Vec<(u16, Queue, EventFd)>,
    /// The features that the driver acknowledged.
    pub features: u64,
    /// Set by a device that met a request it cannot recover from: the transport then shows DEVICE_NEEDS_RESET.
    pub needs_reset: Arc<AtomicBool>,
    pub kernel: Arc<KernelTerms>,
}

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the driver set up {found} queues, {device} needs {needed}")]
    Queues { device: &'static str, needed: usize, found: usize },
    #[error("{device}: {context}")]
    Io {
        device: &'static str,
        context: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{device}: the saved state does not fit: {reason}")]
    State { device: &'static str, reason: String },
}

/// A virtio device. Its worker runs on a thread of its own between `activate` and `stop`; everything else is called by the
/// transport on a vCPU thread or the main thread, never two calls at once.
pub trait VirtioDevice: Send {
    /// The virtio device id (virtio 1.2, section 5): 1 network, 2 block, 4 entropy, 5 balloon, 19 socket, 24 memory.
    fn device_type(&self) -> u32;
    /// For thread names, messages and metrics.
    fn id(&self) -> &str;
    /// Features offered; `VIRTIO_F_VERSION_1` must be among them.
    fn features(&self) -> u64;
    /// The largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Reads from the device-specific configuration space; beyond its end, zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes to the device-specific configuration space; what may not be written is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The driver is ready: start working. Called on the main thread; threads are started with [`worker::spawn`].
    ///
    /// # Errors
    /// When the device cannot work with what the driver set up; the transport then shows DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// Finish what is in flight, stop the worker and give the queues back as they stand (driver reset, pause, save). Empty when
    /// the device is not active. After it the device can be activated again.
    fn stop(&mut self) -> Vec<(u16, Queue, EventFd)>;
    /// Makes a disk larger. Called only between `stop` and `activate`; the transport then tells the driver.
    ///
    /// # Errors
    /// When the device has no size, is larger already, or its storage cannot grow.
    fn grow(&mut self, _size_bytes: u64) -> Result<(), DeviceError> {
        let source = std::io::ErrorKind::Unsupported.into();
        Err(DeviceError::Io { device: "virtio", context: "only disks can grow", source })
    }
    /// The device's own state beside its queues, as versioned JSON. Called only between `stop` and `activate`.
    fn save(&self) -> serde_json::Value;
    /// # Errors
    /// When the state is of another version or another device.
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError>;
}
