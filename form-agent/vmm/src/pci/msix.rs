//! MSI-X: the table of messages, the pending bits, and the way from a device's interrupt to KVM (PCI Local Bus 3.0, section 6.8.2).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::config_space::ConfigSpace;
use super::interrupts::{Message, Router};

pub const CAPABILITY: u8 = 0x11;
const ENTRY: usize = 16;
/// Message control, from the start of the capability.
const CONTROL: usize = 2;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
/// `msix_vector` value for "none".
pub const NO_VECTOR: u16 = 0xFFFF;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorState {
    pub address: u64,
    pub data: u32,
    pub masked: bool,
    pub pending: bool,
}

struct Vector {
    message: Message,
    masked: bool,
    pending: bool,
    /// Made when the guest first unmasks the vector: most vectors are never used.
    route: Option<(u32, EventFd)>,
}

/// An eventfd that somebody outside this process signals to raise a vector (vhost). While the vector is open KVM listens to it; while it is masked
/// what is signalled stays in the eventfd, which so is the pending bit.
struct Direct {
    vector: u16,
    event: EventFd,
    /// Where KVM listens to it.
    line: Option<u32>,
}

impl Direct {
    fn is_pending(&self) -> bool {
        // SAFETY: the eventfd is open as long as `self` is borrowed.
        let event = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        let mut polled = [rustix::event::PollFd::from_borrowed_fd(event, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        self.line.is_none() && rustix::event::poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

struct Table {
    vectors: Vec<Vector>,
    /// By the queue that they are of.
    direct: BTreeMap<u16, Direct>,
    enabled: bool,
    masked: bool,
}

/// The MSI-X table of one device. Device threads trigger vectors while vCPUs change the table.
pub struct Msix {
    table: Mutex<Table>,
    router: Arc<dyn Router>,
}

impl Msix {
    #[must_use]
    pub fn new(vectors: u16, router: Arc<dyn Router>) -> Self {
        let vectors = (0..vectors).map(|_| Vector { message: Message::default(), masked: true, pending: false, route: None }).collect();
        Msix { table: Mutex::new(Table { vectors, direct: BTreeMap::new(), enabled: false, masked: false }), router }
    }

    /// Adds the capability; table and pending bits lie in BAR 0 at these offsets. Returns the capability's offset.
    pub fn add_capability(&self, config: &mut ConfigSpace, table: u32, pending: u32) -> usize {
        let size = self.lock().vectors.len() as u16;
        let mut body = [0u8; 10];
        body[0..2].copy_from_slice(&(size - 1).to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..10].copy_from_slice(&pending.to_le_bytes());
        config.add_capability(CAPABILITY, &body, &(CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes())
    }

    /// Looks at message control again after the guest may have written it. `at` is the capability's offset.
    ///
    /// # Errors
    /// When KVM refuses a route.
    pub fn control_written(&self, config: &ConfigSpace, at: usize) -> io::Result<()> {
        let control = u16::from_le_bytes([config.bytes()[at + CONTROL], config.bytes()[at + CONTROL + 1]]);
        let mut table = self.lock();
        table.enabled = control & CONTROL_ENABLE != 0;
        table.masked = control & CONTROL_MASK_ALL != 0;
        (0..table.vectors.len()).try_for_each(|index| self.settle(&mut table, index))
    }

    /// Reads from the table; accesses are four or eight bytes, aligned.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let table = self.lock();
        let Some(vector) = table.vectors.get(offset as usize / ENTRY) else { return };
        let mut entry = [0u8; ENTRY];
        entry[..8].copy_from_slice(&vector.message.address.to_le_bytes());
        entry[8..12].copy_from_slice(&vector.message.data.to_le_bytes());
        entry[12] = u8::from(vector.masked);
        let start = offset as usize % ENTRY;
        if let Some(bytes) = entry.get(start..start + data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    /// Writes to the table. Accesses that are not four or eight bytes and aligned are undefined by the specification: ignored.
    ///
    /// # Errors
    /// When KVM refuses a route.
    pub fn write_table(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (index, field) = (offset as usize / ENTRY, offset as usize % ENTRY);
        let mut table = self.lock();
        let Some(vector) = table.vectors.get_mut(index) else { return Ok(()) };
        match (field, data) {
            (_, [a, b, c, d]) if field % 4 == 0 => vector.write(field, u32::from_le_bytes([*a, *b, *c, *d])),
            (0 | 8, [a, b, c, d, e, f, g, h]) => {
                vector.write(field, u32::from_le_bytes([*a, *b, *c, *d]));
                vector.write(field + 4, u32::from_le_bytes([*e, *f, *g, *h]));
            }
            _ => return Ok(()),
        }
        self.settle(&mut table, index)
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let index = (offset as usize).saturating_add(index);
            *byte = (0..8).fold(0, |bits, bit| {
                let number = index.saturating_mul(8).saturating_add(bit);
                let direct = || table.direct.values().any(|direct| usize::from(direct.vector) == number && direct.is_pending());
                let pending = table.vectors.get(number).is_some_and(|vector| vector.pending || direct());
                bits | u8::from(pending) << bit
            });
        }
    }

    /// Whether the guest uses MSI-X at all.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.lock().enabled
    }

    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.lock().vectors.len() as u16
    }

    /// Raises `vector`: at once, or when the guest unmasks it.
    ///
    /// # Errors
    /// When the eventfd cannot be signalled.
    pub fn trigger(&self, vector: u16) -> io::Result<()> {
        let mut table = self.lock();
        let open = table.enabled && !table.masked;
        let Some(vector) = table.vectors.get_mut(usize::from(vector)) else { return Ok(()) };
        match &vector.route {
            Some((_, event)) if open && !vector.masked => event.write(1),
            _ => {
                vector.pending = true;
                Ok(())
            }
        }
    }

    /// From now on `event` raises `vector` in the name of `queue`; `None`: nothing does any more, and what was signalled meanwhile is pending.
    ///
    /// # Errors
    /// When KVM refuses, or the eventfd cannot be copied.
    pub fn set_direct(&self, queue: u16, vector: u16, event: Option<&EventFd>) -> io::Result<()> {
        let event = event.map(EventFd::try_clone).transpose()?;
        let mut table = self.lock();
        if let Some(old) = table.direct.remove(&queue) {
            self.end(&mut table, &old);
        }
        let Some(event) = event else { return Ok(()) };
        table.direct.insert(queue, Direct { vector, event, line: None });
        self.settle_existing(&mut table, vector)
    }

    /// The queue has another vector; nothing when none of its eventfds raises one.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn move_direct(&self, queue: u16, vector: u16) -> io::Result<()> {
        let mut table = self.lock();
        let Some(direct) = table.direct.get_mut(&queue) else { return Ok(()) };
        if let Some(line) = direct.line.take() {
            self.router.detach(line, &direct.event);
        }
        direct.vector = vector;
        self.settle_existing(&mut table, vector)
    }

    /// Whether somebody signalled an eventfd while the guest does not use MSI-X; it is asked once.
    pub fn take_direct(&self) -> bool {
        let table = self.lock();
        !table.enabled && table.direct.values().filter(|direct| direct.event.read().is_ok()).count() > 0
    }

    fn end(&self, table: &mut Table, old: &Direct) {
        match old.line {
            Some(line) => self.router.detach(line, &old.event),
            None if old.event.read().is_ok() => {
                if let Some(vector) = table.vectors.get_mut(usize::from(old.vector)) {
                    vector.pending = true;
                }
            }
            None => {}
        }
    }

    fn settle_existing(&self, table: &mut Table, vector: u16) -> io::Result<()> {
        if usize::from(vector) < table.vectors.len() { self.settle(table, usize::from(vector)) } else { Ok(()) }
    }

    /// Has KVM listen at `line` to what raises the vector `index` directly; `None`: nowhere.
    fn listen(&self, table: &mut Table, index: usize, line: Option<u32>) -> io::Result<()> {
        for direct in table.direct.values_mut().filter(|direct| usize::from(direct.vector) == index && direct.line != line) {
            if let Some(old) = direct.line.take() {
                self.router.detach(old, &direct.event);
            }
            if let Some(line) = line {
                self.router.attach(line, &direct.event)?;
                direct.line = Some(line);
            }
        }
        Ok(())
    }

    /// The table as the guest filled it.
    pub fn save(&self) -> Vec<VectorState> {
        let table = self.lock();
        let save = |vector: &Vector| VectorState {
            address: vector.message.address,
            data: vector.message.data,
            masked: vector.masked,
            pending: vector.pending,
        };
        table.vectors.iter().map(save).collect()
    }

    /// Takes saved vectors; message control follows by [`Msix::control_written`].
    ///
    /// # Errors
    /// When the number of vectors differs.
    pub fn restore(&self, saved: &[VectorState]) -> Result<(), &'static str> {
        let mut table = self.lock();
        if saved.len() != table.vectors.len() {
            return Err("another number of interrupt vectors");
        }
        for (vector, saved) in table.vectors.iter_mut().zip(saved) {
            vector.message = Message { address: saved.address, data: saved.data };
            vector.masked = saved.masked;
            vector.pending = saved.pending;
        }
        Ok(())
    }

    /// Brings KVM in step with one vector and delivers what was pending.
    fn settle(&self, table: &mut Table, index: usize) -> io::Result<()> {
        let open = table.enabled && !table.masked;
        let vector = &mut table.vectors[index];
        if !open || vector.masked {
            return self.listen(table, index, None);
        }
        if vector.route.is_none() {
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            vector.route = Some((self.router.allocate()?, event));
        }
        let Some((line, event)) = &vector.route else { return Ok(()) };
        self.router.connect(*line, event, vector.message)?;
        if std::mem::take(&mut vector.pending) {
            event.write(1)?;
        }
        let line = *line;
        self.listen(table, index, Some(line))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        let table = self.lock();
        for direct in table.direct.values() {
            if let Some(line) = direct.line {
                self.router.detach(line, &direct.event);
            }
        }
        for vector in &table.vectors {
            if let Some((line, event)) = &vector.route {
                self.router.release(*line, event);
            }
        }
    }
}

impl Vector {
    fn write(&mut self, field: usize, value: u32) {
        match field {
            0 => self.message.address = self.message.address & !0xFFFF_FFFF | u64::from(value & !3),
            4 => self.message.address = self.message.address & 0xFFFF_FFFF | u64::from(value) << 32,
            8 => self.message.data = value,
            _ => self.masked = value & 1 != 0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::pci::config_space::Identity;

    /// Remembers routes instead of asking KVM.
    #[derive(Default)]
    pub struct FakeRouter {
        pub connected: Mutex<Vec<(u32, Message)>>,
        events: Mutex<Vec<(u32, EventFd)>>,
        pub attached: Mutex<Vec<(u32, i32)>>,
        next: Mutex<u32>,
        /// No further line can be had.
        pub full: std::sync::atomic::AtomicBool,
    }

    impl FakeRouter {
        /// How often a line was raised since the last call.
        pub fn raised(&self, line: u32) -> u64 {
            let events = self.events.lock().unwrap();
            events.iter().find(|(known, _)| *known == line).map_or(0, |(_, event)| event.read().unwrap_or(0))
        }
    }

    impl Router for FakeRouter {
        fn allocate(&self) -> io::Result<u32> {
            if self.full.load(std::sync::atomic::Ordering::SeqCst) {
                return Err(io::Error::other("all interrupt lines are taken"));
            }
            let mut next = self.next.lock().unwrap();
            *next += 1;
            Ok(*next - 1)
        }
        fn connect(&self, line: u32, event: &EventFd, message: Message) -> io::Result<()> {
            self.connected.lock().unwrap().push((line, message));
            self.events.lock().unwrap().push((line, event.try_clone()?));
            Ok(())
        }
        fn release(&self, line: u32, _event: &EventFd) {
            self.events.lock().unwrap().retain(|(known, _)| *known != line);
        }
        fn attach(&self, line: u32, event: &EventFd) -> io::Result<()> {
            self.attached.lock().unwrap().push((line, event.as_raw_fd()));
            Ok(())
        }
        fn detach(&self, line: u32, event: &EventFd) {
            self.attached.lock().unwrap().retain(|attached| *attached != (line, event.as_raw_fd()));
        }
    }

    struct Rig {
        msix: Msix,
        router: Arc<FakeRouter>,
        config: ConfigSpace,
        at: usize,
    }

    fn rig() -> Rig {
        let router = Arc::new(FakeRouter::default());
        let msix = Msix::new(3, Arc::clone(&router) as Arc<dyn Router>);
        let mut config = ConfigSpace::new(Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 });
        let at = msix.add_capability(&mut config, 0x4000, 0x5000);
        Rig { msix, router, config, at }
    }

    impl Rig {
        fn control(&mut self, value: u16) {
            self.config.write((self.at + 2) as u16, &value.to_le_bytes());
            self.msix.control_written(&self.config, self.at).unwrap();
        }

        fn fill(&self, vector: u64, mask: u32) {
            for (field, value) in [(0, 0xFEE0_1000u32), (4, 0), (8, 0x31 + vector as u32), (12, mask)] {
                self.msix.write_table(vector * 16 + field, &value.to_le_bytes()).unwrap();
            }
        }
    }

    #[test]
    fn the_capability_tells_size_and_places() {
        let rig = rig();
        assert_eq!(rig.config.read(rig.at as u16), 0x0002_0011);
        assert_eq!(rig.config.read(rig.at as u16 + 4), 0x4000);
        assert_eq!(rig.config.read(rig.at as u16 + 8), 0x5000);
    }

    #[test]
    fn only_vectors_that_are_open_get_a_route() {
        let mut rig = rig();
        rig.fill(1, 0);
        assert!(rig.router.connected.lock().unwrap().is_empty());
        rig.control(CONTROL_ENABLE);
        assert_eq!(*rig.router.connected.lock().unwrap(), [(0, Message { address: 0xFEE0_1000, data: 0x32 })]);
        rig.msix.trigger(1).unwrap();
        rig.msix.trigger(1).unwrap();
        assert_eq!(rig.router.raised(0), 2);
    }

    #[test]
    fn a_masked_vector_is_delivered_when_unmasked() {
        let mut rig = rig();
        rig.control(CONTROL_ENABLE);
        rig.fill(2, 1);
        rig.msix.trigger(2).unwrap();
        let mut pending = [0u8; 8];
        rig.msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b100);
        rig.msix.write_table(2 * 16 + 12, &0u32.to_le_bytes()).unwrap();
        assert_eq!(rig.router.raised(0), 1);
        rig.msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
        rig.control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        rig.msix.trigger(2).unwrap();
        assert_eq!(rig.router.raised(0), 0);
        rig.control(CONTROL_ENABLE);
        assert_eq!(rig.router.raised(0), 1);
    }

