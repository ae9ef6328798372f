use super::*;
use crate::memory::GuestMemoryMmap;
use crate::pci::msix::tests::FakeRouter;
use vm_memory::GuestAddress;

const VERSION_1: u64 = 1 << 32;
const FEATURE: u64 = 1 << 5;

type Active = Arc<Mutex<Option<Activation>>>;

struct Probe {
    active: Active,
    config: u8,
    refuse: bool,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        4
    }
    fn id(&self) -> &str {
        "probe"
    }
    fn features(&self) -> u64 {
        VERSION_1 | FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(self.config.wrapping_add(offset as u8));
    }
    fn write_config(&mut self, _offset: u64, data: &[u8]) {
        self.config = data.first().copied().unwrap_or(0);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.refuse {
            return Err(DeviceError::Queues { device: "probe", needed: 2, found: 1 });
        }
        *self.active.lock().unwrap() = Some(activation);
        Ok(())
    }
    fn stop(&mut self) -> Vec<(u16, Queue, EventFd)> {
        self.active.lock().unwrap().take().map(|activation| activation.queues).unwrap_or_default()
    }
    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "config": self.config })
    }
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        self.config = state["config"].as_u64().unwrap_or(0) as u8;
        Ok(())
    }
}

#[derive(Default)]
struct FakeDoorbells(Mutex<Vec<u64>>);

impl Doorbells for FakeDoorbells {
    fn attach(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().push(address);
        Ok(())
    }
    fn detach(&self, address: u64, _event: &EventFd) {
        self.0.lock().unwrap().retain(|known| *known != address);
    }
}

struct Rig {
    pci: VirtioPci,
    active: Active,
    router: Arc<FakeRouter>,
    doorbells: Arc<FakeDoorbells>,
    activations: Arc<Activations>,
}

const BAR: u64 = 0x40_0000_0000;

fn rig_that(refuse: bool) -> Rig {
    let active = Active::default();
    let router = Arc::new(FakeRouter::default());
    let doorbells = Arc::new(FakeDoorbells::default());
    let activations = Arc::new(Activations::new().unwrap());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let host = Host {
        memory: GuestMemory::new(memory),
        router: Arc::clone(&router) as Arc<dyn Router>,
        doorbells: Arc::clone(&doorbells) as Arc<dyn Doorbells>,
        activations: Arc::clone(&activations),
        kernel: Arc::default(),
    };
    let probe = Probe { active: Arc::clone(&active), config: 7, refuse };
    let pci = VirtioPci::new(3, Box::new(probe), BAR, host).unwrap();
    Rig { pci, active, router, doorbells, activations }
}

fn rig() -> Rig {
    rig_that(false)
}

impl Rig {
    fn read(&mut self, offset: u64, length: usize) -> u64 {
        let mut data = [0u8; 8];
        self.pci.read_memory(offset, &mut data[..length]);
        u64::from_le_bytes(data)
    }
    fn write(&mut self, offset: u64, value: u64, length: usize) {
        self.pci.write_memory(offset, &value.to_le_bytes()[..length]);
    }
    fn status(&mut self) -> u64 {
        self.read(20, 1)
    }
    fn features(&mut self, features: u64) {
        for word in 0..2 {
            self.write(8, word, 4);
            self.write(12, features >> (32 * word), 4);
        }
    }
    fn queue(&mut self, index: u64, base: u64) {
        self.write(22, index, 2);
        self.write(24, 16, 2);
        self.write(32, base, 8);
        self.write(40, base + 0x1000, 4);
        self.write(44, 0, 4);
        self.write(48, base + 0x2000, 8);
        self.write(26, index + 1, 2);
        self.write(28, 1, 2);
    }
    /// The whole handshake of a driver.
    fn drive(&mut self) {
        self.write(20, 1, 1);
        self.write(20, 3, 1);
        self.features(VERSION_1 | FEATURE);
        self.write(20, 11, 1);
        assert_eq!(self.status(), 11);
        self.queue(0, 0x1_0000);
        self.queue(1, 0x2_0000);
        self.write(20, 15, 1);
    }
    fn activate(&mut self) {
        assert_eq!(self.activations.take(), [3]);
        self.pci.activate();
    }
    fn enable_msix(&mut self) {
        let at = self.pci.msix_at as u16;
        self.pci.write_config(at + 2, &0x8000u16.to_le_bytes());
        for vector in 0..3u64 {
            self.write(MSIX_TABLE + vector * 16, 0xFEE0_0000, 4);
            self.write(MSIX_TABLE + vector * 16 + 8, 0x40 + vector, 4);
            self.write(MSIX_TABLE + vector * 16 + 12, 0, 4);
        }
    }
}

