//! A queue in the hands of a device's worker.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Activation, DeviceError, GuestMemory, Interrupt,
    chain::{Chain, ChainError},
};
use crate::memory::GuestMemoryMmap;

/// Why a device can do no more until its driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("queue {index}: the driver broke the ring")]
    Ring {
        index: u16,
        #[source]
        source: virtio_queue::Error,
    },
    #[error("queue {index}: the driver made a malformed descriptor chain")]
    Chain {
        index: u16,
        #[source]
        source: ChainError,
    },
    #[error("{0}")]
    Request(&'static str),
    #[error("{context}")]
    Host {
        context: &'static str,
        #[source]
        source: io::Error,
    },
}

/// A queue, the eventfd that the driver kicks, and the way back to the driver.
pub struct Ring {
    index: u16,
    queue: Queue,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
}

impl Ring {
    pub fn new(index: u16, queue: Queue, kick: EventFd, interrupt: Arc<dyn Interrupt>) -> Self {
        Self { index, queue, kick, interrupt }
    }

    /// The queue as it stands.
    pub fn into_parts(self) -> (u16, Queue, EventFd) {
        (self.index, self.queue, self.kick)
    }

    pub fn index(&self) -> u16 {
        self.index
    }

    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes the kick that epoll announced.
    pub fn take_kick(&self) {
        // Only this thread reads it and only after epoll said so; a failure means that there was nothing to take.
        let _ = self.kick.read();
    }

    /// Takes the next chain the driver made available. `false`: there is none.
    ///
    /// # Errors
    /// When the ring or the chain is malformed.
    pub fn pop(&mut self, memory: &GuestMemoryMmap, chain: &mut Chain) -> Result<bool, Fault> {
        let index = self.index;
        let head = match self.queue.iter(memory).map_err(|source| Fault::Ring { index, source })?.next() {
            Some(found) => found.head_index(),
            None => return Ok(false),
        };
        chain.load(memory, &self.queue, head).map_err(|source| Fault::Chain { index, source })?;
        Ok(true)
    }

    /// Gives back the last `count` chains taken, as if they had never been.
    pub fn undo_pop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Returns a chain into which `written` bytes were written.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn complete(&mut self, memory: &GuestMemoryMmap, head: u16, written: usize) -> Result<(), Fault> {
        // A chain describes less than 4 GiB.
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.queue.add_used(memory, head, written).map_err(|source| self.fault(source))
    }

    /// Interrupts the driver if it asked for that.
    ///
    /// # Errors
    /// When the ring cannot be read or the interrupt not be sent.
    pub fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        let index = self.index;
        if self.queue.needs_notification(memory).map_err(|source| Fault::Ring { index, source })? {
            self.interrupt.queue(self.index).map_err(|source| Fault::Host { context: "could not interrupt the guest", source })?;
        }
        Ok(())
    }

    /// Asks the driver not to kick: we are looking at the ring anyway.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn disarm(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        self.queue.disable_notification(memory).map_err(|source| self.fault(source))
    }

    /// Asks the driver to kick again. `true` when chains arrived meanwhile: look once more.
    ///
    /// # Errors
    /// When the rings cannot be reached.
    pub fn arm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Fault> {
        self.queue.enable_notification(memory).map_err(|source| self.fault(source))
    }

    fn fault(&self, source: virtio_queue::Error) -> Fault {
        Fault::Ring { index: self.index, source }
    }
}

/// What a worker needs beside its rings: the guest's memory and the ways to tell the driver.
pub struct Session {
    pub id: String,
    pub memory: GuestMemory,
    pub interrupt: Arc<dyn Interrupt>,
    pub needs_reset: Arc<AtomicBool>,
}

impl Session {
    /// Tells driver and operator, once, that the device stopped working until it is reset.
    pub fn report(&self, fault: &Fault) {
        if self.needs_reset.swap(true, Ordering::AcqRel) {
            return;
        }
        let source = std::error::Error::source(fault).map(|source| format!(": {source}")).unwrap_or_default();
        eprintln!("{}: {fault}{source}; the device waits for the driver to reset it", self.id);
        // Section 2.1.2: a change of the status is announced as a configuration change. If that fails the driver sees it when it next looks.
        let _ = self.interrupt.config();
    }
}

/// Takes the rings of a device out of its activation, ordered by index.
///
/// # Errors
/// When the driver set up fewer than `needed`, or one that does not lie in guest memory.
pub fn rings(device: &'static str, id: &str, activation: Activation, needed: usize) -> Result<(Session, Vec<Ring>), DeviceError> {
    let found = activation.queues.len();
    if found < needed {
        return Err(DeviceError::Queues { device, needed, found });
    }
    let memory = activation.memory.memory();
    if !activation.queues.iter().all(|(_, queue, _)| queue.is_valid(&*memory)) {
        return Err(DeviceError::Io {
            device,
            context: "the driver set up a queue outside guest memory",
            source: io::ErrorKind::InvalidInput.into(),
        });
    }
    let interrupt = activation.interrupt;
    let mut rings: Vec<Ring> =
        activation.queues.into_iter().map(|(index, queue, kick)| Ring::new(index, queue, kick, Arc::clone(&interrupt))).collect();
    rings.sort_by_key(Ring::index);
    let session = Session { id: id.to_owned(), memory: activation.memory, interrupt, needs_reset: activation.needs_reset };
    Ok((session, rings))
}
