//! The modern virtio transport over PCI (virtio 1.2, section 4.1): one 64-bit BAR with the common configuration, the interrupt
//! status, the device's own configuration, the doorbells and the MSI-X table.

mod common;
mod interrupt;
mod state;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use self::common::{Common, Written};
use self::interrupt::PciInterrupt;
pub use self::state::{QueueSave, VirtioPciState};
use super::{Activation, DeviceError, GuestMemory, Interrupt, KernelTerms, VirtioDevice};
use crate::pci::PciDevice;
use crate::pci::config_space::{BAR0, COMMAND, ConfigSpace, Identity};
use crate::pci::interrupts::Router;
use crate::pci::msix::Msix;

const VENDOR: u16 = 0x1AF4;
/// Modern devices have 0x1040 plus their type.
const DEVICE_BASE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 9;

/// Size of the BAR and places in it.
pub const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const COMMON_SIZE: u64 = 0x40;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
/// Bytes between two doorbells.
const NOTIFY_MULTIPLIER: u32 = 4;

/// `cfg_type` of the capabilities.
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

const EVENT_IDX: u64 = 1 << 29;

/// Lets KVM signal an eventfd when the guest writes to an address.
pub trait Doorbells: Send + Sync {
    /// # Errors
    /// When KVM refuses.
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()>;
    fn detach(&self, address: u64, event: &EventFd);
}

/// Asks the main thread to activate devices: only it may start threads.
pub struct Activations {
    requests: Mutex<Vec<usize>>,
    pub event: EventFd,
}

