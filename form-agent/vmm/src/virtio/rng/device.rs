//! The device and its worker.

use std::{
    io,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{request::Budget, state};
use crate::virtio::{
    Activation, DeviceError, VirtioDevice,
    chain::Chain,
    features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1},
    ring::{Fault, Ring, Session, rings},
    task::{Exit, Poller, Task},
    worker::WorkerKind,
};

const QUEUE_SIZE: u16 = 64;

/// The entropy device.
pub struct Rng {
    id: String,
    worker: Option<Task<RngWorker>>,
}

impl Rng {
    pub fn new(id: String) -> Self {
        Self { id, worker: None }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        4
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let (session, rings) = rings("rng", &self.id, activation, 1)?;
        let [ring] = <[Ring; 1]>::try_from(rings).map_err(|rings| DeviceError::Queues { device: "rng", needed: 1, found: rings.len() })?;
        let worker = RngWorker { session, ring, budget: Budget::new(Instant::now()) };
        let task = Task::start(WorkerKind::Rng, &self.id, move |exit| worker.run(exit)).map_err(|source| DeviceError::Io {
            device: "rng",
            context: "could not start the thread",
            source,
        })?;
        self.worker = Some(task);
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue, EventFd)> {
        self.worker.take().and_then(Task::stop).map_or_else(Vec::new, |worker| vec![worker.ring.into_parts()])
    }

    fn save(&self) -> serde_json::Value {
        state::save()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        state::check(state)
    }
}

struct RngWorker {
    session: Session,
    ring: Ring,
    budget: Budget,
}

impl RngWorker {
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
        let mut wait = self.drain(exit, &mut chain)?;
        while !exit.requested() {
            let deadline = wait.map(|time| Instant::now() + time);
            let kicked = poller.wait(wait).map_err(host)?.iter().any(|event| event.data() == 1);
            if kicked {
                self.ring.take_kick();
            }
            if kicked || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                wait = self.drain(exit, &mut chain)?;
            }
        }
        Ok(())
    }

    /// Serves requests until there is none (`None`) or the budget is used up (the time to wait).
    fn drain(&mut self, exit: &Exit, chain: &mut Chain) -> Result<Option<Duration>, Fault> {
        let mut memory = self.session.memory.memory();
        loop {
            self.ring.disarm(&memory)?;
            let mut served = false;
            let mut wait = None;
            while !exit.requested() && {
                memory = self.session.memory.memory();
                self.ring.pop(&memory, chain)?
            } {
                match self.budget.take(chain.writable.len(), Instant::now()) {
                    Ok(length) => {
                        self.fill(&memory, chain, length)?;
                        served = true;
                    }
                    Err(time) => {
                        self.ring.undo_pop(1);
                        wait = Some(time);
                        break;
                    }
                }
            }
            if served {
                self.ring.notify(&memory)?;
            }
            if wait.is_some() {
                // Kicks stay off: we come back by ourselves.
                return Ok(wait);
            }
            if !self.ring.arm(&memory)? || exit.requested() {
                return Ok(None);
            }
        }
    }

    fn fill(&mut self, memory: &crate::memory::GuestMemoryMmap, chain: &Chain, length: usize) -> Result<(), Fault> {
        let random = |source: io::Error| Fault::Host { context: "the host gave no entropy", source };
        let malformed = |source| Fault::Chain { index: 0, source };
        let written = chain.writable.iovecs(memory, 0..length).map_err(malformed)?.fill_random();
        // Some of it, also when the rest failed.
        chain.writable.mark_written(memory, length).map_err(malformed)?;
        self.ring.complete(memory, chain.head, written.map_err(random)?)
    }
}