#[test]
fn a_driver_finds_the_windows_through_the_capabilities() {
    let mut rig = rig();
    assert_eq!(rig.pci.read_config(0), 0x1044_1AF4);
    let mut at = rig.pci.read_config(0x34) as u16;
    let mut kinds = Vec::new();
    while at != 0 {
        let head = rig.pci.read_config(at).to_le_bytes();
        if head[0] == VENDOR_CAPABILITY {
            let (offset, length) = (rig.pci.read_config(at + 8), rig.pci.read_config(at + 12));
            kinds.push((head[3], offset, length));
        }
        at = u16::from(head[1]);
    }
    assert_eq!(kinds, [(1, 0, 0x40), (2, 0x3000, 0x1000), (3, 0x1000, 1), (4, 0x2000, 0x1000), (5, 0, 0)]);
}

#[test]
fn the_handshake_ends_in_an_activation_with_the_drivers_queues() {
    let mut rig = rig();
    assert_eq!(rig.read(18, 2), 2);
    rig.drive();
    rig.activate();
    let active = rig.active.lock().unwrap();
    let activation = active.as_ref().unwrap();
    assert_eq!(activation.features, VERSION_1 | FEATURE);
    let queues: Vec<_> = activation.queues.iter().map(|(index, queue, _)| (*index, queue.size(), queue.desc_table())).collect();
    assert_eq!(queues, [(0, 16, 0x1_0000), (1, 16, 0x2_0000)]);
    // Work that the driver queued before is not missed.
    assert_eq!(activation.queues[0].2.read().unwrap(), 1);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut rig = rig();
    rig.write(20, 3, 1);
    rig.features(VERSION_1 | 1 << 7);
    rig.write(20, 11, 1);
    assert_eq!(rig.status(), 3);
    rig.features(FEATURE);
    rig.write(20, 11, 1);
    assert_eq!(rig.status(), 3, "a legacy driver");
    // DRIVER_OK without FEATURES_OK is no start.
    rig.write(20, 7, 1);
    assert!(rig.activations.take().is_empty());
}

#[test]
fn features_and_queues_are_fixed_once_accepted() {
    let mut rig = rig();
    rig.drive();
    rig.features(0);
    rig.write(8, 1, 4);
    assert_eq!(rig.read(12, 4), 1);
    rig.write(22, 0, 2);
    rig.write(32, 0x5_0000, 8);
    rig.write(24, 32, 2);
    assert_eq!((rig.read(32, 8), rig.read(24, 2)), (0x1_0000, 16));
}

#[test]
fn queue_sizes_must_be_powers_of_two_within_bounds() {
    let mut rig = rig();
    rig.write(22, 1, 2);
    for size in [0, 3, 65, 128, 0xFFFF] {
        rig.write(24, size, 2);
        assert_eq!(rig.read(24, 2), 64, "size {size}");
    }
    rig.write(24, 32, 2);
    assert_eq!(rig.read(24, 2), 32);
    // A queue that does not exist has size 0 and takes nothing.
    rig.write(22, 9, 2);
    rig.write(24, 16, 2);
    rig.write(28, 1, 2);
    assert_eq!((rig.read(24, 2), rig.read(28, 2)), (0, 0));
}