    #[test]
    fn what_somebody_else_signals_reaches_kvm_while_the_vector_is_open_and_is_kept_otherwise() {
        let mut rig = rig();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let lines = |rig: &Rig| rig.router.attached.lock().unwrap().iter().map(|(line, _)| *line).collect::<Vec<_>>();
        let pending = |rig: &Rig| {
            let mut bits = [0_u8; 8];
            rig.msix.read_pending(0, &mut bits);
            bits[0]
        };
        rig.msix.set_direct(0, 1, Some(&event)).unwrap();
        assert_eq!(lines(&rig), [0; 0]);
        event.write(1).unwrap();
        assert!(rig.msix.take_direct() && !rig.msix.take_direct(), "without MSI-X the interrupt status says it, once");
        rig.control(CONTROL_ENABLE);
        rig.fill(1, 0);
        rig.fill(2, 0);
        assert_eq!(lines(&rig), [0]);
        event.write(1).unwrap();
        assert_eq!((pending(&rig), rig.msix.take_direct()), (0, false), "KVM takes it");
        for masked in [true, false] {
            rig.fill(1, u32::from(masked));
            assert_eq!((lines(&rig).is_empty(), pending(&rig)), (masked, u8::from(masked) << 1));
        }
        rig.control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        assert_eq!(lines(&rig), [0; 0]);
        rig.control(CONTROL_ENABLE);
        rig.msix.move_direct(0, 2).unwrap();
        assert_eq!(lines(&rig), [1]);
        rig.msix.move_direct(0, NO_VECTOR).unwrap();
        assert_eq!(lines(&rig), [0; 0]);
        rig.msix.move_direct(0, 2).unwrap();
        // It ends while the vector is masked: the interrupt is still owed.
        rig.fill(2, 1);
        rig.msix.set_direct(0, 2, None).unwrap();
        assert_eq!((lines(&rig), pending(&rig)), (vec![], 0b100));
        rig.fill(2, 0);
        assert_eq!((rig.router.raised(1), pending(&rig)), (1, 0));
        rig.msix.set_direct(0, 2, Some(&event)).unwrap();
        assert_eq!(lines(&rig), [1]);
        let router = Arc::clone(&rig.router);
        drop(rig);
        assert!(router.attached.lock().unwrap().is_empty());
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let rig = rig();
        for (offset, length) in [(0u64, 1usize), (2, 4), (4, 8), (16 * 3, 4), (u64::MAX - 7, 8), (15, 4)] {
            rig.msix.write_table(offset, &vec![0xFF; length]).unwrap();
            let mut data = vec![0xAA; length];
            rig.msix.read_table(offset, &mut data);
            rig.msix.read_pending(offset, &mut data);
        }
        rig.msix.trigger(NO_VECTOR).unwrap();
        assert!(rig.msix.save().iter().all(|vector| vector.address == 0 && vector.masked && !vector.pending));
    }

    #[test]
    fn saved_vectors_come_back() {
        let mut rig = rig();
        rig.control(CONTROL_ENABLE);
        rig.fill(0, 0);
        rig.fill(1, 1);
        rig.msix.trigger(1).unwrap();
        let saved = rig.msix.save();
        let mut other = self::rig();
        other.msix.restore(&saved).unwrap();
        other.control(CONTROL_ENABLE);
        assert_eq!(other.msix.save(), saved);
        assert_eq!(other.router.connected.lock().unwrap().len(), 1);
        assert!(other.msix.restore(&saved[1..]).is_err());
    }
}
