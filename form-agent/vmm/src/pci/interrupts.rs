//! Interrupt routes of the VM: the fixed lines of the IOAPIC and the message-signalled interrupts of the PCI devices. KVM takes all
//! routes at once, so this keeps them together.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

/// Lines 0 to 23 are the IOAPIC's.
pub const IOAPIC_LINES: u32 = 24;
/// `KVM_MAX_IRQ_ROUTES` is 4096.
const LINES: u32 = 4096;

/// A message that raises an interrupt: what the guest wrote into the MSI-X table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

/// What MSI-X needs from the VM. A trait so that the table can be tested without KVM.
pub trait Router: Send + Sync {
    /// A line of its own for one vector, raised by signalling `event`.
    ///
    /// # Errors
    /// When all lines are taken.
    fn allocate(&self) -> io::Result<u32>;
    /// From now on `event` raises `line`, which sends `message`.
    ///
    /// # Errors
    /// When KVM refuses.
    fn connect(&self, line: u32, event: &EventFd, message: Message) -> io::Result<()>;
    fn release(&self, line: u32, event: &EventFd);
    /// From now on `event` raises `line` too, which is connected. What was signalled before raises it at once.
    ///
    /// # Errors
    /// When KVM refuses.
    fn attach(&self, line: u32, event: &EventFd) -> io::Result<()>;
    /// From now on `event` keeps what is signalled; all that was signalled before has been raised.
    fn detach(&self, line: u32, event: &EventFd);
}

#[derive(Default)]
struct Table {
    messages: BTreeMap<u32, Message>,
    /// Lines whose eventfd KVM listens to.
    connected: std::collections::BTreeSet<u32>,
    next: u32,
    free: Vec<u32>,
}

/// The routes of one VM.
pub struct Interrupts {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

impl Interrupts {
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Interrupts { vm, table: Mutex::new(Table { next: IOAPIC_LINES, ..Table::default() }) }
    }

    /// An eventfd that raises a line of the IOAPIC as an edge.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn edge(&self, line: u32) -> io::Result<EventFd> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.vm.register_irqfd(&event, line).map_err(io_error)?;
        Ok(event)
    }

    fn apply(&self, table: &Table) -> io::Result<()> {
        let mut entries = Vec::with_capacity(IOAPIC_LINES as usize + table.messages.len());
        for line in 0..IOAPIC_LINES {
            let irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin: line };
            entries.push(kvm_irq_routing_entry {
                gsi: line,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip },
                ..Default::default()
            });
        }
        for (line, message) in &table.messages {
            let msi = kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            };
            entries.push(kvm_irq_routing_entry {
                gsi: *line,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
                ..Default::default()
            });
        }
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        self.vm.set_gsi_routing(&routing).map_err(io_error)
    }
}

impl Router for Interrupts {
    fn allocate(&self) -> io::Result<u32> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = table.free.pop() {
            return Ok(line);
        }
        if table.next >= LINES {
            return Err(io::Error::other("all interrupt lines are taken"));
        }
        table.next += 1;
        Ok(table.next - 1)
    }

    fn connect(&self, line: u32, event: &EventFd, message: Message) -> io::Result<()> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.messages.insert(line, message) != Some(message) {
            self.apply(&table)?;
        }
        if table.connected.insert(line) {
            self.vm.register_irqfd(event, line).map_err(io_error)?;
        }
        Ok(())
    }

    fn release(&self, line: u32, event: &EventFd) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.connected.remove(&line) {
            // It was registered with these arguments, which is all that can be wrong.
            let _ = self.vm.unregister_irqfd(event, line);
        }
        table.messages.remove(&line);
        table.free.push(line);
    }

    fn attach(&self, line: u32, event: &EventFd) -> io::Result<()> {
        self.vm.register_irqfd(event, line).map_err(io_error)
    }

    fn detach(&self, line: u32, event: &EventFd) {
        // It was attached with these arguments, which is all that can be wrong.
        let _ = self.vm.unregister_irqfd(event, line);
    }
}

pub(crate) fn io_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