#[test]
fn a_queue_outside_of_memory_needs_a_reset() {
    for base in [0x20_0000u64, !0xF, 0x1_0001] {
        let mut rig = rig();
        rig.write(20, 3, 1);
        rig.features(VERSION_1);
        rig.write(20, 11, 1);
        rig.write(22, 0, 2);
        rig.write(32, base, 8);
        rig.write(40, 0x1000, 8);
        rig.write(48, 0x2000, 8);
        rig.write(28, 1, 2);
        rig.write(20, 15, 1);
        rig.activate();
        assert!(rig.active.lock().unwrap().is_none());
        assert_eq!(rig.status(), 15 | 64, "base {base:#x}");
        rig.write(20, 0, 1);
        assert_eq!(rig.status(), 0);
    }
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let mut rig = rig_that(true);
    rig.drive();
    rig.activate();
    assert_eq!(rig.status(), 15 | 64);
}

#[test]
fn a_reset_stops_the_device_and_forgets_everything() {
    let mut rig = rig();
    rig.drive();
    rig.activate();
    rig.write(20, 0, 1);
    assert!(rig.active.lock().unwrap().is_none());
    assert_eq!(rig.status(), 0);
    rig.write(22, 0, 2);
    assert_eq!((rig.read(24, 2), rig.read(28, 2), rig.read(32, 8), rig.read(26, 2)), (256, 0, 0, 0xFFFF));
    rig.drive();
    rig.activate();
    assert!(rig.active.lock().unwrap().is_some());
}

#[test]
fn a_reset_before_the_main_thread_acts_cancels_the_start() {
    let mut rig = rig();
    rig.drive();
    rig.write(20, 0, 1);
    rig.activate();
    assert!(rig.active.lock().unwrap().is_none());
}

#[test]
fn interrupts_take_the_vectors_that_the_driver_chose() {
    let mut rig = rig();
    rig.enable_msix();
    rig.drive();
    rig.write(16, 0, 2);
    rig.activate();
    let interrupt = Arc::clone(&rig.active.lock().unwrap().as_ref().unwrap().interrupt);
    interrupt.queue(1).unwrap();
    assert_eq!([rig.router.raised(0), rig.router.raised(1), rig.router.raised(2)], [0, 0, 1]);
    let before = rig.read(21, 1);
    interrupt.config().unwrap();
    assert_eq!(rig.router.raised(0), 1);
    assert_eq!(rig.read(21, 1), before + 1);
    assert_eq!(rig.read(ISR, 1), 0);
    // A vector that does not exist reads back as none.
    rig.write(16, 3, 2);
    assert_eq!(rig.read(16, 2), 0xFFFF);
}

#[test]
fn without_msix_the_status_tells() {
    let mut rig = rig();
    rig.drive();
    rig.activate();
    let interrupt = Arc::clone(&rig.active.lock().unwrap().as_ref().unwrap().interrupt);
    interrupt.queue(0).unwrap();
    interrupt.config().unwrap();
    assert_eq!(rig.read(ISR, 1), 3);
    assert_eq!(rig.read(ISR, 1), 0);
}

#[test]
fn doorbells_follow_the_bar() {
    let mut rig = rig();
    assert!(rig.doorbells.0.lock().unwrap().is_empty());
    rig.pci.write_config(4, &[6, 0]);
    assert_eq!(*rig.doorbells.0.lock().unwrap(), [BAR + NOTIFY, BAR + NOTIFY + 4]);
    rig.pci.write_config(0x10, &0x8_0000u32.to_le_bytes());
    rig.pci.write_config(0x14, &0u32.to_le_bytes());
    assert_eq!(*rig.doorbells.0.lock().unwrap(), [0x8_0000 + NOTIFY, 0x8_0000 + NOTIFY + 4]);
    rig.pci.write_config(4, &[0, 0]);
    assert!(rig.doorbells.0.lock().unwrap().is_empty());
    // A doorbell that arrives as an exit works as well; one that does not exist is ignored.
    rig.drive();
    rig.activate();
    let _ = rig.pci.kicks[1].read();
    rig.write(NOTIFY + 4, 1, 2);
    rig.write(NOTIFY + 8, 2, 2);
    assert_eq!(rig.pci.kicks[1].read().unwrap(), 1);
}