impl Activations {
    /// # Errors
    /// When the operating system has no eventfd left.
    pub fn new() -> io::Result<Self> {
        Ok(Activations { requests: Mutex::new(Vec::new()), event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)? })
    }

    /// The devices to activate, by the slot that [`VirtioPci::new`] was given.
    #[must_use]
    pub fn take(&self) -> Vec<usize> {
        let _ = self.event.read();
        std::mem::take(&mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn request(&self, device: usize) {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push(device);
        // Fails only when the counter would overflow, and then it is readable anyway.
        let _ = self.event.write(1);
    }
}

/// What a transport needs from the VM.
pub struct Host {
    pub memory: GuestMemory,
    pub router: Arc<dyn Router>,
    pub doorbells: Arc<dyn Doorbells>,
    pub activations: Arc<Activations>,
    pub kernel: Arc<KernelTerms>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The driver has not said DRIVER_OK.
    Idle,
    /// DRIVER_OK was said; the device does not work yet, or works no more because the VM is paused.
    Ready,
    /// The device works.
    Active,
}

pub struct VirtioPci {
    slot: usize,
    device: Box<dyn VirtioDevice>,
    host: Host,
    config: ConfigSpace,
    common: Common,
    interrupt: Arc<PciInterrupt>,
    msix_at: usize,
    access_at: usize,
    kicks: Vec<EventFd>,
    /// Where the doorbells are attached now.
    attached: Option<u64>,
    needs_reset: Arc<AtomicBool>,
    phase: Phase,
    /// Interrupts may have been on their way when the state was saved.
    restored: bool,
}

impl VirtioPci {
    /// Wraps `device`, whose BAR lies at `address`. `slot` names it in [`Activations`].
    ///
    /// # Errors
    /// When the operating system has no eventfd left.
    pub fn new(slot: usize, device: Box<dyn VirtioDevice>, address: u64, host: Host) -> io::Result<Self> {
        let kind = device.device_type();
        let queues = device.queue_sizes().to_vec();
        let kicks = queues.iter().map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)).collect::<io::Result<Vec<_>>>()?;
        let msix = Msix::new(queues.len() as u16 + 1, Arc::clone(&host.router));
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind as u16,
            revision: 1,
            class: class_of(kind),
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_BASE + kind as u16,
        });
        config.set_bar(address, BAR_SIZE);
        let msix_at = msix.add_capability(&mut config, MSIX_TABLE as u32, MSIX_PENDING as u32);
        add_window(&mut config, CAP_COMMON, COMMON, COMMON_SIZE, &[]);
        add_window(&mut config, CAP_NOTIFY, NOTIFY, PAGE, &NOTIFY_MULTIPLIER.to_le_bytes());
        add_window(&mut config, CAP_ISR, ISR, 1, &[]);
        add_window(&mut config, CAP_DEVICE, DEVICE, PAGE, &[]);
        let access_at = add_window(&mut config, CAP_PCI, 0, 0, &[0; 4]);
        let interrupt = Arc::new(PciInterrupt::new(msix, queues.len()));
        let common = Common::new(device.features(), &queues, Arc::clone(&interrupt));
        Ok(VirtioPci {
            slot,
            device,
            host,
            config,
            common,
            interrupt,
            msix_at,
            access_at,
            kicks,
            attached: None,
            needs_reset: Arc::new(AtomicBool::new(false)),
            phase: Phase::Idle,
            restored: false,
        })
    }

    #[must_use]
    pub fn id(&self) -> &str {
        self.device.id()
    }

    /// Starts the device if its driver is ready. Called on the main thread.
    pub fn activate(&mut self) {
        if self.phase != Phase::Ready {
            return;
        }
        if self.try_activate().is_ok() {
            self.phase = Phase::Active;
            if std::mem::take(&mut self.restored) {
                self.raise_again();
            }
        } else {
            self.fail();
        }
    }

    fn try_activate(&mut self) -> Result<(), DeviceError> {
        let device_error = |context| move |source| DeviceError::Io { device: "virtio-pci", context, source };
        let memory = self.host.memory.memory();
        let mut queues = Vec::new();
        for (index, (registers, kick)) in self.common.queues.iter().zip(&self.kicks).enumerate() {
            if !registers.ready {
                continue;
            }
            let state = QueueState { event_idx_enabled: self.common.driver_features & EVENT_IDX != 0, ..*registers };
            let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "not in guest memory, or misaligned");
            let queue = Queue::try_from(state).map_err(|_| device_error("bad queue")(invalid()))?;
            if !queue.is_valid(&*memory) {
                return Err(device_error("bad queue")(invalid()));
            }
            let kick = kick.try_clone().map_err(device_error("cannot copy a queue's eventfd"))?;
            // What was put into the queue before counts as a kick.
            kick.write(1).map_err(device_error("cannot signal a queue's eventfd"))?;
            queues.push((index as u16, queue, kick));
        }
        self.device.activate(Activation {
            memory: self.host.memory.clone(),
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            queues,
            features: self.common.driver_features,
            needs_reset: Arc::clone(&self.needs_reset),
            kernel: Arc::clone(&self.host.kernel),
        })
    }

    /// KVM injects some interrupts from a thread of its own, so one that was raised just before the save may be in no saved state. A
    /// driver takes one too many for what it is: a reason to look.
    fn raise_again(&self) {
        for (index, queue) in (0..).zip(&self.common.queues) {
            if queue.ready {
                // What cannot be raised could not be raised before either.
                let _ = self.interrupt.queue(index);
            }
        }
        let _ = self.interrupt.config();
    }

    /// Stops the device, shows DEVICE_NEEDS_RESET and tells the driver to look.
    fn fail(&mut self) {
        if self.phase == Phase::Active {
            // The driver has to set the queues up again.
            drop(self.device.stop());
        }
        self.needs_reset.store(true, Ordering::Release);
        self.phase = Phase::Idle;
        let _ = self.interrupt.config();
    }

    /// Stops the device; its queues stand still until [`VirtioPci::activate`].
    pub fn pause(&mut self) {
        if self.phase == Phase::Active {
            for (index, queue, _kick) in self.device.stop() {
                if let Some(registers) = self.common.queues.get_mut(usize::from(index)) {
                    *registers = QueueState { ready: registers.ready, ..queue.state() };
                }
            }
            self.phase = Phase::Ready;
        }
    }

    /// Stops the device and starts it again, as what it was told meanwhile has it. Call only while the VM runs.
    pub fn restart(&mut self) {
        self.pause();
        self.activate();
    }

    /// Makes a disk larger, and tells its driver. Call only while the VM runs.
    ///
    /// # Errors
    /// When the device has no size, is larger already, or its storage cannot grow; it goes on as it was.
    pub fn grow(&mut self, size_bytes: u64) -> Result<(), DeviceError> {
        self.pause();
        let grown = self.device.grow(size_bytes);
        self.activate();
        grown?;
        self.interrupt.config().map_err(|source| DeviceError::Io { device: "virtio-pci", context: "cannot tell the driver", source })
    }

    /// State to go on from elsewhere. Call only while paused.
    #[must_use]
    pub fn save(&self) -> VirtioPciState {
        VirtioPciState {
            config: self.config.bytes().to_vec(),
            vectors: self.interrupt.msix.save(),
            interrupt_status: self.interrupt.status(),
            common: self.common.save(),
            needs_reset: self.needs_reset.load(Ordering::Acquire),
            device: self.device.save(),
        }
    }

    /// Takes saved state; [`VirtioPci::activate`] then goes on where it was. Call only on a device that was never activated.
    ///
    /// # Errors
    /// When the state is another device's.
    pub fn restore(&mut self, state: &VirtioPciState) -> Result<(), DeviceError> {
        let wrong = |reason: &str| DeviceError::State { device: "virtio-pci", reason: reason.to_owned() };
        self.config.restore(&state.config).map_err(wrong)?;
        self.interrupt.msix.restore(&state.vectors).map_err(wrong)?;
        self.common.restore(&state.common).map_err(wrong)?;
        self.interrupt.set_status(state.interrupt_status);
        self.needs_reset.store(state.needs_reset, Ordering::Release);
        self.device.restore(&state.device)?;
        self.interrupt.msix.control_written(&self.config, self.msix_at).map_err(|error| wrong(&error.to_string()))?;
        self.move_doorbells();
        self.phase = if self.common.driver_ok() && !state.needs_reset { Phase::Ready } else { Phase::Idle };
        self.restored = self.phase == Phase::Ready;
        Ok(())
    }

    fn reset(&mut self) {
        if self.phase == Phase::Active {
            drop(self.device.stop());
        }
        self.phase = Phase::Idle;
        self.common.reset();
        self.interrupt.reset();
        self.needs_reset.store(false, Ordering::Release);
        for kick in &self.kicks {
            // Drains; empty is fine.
            let _ = kick.read();
        }
    }

    /// Keeps the doorbells where the BAR is. One that KVM refuses still works: the write then arrives as an exit.
    fn move_doorbells(&mut self) {
        let wanted = self.config.memory().and_then(|(start, size)| start.checked_add(size).map(|_| start));
        if wanted == self.attached {
            return;
        }
        if let Some(start) = self.attached.take() {
            for (index, kick) in self.kicks.iter().enumerate() {
                self.host.doorbells.detach(doorbell(start, index), kick);
            }
        }
        if let Some(start) = wanted {
            for (index, kick) in self.kicks.iter().enumerate() {
                let _ = self.host.doorbells.attach(doorbell(start, index), kick);
            }
            self.attached = Some(start);
        }
    }

    /// The window that the configuration access capability opens onto the BAR: offset and length, if the driver set up a valid one.
    fn access_window(&self) -> Option<(u64, usize)> {
        let bytes = &self.config.bytes()[self.access_at..self.access_at + 16];
        let bar = bytes[4];
        let offset = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        let length = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]) as usize;
        let valid = bar == 0 && matches!(length, 1 | 2 | 4) && u64::from(offset) + length as u64 <= BAR_SIZE;
        valid.then_some((u64::from(offset), length))
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match self.common.write(offset, data) {
            Written::Nothing => {}
            Written::Reset => self.reset(),
            Written::DriverOk => {
                self.phase = Phase::Ready;
                self.host.activations.request(self.slot);
            }
        }
    }
}

