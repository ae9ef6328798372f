//! The device, its worker, and the handle that says how much memory the guest should have.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    Backing,
    blocks::{BLOCK, Blocks, Region},
    request::Request,
    state::MemState,
};
use crate::virtio::{
    Activation, DeviceError, Interrupt, VirtioDevice,
    chain::Chain,
    features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, read_config},
    ring::{Fault, Ring, Session, rings},
    task::{Exit, Poller, Task},
    worker::WorkerKind,
};

const QUEUE_SIZE: u16 = 64;

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: what is not plugged must not be touched, not even read.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

struct Shared {
    blocks: Mutex<Blocks>,
    backing: Box<dyn Backing>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}

/// Says how much the guest should have; clones work on the same device.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// The guest should have so many blocks. It takes its time, and gives back as it can.
    ///
    /// # Errors
    /// When the region has fewer, or the guest cannot be interrupted.
    pub fn want(&self, blocks: u32) -> io::Result<()> {
        if !self.shared.blocks().want(blocks) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let interrupt = self.shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Without a driver there is nobody to tell: it reads the size when it comes.
        interrupt.map_or(Ok(()), |interrupt| interrupt.config())
    }

    /// How many blocks it should have.
    #[must_use]
    pub fn wanted(&self) -> u32 {
        self.shared.blocks().wanted()
    }

    /// How many it has.
    #[must_use]
    pub fn plugged(&self) -> u32 {
        self.shared.blocks().plugged_count()
    }

    #[must_use]
    pub fn region(&self) -> Region {
        self.shared.blocks().region()
    }

    /// Whether the guest has a driver that works.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// The memory device.
pub struct Mem {
    id: String,
    shared: Arc<Shared>,
    worker: Option<Task<MemWorker>>,
}

impl Mem {
    /// A device with an empty region.
    #[must_use]
    pub fn new(id: String, region: Region, backing: Box<dyn Backing>) -> Self {
        Self::with(id, Blocks::new(region), backing)
    }

    /// One as it was saved. The memory of its blocks is with `backing` already.
    #[must_use]
    pub fn saved(id: String, state: &MemState, backing: Box<dyn Backing>) -> Self {
        Self::with(id, state.blocks(), backing)
    }

    fn with(id: String, blocks: Blocks, backing: Box<dyn Backing>) -> Self {
        let shared = Shared { blocks: Mutex::new(blocks), backing, interrupt: Mutex::default() };
        Self { id, shared: Arc::new(shared), worker: None }
    }

    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared) }
    }

    /// `struct virtio_mem_config` (section 5.15.4): block_size, node_id, padding, addr, region_size, usable_region_size, plugged_size,
    /// requested_size.
    fn config(&self) -> [u8; 56] {
        let blocks = self.shared.blocks();
        let Region { start, .. } = blocks.region();
        let length = blocks.region().len();
        let (plugged, wanted) = (u64::from(blocks.plugged_count()) * BLOCK, u64::from(blocks.wanted()) * BLOCK);
        let mut config = [0; 56];
        for (field, value) in config.chunks_exact_mut(8).zip([BLOCK, 0, start, length, length, plugged, wanted]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        config
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        24
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC | F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let (session, rings) = rings("memory", &self.id, activation, 1)?;
        let [ring] =
            <[Ring; 1]>::try_from(rings).map_err(|rings| DeviceError::Queues { device: "memory", needed: 1, found: rings.len() })?;
        self.shared.set_interrupt(Some(Arc::clone(&session.interrupt)));
        let worker = MemWorker { session, ring, shared: Arc::clone(&self.shared) };
        let task = Task::start(WorkerKind::Mem, &self.id, move |exit| worker.run(exit)).map_err(|source| DeviceError::Io {
            device: "memory",
            context: "could not start the thread",
            source,
        })?;
        self.worker = Some(task);
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue, EventFd)> {
        self.shared.set_interrupt(None);
        self.worker.take().and_then(Task::stop).map_or_else(Vec::new, |worker| vec![worker.ring.into_parts()])
    }

    fn save(&self) -> serde_json::Value {
        serde_json::to_value(MemState::new(&self.shared.blocks())).unwrap_or_default()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        // It was made as it was saved, since its memory had to be there first.
        if MemState::read(state)?.blocks() == *self.shared.blocks() {
            return Ok(());
        }
        Err(DeviceError::State { device: "memory", reason: "its blocks are others than those that were mapped".to_owned() })
    }
}

struct MemWorker {
    session: Session,
    ring: Ring,
    shared: Arc<Shared>,
}

impl MemWorker {
    fn run(mut self, exit: &Exit) -> Self {
        if let Err(fault) = self.serve(exit) {
            self.session.report(&fault);
        }
        self
    }

    fn serve(&mut self, exit: &Exit) -> Result<(), Fault> {
        let host = |source| Fault::Host { context: "could not wait for the driver", source };
        let mut poller = Poller::new(2).map_err(host)?;
        poller.add(exit.as_raw_fd(), 0, EventSet::IN).map_err(host)?;
        poller.add(self.ring.kick_fd(), 1, EventSet::IN).map_err(host)?;
        let mut chain = Chain::default();
        self.drain(exit, &mut chain)?;
        while !exit.requested() {
            if poller.wait(None).map_err(host)?.iter().any(|event| event.data() == 1) {
                self.ring.take_kick();
                self.drain(exit, &mut chain)?;
            }
        }
        Ok(())
    }

    fn drain(&mut self, exit: &Exit, chain: &mut Chain) -> Result<(), Fault> {
        loop {
            self.ring.disarm(&self.session.memory.memory())?;
            let mut served = false;
            while !exit.requested() && self.ring.pop(&self.session.memory.memory(), chain)? {
                let request = Request::read(&self.session.memory.memory(), chain)?;
                let answer = self.shared.blocks().perform(request, &*self.shared.backing);
                // Other memory than before: what the guest just gave away is not written to.
                let memory = self.session.memory.memory();
                let written = answer.write(&memory, chain)?;
                self.ring.complete(&memory, chain.head, written)?;
                served = true;
            }
            let memory = self.session.memory.memory();
            if served {
                self.ring.notify(&memory)?;
            }
            if !self.ring.arm(&memory)? || exit.requested() {
                return Ok(());
            }
        }
    }
}
