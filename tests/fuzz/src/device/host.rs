//! What the transport gets from the VM, without KVM.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use form_vmm::{
    pci::interrupts::{Message, Router},
    virtio::pci::Doorbells,
};
use vmm_sys_util::eventfd::EventFd;

/// Gives away so many interrupt lines and then no more.
pub struct Lines(AtomicU32);

impl Default for Lines {
    fn default() -> Self {
        Self(AtomicU32::new(64))
    }
}

impl Router for Lines {
    fn allocate(&self) -> io::Result<u32> {
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        taken.map_err(|_| io::Error::other("all interrupt lines are taken"))
    }

    fn connect(&self, _line: u32, _event: &EventFd, _message: Message) -> io::Result<()> {
        Ok(())
    }

    fn release(&self, _line: u32, _event: &EventFd) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn attach(&self, _line: u32, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _line: u32, _event: &EventFd) {}
}

/// The doorbells by address, in the place of KVM.
#[derive(Default)]
pub struct Bells(Mutex<BTreeMap<u64, EventFd>>);

impl Bells {
    /// Rings doorbell `index`, if it is attached.
    pub fn ring(&self, index: usize) {
        let bells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bell) = bells.values().nth(index) {
            let _ = bell.write(1);
        }
    }
}

impl Doorbells for Bells {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(address, event.try_clone()?);
        Ok(())
    }

    fn detach(&self, address: u64, _event: &EventFd) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
    }
}