impl Drop for VirtioPci {
    /// A device that is taken away leaves nothing in KVM; its vectors go with [`Msix`].
    fn drop(&mut self) {
        if let Some(start) = self.attached.take() {
            for (index, kick) in self.kicks.iter().enumerate() {
                self.host.doorbells.detach(doorbell(start, index), kick);
            }
        }
    }
}

impl PciDevice for VirtioPci {
    fn read_config(&mut self, register: u16) -> u32 {
        if usize::from(register) == self.access_at + 16
            && let Some((offset, length)) = self.access_window()
        {
            let mut data = [0u8; 4];
            self.read_memory(offset, &mut data[..length]);
            return u32::from_le_bytes(data);
        }
        self.config.read(register)
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let (start, end) = (usize::from(offset), usize::from(offset) + data.len());
        if start < COMMAND + 2 && end > COMMAND || start < BAR0 + 8 && end > BAR0 {
            self.move_doorbells();
        }
        if start < self.msix_at + 4 && end > self.msix_at + 2 && self.interrupt.msix.control_written(&self.config, self.msix_at).is_err() {
            self.fail();
        }
        if start == self.access_at + 16
            && let Some((target, length)) = self.access_window().filter(|(_, length)| *length <= data.len())
        {
            self.write_memory(target, &data[..length]);
        }
    }

    fn memory(&self) -> Option<(u64, u64)> {
        self.config.memory()
    }

    fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => self.common.read(offset, self.needs_reset.load(Ordering::Acquire), data),
            ISR..DEVICE => {
                if let (ISR, Some(first)) = (offset, data.first_mut()) {
                    *first = self.interrupt.take_status();
                }
            }
            DEVICE..NOTIFY => self.device.read_config(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PENDING => self.interrupt.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PENDING..BAR_SIZE => self.interrupt.msix.read_pending(offset - MSIX_PENDING, data),
            _ => {}
        }
    }

    fn write_memory(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(offset, data),
            DEVICE..NOTIFY => self.device.write_config(offset - DEVICE, data),
            NOTIFY..MSIX_TABLE => {
                if let Some(kick) = self.kicks.get(((offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER)) as usize) {
                    let _ = kick.write(1);
                }
            }
            MSIX_TABLE..MSIX_PENDING if self.interrupt.msix.write_table(offset - MSIX_TABLE, data).is_err() => self.fail(),
            _ => {}
        }
    }
}

fn doorbell(bar: u64, queue: usize) -> u64 {
    bar + NOTIFY + queue as u64 * u64::from(NOTIFY_MULTIPLIER)
}

/// Adds a virtio capability (virtio 1.2, section 4.1.4) that points into BAR 0. For the configuration access capability everything
/// behind the type is the driver's to write.
fn add_window(config: &mut ConfigSpace, kind: u8, offset: u64, length: u64, more: &[u8]) -> usize {
    let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(more);
    let mut writable = vec![0u8; body.len()];
    if kind == CAP_PCI {
        writable[2] = 0xFF;
        writable[6..].fill(0xFF);
    }
    config.add_capability(VENDOR_CAPABILITY, &body, &writable)
}

/// PCI class, subclass and interface: only for people who look.
fn class_of(kind: u32) -> u32 {
    match kind {
        1 => 0x02_00_00,
        2 => 0x01_80_00,
        _ => 0xFF_00_00,
    }
}

#[cfg(test)]
mod tests;