#[test]
fn the_configuration_access_capability_reaches_the_bar() {
    let mut rig = rig();
    let at = rig.pci.access_at as u16;
    rig.pci.write_config(at + 8, &(DEVICE as u32 + 1).to_le_bytes());
    rig.pci.write_config(at + 12, &2u32.to_le_bytes());
    assert_eq!(rig.pci.read_config(at + 16), 0x0808);
    rig.pci.write_config(at + 8, &20u32.to_le_bytes());
    rig.pci.write_config(at + 12, &1u32.to_le_bytes());
    rig.pci.write_config(at + 16, &[1]);
    assert_eq!(rig.status(), 1);
    // A window that reaches beyond the BAR, or of an odd length, is none.
    for (offset, length) in [(BAR_SIZE as u32 - 1, 2u32), (u32::MAX, 4), (0, 3), (0, 0)] {
        rig.pci.write_config(at + 8, &offset.to_le_bytes());
        rig.pci.write_config(at + 12, &length.to_le_bytes());
        assert_eq!(rig.pci.access_window(), None);
        rig.pci.write_config(at + 16, &[0; 4]);
    }
}

#[test]
fn a_paused_device_goes_on_with_its_indices_here_or_elsewhere() {
    let mut rig = rig();
    rig.enable_msix();
    rig.drive();
    rig.activate();
    rig.active.lock().unwrap().as_mut().unwrap().queues[1].1.set_next_avail(5);
    rig.pci.pause();
    assert!(rig.active.lock().unwrap().is_none());
    let saved = rig.pci.save();
    assert_eq!(saved.common.queues[1].next_avail, 5);
    rig.pci.activate();
    assert_eq!(rig.active.lock().unwrap().as_ref().unwrap().queues[1].1.next_avail(), 5);

    let json = serde_json::to_string(&saved).unwrap();
    let mut other = self::rig();
    other.pci.restore(&serde_json::from_str(&json).unwrap()).unwrap();
    assert_eq!(other.status(), 15);
    other.pci.activate();
    // An interrupt that was on its way at the save is not lost, once.
    assert_eq!(other.router.raised(1), 1);
    let active = other.active.lock().unwrap();
    let activation = active.as_ref().unwrap();
    assert_eq!(activation.queues[1].1.next_avail(), 5);
    activation.interrupt.queue(0).unwrap();
    assert_eq!(other.router.raised(1), 1);
}

#[test]
fn a_device_without_an_interrupt_route_is_stopped() {
    let mut rig = rig();
    rig.drive();
    rig.activate();
    rig.router.full.store(true, Ordering::SeqCst);
    let at = rig.pci.msix_at as u16;
    rig.pci.write_config(at + 2, &0x8000u16.to_le_bytes());
    rig.write(MSIX_TABLE + 12, 0, 4);
    assert_eq!(rig.status(), 15 | 64);
    assert!(rig.active.lock().unwrap().is_none(), "it works on while the transport takes it for idle");
    rig.router.full.store(false, Ordering::SeqCst);
    rig.write(20, 0, 1);
    rig.drive();
    rig.activate();
    assert!(rig.active.lock().unwrap().is_some());
}

#[test]
fn an_interrupt_status_that_was_not_read_comes_back() {
    let mut rig = rig();
    rig.drive();
    rig.activate();
    Arc::clone(&rig.active.lock().unwrap().as_ref().unwrap().interrupt).queue(0).unwrap();
    rig.pci.pause();
    let saved = rig.pci.save();
    let mut other = self::rig();
    other.pci.restore(&saved).unwrap();
    assert_eq!(other.read(ISR, 1), 1);
}

#[test]
fn any_access_anywhere_is_harmless() {
    let mut rig = rig();
    let mut seed = 0x1234_5678_9ABC_DEF0u64;
    for _ in 0..200_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let random = seed >> 16;
        let length = 1usize << (random & 3);
        let offset = (random >> 2) % (BAR_SIZE - length as u64 + 1);
        let data = seed.to_le_bytes();
        match random >> 45 & 3 {
            0 => rig.pci.write_memory(offset, &data[..length]),
            1 => {
                let mut data = [0u8; 8];
                rig.pci.read_memory(offset, &mut data[..length]);
            }
            2 => rig.pci.write_config((offset & 0xFFC) as u16, &data[..length.min(4)]),
            _ => drop(rig.pci.read_config((offset & 0xFFC) as u16)),
        }
        for _ in rig.activations.take() {
            rig.pci.activate();
        }
    }
}
