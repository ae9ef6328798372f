//! The device as the driver sees it.

use std::{io, sync::Arc};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{
    connector::{Connector, Door},
    link::Links,
    state::{self, VsockState},
    worker::VsockWorker,
};
use crate::virtio::{
    Activation, DeviceError, VirtioDevice,
    features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, read_config},
    ring::{Ring, rings},
    task::Task,
    worker::WorkerKind,
};

/// Streams of one VM, those being opened included.
pub const CONNECTIONS_MAX: usize = 1024;

/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The socket device of a guest with one address.
pub struct Vsock {
    cid: u64,
    door: Arc<Door>,
    /// `None` while the worker has them.
    links: Option<Links>,
    /// The guest has to be told that all its streams are gone.
    announce_reset: bool,
    worker: Option<Task<VsockWorker>>,
}

impl Vsock {
    /// `cid` is the guest's address, 3 or more.
    ///
    /// # Errors
    /// When the address is reserved, or no eventfd can be made.
    pub fn new(cid: u64) -> io::Result<Self> {
        if !(3..u64::from(u32::MAX)).contains(&cid) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a guest's vsock address is 3 to 4294967294"));
        }
        Ok(Self { cid, door: Arc::new(Door::new()?), links: Some(Links::default()), announce_reset: false, worker: None })
    }

    pub fn connector(&self) -> Connector {
        Connector::new(Arc::clone(&self.door))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        19
    }

    fn id(&self) -> &str {
        "vsock"
    }

    fn features(&self) -> u64 {
        VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // A driver that starts anew has taken nothing yet, and every open stream needed a packet each way: these are streams
        // of a driver that is gone. After a pause the queues go on where they stood.
        let fresh = activation.queues.iter().all(|(_, queue, _)| queue.next_avail() == 0);
        let mut links = self.links.take().unwrap_or_default();
        if fresh {
            links = Links::from_port(links.next_port());
        }
        let (session, rings) = rings("vsock", self.id(), activation, 3)?;
        let [receive, transmit, event] =
            <[Ring; 3]>::try_from(rings).map_err(|rings| DeviceError::Queues { device: "vsock", needed: 3, found: rings.len() })?;
        let announce = std::mem::take(&mut self.announce_reset) && !fresh;
        let worker = VsockWorker::new(session, receive, transmit, event, self.cid, links, Arc::clone(&self.door), announce);
        // Before the worker starts, which closes the door again when the driver breaks something.
        self.door.set_open(true);
        let task = Task::start(WorkerKind::Vsock, "vsock", move |exit| worker.run(exit)).map_err(|source| {
            self.door.set_open(false);
            DeviceError::Io { device: "vsock", context: "could not start the thread", source }
        })?;
        self.worker = Some(task);
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue, EventFd)> {
        let Some(task) = self.worker.take() else {
            return Vec::new();
        };
        self.door.set_open(false);
        let Some(worker) = task.stop() else {
            return Vec::new();
        };
        let (links, announce, queues) = worker.into_parts();
        self.links = Some(links);
        self.announce_reset = announce;
        queues
    }

    fn save(&self) -> serde_json::Value {
        let next_port = self.links.as_ref().map_or(0, Links::next_port);
        serde_json::to_value(VsockState { version: state::VERSION, cid: self.cid, next_port }).unwrap_or_default()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let saved = VsockState::read(state)?;
        // Another address is fine, as for a copy of a snapshot: the guest reads it again with the reset.
        let _ = saved.cid;
        self.links = Some(Links::from_port(saved.next_port));
        self.announce_reset = true;
        Ok(())
    }
}
