//! How a device's interrupts reach the guest.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use crate::pci::msix::{Msix, NO_VECTOR};
use crate::virtio::Interrupt;
use vmm_sys_util::eventfd::EventFd;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Shared by the transport and the device's threads.
pub struct PciInterrupt {
    pub msix: Msix,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    status: AtomicU8,
    generation: AtomicU8,
}

impl PciInterrupt {
    pub fn new(msix: Msix, queues: usize) -> Self {
        PciInterrupt {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
        }
    }

    /// Reading the interrupt status clears it.
    pub fn take_status(&self) -> u8 {
        let direct = if self.msix.take_direct() { ISR_QUEUE } else { 0 };
        self.status.swap(0, Ordering::AcqRel) | direct
    }

    /// The interrupt status, to be saved: this does not clear it.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    pub fn set_status(&self, status: u8) {
        self.status.store(status & (ISR_QUEUE | ISR_CONFIG), Ordering::Release);
    }

    /// Changes whenever the device's configuration does.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// A vector that does not exist reads back as none (virtio 1.2, section 4.1.5.1.2.1).
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::Release);
    }

    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.existing(vector), Ordering::Release);
            // What KVM does not take is raised by nobody, and a driver that changes vectors under way does so at its own risk.
            let _ = self.msix.move_direct(queue, self.queue_vector(queue));
        }
    }

    pub fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.status.store(0, Ordering::Release);
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    fn raise(&self, vector: u16, status: u8) -> io::Result<()> {
        if self.msix.enabled() {
            return if vector == NO_VECTOR { Ok(()) } else { self.msix.trigger(vector) };
        }
        self.status.fetch_or(status, Ordering::AcqRel);
        Ok(())
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) -> io::Result<()> {
        self.raise(self.queue_vector(index), ISR_QUEUE)
    }

    fn config(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.config_vector(), ISR_CONFIG)
    }

    fn direct(&self, index: u16, event: Option<&EventFd>) -> io::Result<()> {
        self.msix.set_direct(index, self.queue_vector(index), event)
    }
}
