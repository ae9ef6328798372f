//! The device, its worker, and the handle that asks for memory.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    request::{self, PAGE, Range},
    state::{self, BalloonState},
};
use crate::memory::GuestMemoryMmap;
use crate::virtio::{
    Activation, DeviceError, Interrupt, VirtioDevice,
    chain::Chain,
    features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, read_config},
    ring::{Fault, Ring, Session, rings},
    task::{Exit, Poller, Task},
    worker::WorkerKind,
};

const QUEUE_SIZES: [u16; 3] = [128, 128, 128];

const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Neither statistics nor hints are offered, so reporting comes next.
const REPORTING: u16 = 2;

const PAGES_PER_MIB: u64 = 1024 * 1024 / PAGE;

#[derive(Default)]
struct Shared {
    /// Pages asked for.
    target: AtomicU32,
    /// Pages that the driver says it gave.
    actual: AtomicU32,
    /// Bytes given back to the host by inflating and by reporting, since boot.
    freed: AtomicU64,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}

/// Asks the balloon for memory; clones work on the same balloon.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// Asks the guest to give `mib` MiB, more or less than now. It takes its time, and may refuse.
    ///
    /// # Errors
    /// When the number is beyond what a balloon can say (16 TiB), or the guest cannot be interrupted.
    pub fn set_target_mib(&self, mib: u64) -> io::Result<()> {
        let pages = mib.checked_mul(PAGES_PER_MIB).and_then(|pages| u32::try_from(pages).ok()).ok_or(io::ErrorKind::InvalidInput)?;
        self.shared.target.store(pages, Relaxed);
        let interrupt = self.shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Without a driver there is nobody to tell: it reads the target when it comes.
        interrupt.map_or(Ok(()), |interrupt| interrupt.config())
    }

    /// What the guest says that it gave, in MiB.
    pub fn actual_mib(&self) -> u64 {
        u64::from(self.shared.actual.load(Relaxed)) / PAGES_PER_MIB
    }

    /// Bytes given back to the host since boot, by the balloon and by free page reporting. Memory that the guest uses again
    /// and gives again counts again.
    pub fn freed_bytes(&self) -> u64 {
        self.shared.freed.load(Relaxed)
    }
}

/// The balloon.
pub struct Balloon {
    id: String,
    shared: Arc<Shared>,
    worker: Option<Task<BalloonWorker>>,
}

impl Balloon {
    pub fn new(id: String) -> Self {
        Self { id, shared: Arc::default(), worker: None }
    }

    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared) }
    }

    /// `struct virtio_balloon_config` (section 5.5.4): num_pages, actual.
    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.shared.target.load(Relaxed).to_le_bytes());
        config[4..].copy_from_slice(&self.shared.actual.load(Relaxed).to_le_bytes());
        config
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        5
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC | F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only `actual` is the driver's, and Linux writes it whole.
        if let (4, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.shared.actual.store(u32::from_le_bytes(bytes), Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let (session, rings) = rings("balloon", &self.id, activation, 2)?;
        self.shared.set_interrupt(Some(Arc::clone(&session.interrupt)));
        let worker = BalloonWorker { session, rings, shared: Arc::clone(&self.shared), complained: AtomicBool::new(false) };
        let task = Task::start(WorkerKind::Balloon, &self.id, move |exit| worker.run(exit)).map_err(|source| DeviceError::Io {
            device: "balloon",
            context: "could not start the thread",
            source,
        })?;
        self.worker = Some(task);
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue, EventFd)> {
        self.shared.set_interrupt(None);
        let worker = self.worker.take().and_then(Task::stop);
        worker.map_or_else(Vec::new, |worker| worker.rings.into_iter().map(Ring::into_parts).collect())
    }

    fn save(&self) -> serde_json::Value {
        let state =
            BalloonState { version: state::VERSION, target: self.shared.target.load(Relaxed), actual: self.shared.actual.load(Relaxed) };
        serde_json::to_value(state).unwrap_or_default()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let state = BalloonState::read(state)?;
        self.shared.target.store(state.target, Relaxed);
        self.shared.actual.store(state.actual, Relaxed);
        Ok(())
    }
}

struct BalloonWorker {
    session: Session,
    rings: Vec<Ring>,
    shared: Arc<Shared>,
    complained: AtomicBool,
}

impl BalloonWorker {
    fn run(mut self, exit: &Exit) -> Self {
        if let Err(fault) = self.serve(exit) {
            self.session.report(&fault);
        }
        self
    }

    fn serve(&mut self, exit: &Exit) -> Result<(), Fault> {
        let host = |source| Fault::Host { context: "could not wait for the driver", source };
        let mut poller = Poller::new(4).map_err(host)?;
        let exit_token = self.rings.len();
        poller.add(exit.as_raw_fd(), exit_token as u64, EventSet::IN).map_err(host)?;
        for (at, ring) in self.rings.iter().enumerate() {
            poller.add(ring.kick_fd(), at as u64, EventSet::IN).map_err(host)?;
        }
        let mut chain = Chain::default();
        for at in 0..self.rings.len() {
            self.drain(at, exit, &mut chain)?;
        }
        while !exit.requested() {
            for event in poller.wait(None).map_err(host)? {
                let at = event.data() as usize;
                if at < exit_token {
                    self.rings[at].take_kick();
                    self.drain(at, exit, &mut chain)?;
                }
            }
        }
        Ok(())
    }

    fn drain(&mut self, at: usize, exit: &Exit, chain: &mut Chain) -> Result<(), Fault> {
        let mut memory = self.session.memory.memory();
        loop {
            self.rings[at].disarm(&memory)?;
            let mut served = false;
            while !exit.requested() && {
                memory = self.session.memory.memory();
                self.rings[at].pop(&memory, chain)?
            } {
                self.perform(self.rings[at].index(), &memory, chain)?;
                self.rings[at].complete(&memory, chain.head, 0)?;
                served = true;
            }
            if served {
                self.rings[at].notify(&memory)?;
            }
            if !self.rings[at].arm(&memory)? || exit.requested() {
                return Ok(());
            }
        }
    }

    fn perform(&self, index: u16, memory: &GuestMemoryMmap, chain: &Chain) -> Result<(), Fault> {
        match index {
            INFLATE => request::inflated(memory, &chain.readable, |range| self.release(memory, range))
                .map_err(|source| Fault::Chain { index, source }),
            // The pages come back by being touched.
            DEFLATE => Ok(()),
            REPORTING => {
                // Section 5.5.6.6: the buffers themselves are the free pages.
                for (address, length) in chain.writable.iter() {
                    self.release(memory, Range { start: address.0, length: u64::from(length) });
                }
                Ok(())
            }
            _ => Err(Fault::Request("a balloon request on a queue that was not offered")),
        }
    }

    fn release(&self, memory: &GuestMemoryMmap, range: Range) {
        match request::release(memory, range) {
            Ok(freed) => {
                self.shared.freed.fetch_add(freed, Relaxed);
            }
            // The guest may go on: only the host has less memory than it could. Said once, for it will not be the last.
            Err(error) => {
                if !self.complained.swap(true, Relaxed) {
                    eprintln!("{}: could not give {} bytes back to the host: {error}", self.session.id, range.length);
                }
            }
        }
    }
}
