//! The device as the driver sees it.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Limiter,
    request::ReceiveMode,
    state::{self, NetState},
    tap::{Offloads, Tap},
    vhost::Vhost,
    worker::NetWorker,
};
use crate::{
    control::NetworkMetrics,
    virtio::{
        Activation, DeviceError, VirtioDevice,
        features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, read_config},
        ring::{Ring, rings},
        task::Task,
        worker::WorkerKind,
    },
};

/// Receive and transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

const STATUS_LINK_UP: u16 = 1;

/// What an interface has done since boot. "Received" is what the guest received.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) received_bytes: AtomicU64,
    pub(super) sent_bytes: AtomicU64,
    pub(super) received_packets: AtomicU64,
    pub(super) sent_packets: AtomicU64,
    pub(super) dropped: AtomicU64,
    carrier: Carrier,
}

/// Who moves the packets.
#[derive(Debug, Default)]
pub struct Carrier {
    /// The host's kernel can.
    has_vhost: AtomicBool,
    /// It could when the interface was made, whatever has become of that: then what is counted here is not all that went through.
    had_vhost: AtomicBool,
    /// It does, or did when the device last worked.
    is_vhost: AtomicBool,
}

impl Counters {
    pub fn metrics(&self, id: &str) -> NetworkMetrics {
        NetworkMetrics {
            id: id.to_owned(),
            received_bytes: self.received_bytes.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            received_packets: self.received_packets.load(Relaxed),
            sent_packets: self.sent_packets.load(Relaxed),
            dropped: self.dropped.load(Relaxed),
            vhost_net: self.carrier.had_vhost.load(Relaxed).then(|| self.carrier.is_vhost.load(Relaxed)),
        }
    }

    /// Whether the interface has to be stopped and started again for a change of its limit to hold, or to be gone.
    pub fn changes_carrier(&self, is_limited: bool) -> bool {
        self.carrier.has_vhost.load(Relaxed) && self.carrier.is_vhost.load(Relaxed) == is_limited
    }

    /// Whether the host's kernel moves the packets now.
    pub fn is_vhost(&self) -> bool {
        self.carrier.is_vhost.load(Relaxed)
    }
}

/// A network interface.
pub struct Net {
    id: String,
    mac: [u8; 6],
    mtu: u16,
    counters: Arc<Counters>,
    limiter: Limiter,
    tap: Arc<Tap>,
    worker: Option<Task<NetWorker>>,
    /// The host's kernel, which takes the place of the worker where it can.
    vhost: Option<Vhost>,
}

impl Net {
    /// `tap` was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. It has no limits at first.
    ///
    /// # Errors
    /// When it was not, or its settings cannot be changed.
    pub fn new(id: String, tap: OwnedFd, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        Self::over(id, Tap::new(tap)?, mac, mtu)
    }

    fn over(id: String, tap: Tap, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        Ok(Self { id, mac, mtu, counters: Arc::default(), limiter: Limiter::new()?, tap: Arc::new(tap), worker: None, vhost: None })
    }

    /// Has the host's kernel move the packets while there is no limit; `vhost` is `/dev/vhost-net`, opened for this interface alone.
    #[must_use]
    pub fn with_vhost(self, vhost: Option<OwnedFd>) -> Self {
        self.counters.carrier.has_vhost.store(vhost.is_some(), Relaxed);
        self.counters.carrier.had_vhost.store(vhost.is_some(), Relaxed);
        Self { vhost: vhost.map(Vhost::new), ..self }
    }

    /// Whether the host's kernel has taken over.
    fn start_vhost(&mut self, activation: &Activation) -> bool {
        let Some(vhost) = self.vhost.as_mut().filter(|_| activation.kernel.may() && !self.limiter.is_any()) else { return false };
        vhost.start(activation, self.tap.as_raw_fd()).unwrap_or_else(|error| {
            eprintln!("{}: vhost-net is not used: {error}", self.id);
            self.give_up_vhost();
            false
        })
    }

    /// It said no to what it should do: closing it ends all that it may be doing.
    fn give_up_vhost(&mut self) {
        self.vhost = None;
        self.counters.carrier.has_vhost.store(false, Relaxed);
    }

    /// An interface over a datagram socket that does not block.
    ///
    /// # Errors
    /// When the operating system has no eventfd left.
    #[cfg(any(feature = "fuzzing", test))]
    pub fn over_socket(id: String, socket: OwnedFd, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        Self::over(id, Tap::over_socket(socket), mac, mtu)
    }

    /// What sets the limits of the interface, also while it works.
    pub fn limiter(&self) -> Limiter {
        self.limiter.clone()
    }

    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    #[cfg(test)]
    pub(super) fn set_limiter(&mut self, limiter: Limiter) {
        self.limiter = limiter;
    }

    fn state(&self) -> NetState {
        NetState { version: state::VERSION, mac: self.mac, mtu: self.mtu }
    }

    /// `struct virtio_net_config` (section 5.1.4): mac, status, max_virtqueue_pairs, mtu.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[0..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&STATUS_LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&1_u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        1
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        VERSION_1
            | RING_EVENT_IDX
            | RING_INDIRECT_DESC
            | F_CSUM
            | F_GUEST_CSUM
            | F_MTU
            | F_MAC
            | F_GUEST_TSO4
            | F_GUEST_TSO6
            | F_GUEST_ECN
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_HOST_ECN
            | F_MRG_RXBUF
            | F_STATUS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let io = |context, source| DeviceError::Io { device: "net", context, source };
        let has = |bit: u64| activation.features & bit != 0;
        let offloads = Offloads { checksum: has(F_GUEST_CSUM), tso4: has(F_GUEST_TSO4), tso6: has(F_GUEST_TSO6), ecn: has(F_GUEST_ECN) };
        let mode = ReceiveMode { mergeable: has(F_MRG_RXBUF), large: offloads.checksum && (offloads.tso4 || offloads.tso6), mtu: self.mtu };
        self.tap.set_offloads(offloads).map_err(|source| io("could not set the tap's offloads", source))?;
        let is_vhost = self.start_vhost(&activation);
        self.counters.carrier.is_vhost.store(is_vhost, Relaxed);
        if is_vhost {
            return Ok(());
        }
        let (session, rings) = rings("net", &self.id, activation, 2)?;
        let [receive, transmit] =
            <[Ring; 2]>::try_from(rings).map_err(|rings| DeviceError::Queues { device: "net", needed: 2, found: rings.len() })?;
        let worker =
            NetWorker::new(session, [receive, transmit], Arc::clone(&self.tap), mode, Arc::clone(&self.counters), self.limiter.clone());
        let task = Task::start(WorkerKind::Net, &self.id, move |exit| worker.run(exit))
            .map_err(|source| io("could not start the thread", source))?;
        self.worker = Some(task);
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue, EventFd)> {
        if let Some((queues, result)) = self.vhost.as_mut().and_then(Vhost::stop) {
            if let Err(error) = result {
                eprintln!("{}: vhost-net did not stop: {error}", self.id);
                self.give_up_vhost();
            }
            return queues;
        }
        self.worker.take().and_then(Task::stop).map_or_else(Vec::new, NetWorker::into_queues)
    }

    fn save(&self) -> serde_json::Value {
        serde_json::to_value(self.state()).unwrap_or_default()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        self.state().check(state)
    }
}
