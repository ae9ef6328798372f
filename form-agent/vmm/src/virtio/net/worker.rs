//! The thread that moves packets.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    Limiter,
    device::Counters,
    request::{self, Buffers, PACKET_MAX, ReceiveMode},
    tap::{HEADER, Tap},
};
use crate::memory::GuestMemoryMmap;
use crate::virtio::{
    chain::Chain,
    iovec::IoVecs,
    ring::{Fault, Ring, Session},
    task::{Exit, Poller},
};

const EXIT: u64 = 0;
const RECEIVE: u64 = 1;
const TRANSMIT: u64 = 2;
const TAP: u64 = 3;
const LIMITS: u64 = 4;

/// Packets moved one way before the other way gets its turn.
const BUDGET: usize = 128;

/// Rings below this may never hold the longest packet: they are filled with what fits.
const SMALL_RING: u16 = 64;

/// Whether one way has more to do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Nothing until the next event.
    Idle,
    /// The budget is used up.
    More,
    /// The limit of the interface is reached: nothing for this long.
    Limited(Duration),
}

impl Progress {
    /// How long to wait for an event before there is more to do.
    fn wait(self) -> Option<Duration> {
        match self {
            Self::Idle => None,
            Self::More => Some(Duration::ZERO),
            Self::Limited(time) => Some(time),
        }
    }
}

pub struct NetWorker {
    session: Session,
    receive: Ring,
    transmit: Ring,
    tap: Arc<Tap>,
    mode: ReceiveMode,
    counters: Arc<Counters>,
    limiter: Limiter,
    buffers: Buffers,
    /// The tap may have packets: it is watched for edges, so this is only forgotten when a read said that it is empty.
    tap_ready: bool,
    /// Takes what does not fit into the guest's buffers, to know that it did not.
    overflow: Vec<u8>,
}

impl NetWorker {
    /// The rings are those to receive and to transmit.
    pub fn new(
        session: Session,
        [receive, transmit]: [Ring; 2],
        tap: Arc<Tap>,
        mode: ReceiveMode,
        counters: Arc<Counters>,
        limiter: Limiter,
    ) -> Self {
        let (buffers, overflow) = (Buffers::default(), vec![0; 1]);
        Self { session, receive, transmit, tap, mode, counters, limiter, buffers, tap_ready: true, overflow }
    }

    pub fn into_queues(self) -> Vec<(u16, Queue, EventFd)> {
        vec![self.receive.into_parts(), self.transmit.into_parts()]
    }

    pub fn run(mut self, exit: &Exit) -> Self {
        if let Err(fault) = self.serve(exit) {
            self.session.report(&fault);
        }
        // The chains taken and not filled are the driver's again.
        let unused = self.buffers.clear();
        self.receive.undo_pop(unused);
        self
    }

    fn serve(&mut self, exit: &Exit) -> Result<(), Fault> {
        let host = |source| Fault::Host { context: "could not wait for the driver", source };
        let mut poller = Poller::new(5).map_err(host)?;
        poller.add(exit.as_raw_fd(), EXIT, EventSet::IN).map_err(host)?;
        poller.add(self.receive.kick_fd(), RECEIVE, EventSet::IN).map_err(host)?;
        poller.add(self.transmit.kick_fd(), TRANSMIT, EventSet::IN).map_err(host)?;
        // By edge: a guest without buffers must not make us spin on a tap full of packets.
        poller.add(self.tap.as_raw_fd(), TAP, EventSet::IN | EventSet::EDGE_TRIGGERED).map_err(host)?;
        poller.add(self.limiter.0.as_raw_fd(), LIMITS, EventSet::IN).map_err(host)?;
        let mut chain = Chain::default();
        let (mut receive, mut transmit) = (true, true);
        while !exit.requested() {
            let received = if receive { self.receive()? } else { Progress::Idle };
            let sent = if transmit { self.transmit(&mut chain)? } else { Progress::Idle };
            // What is limited is looked at again whatever ends the wait: the other way's event, its time, or another limit.
            (receive, transmit) = (received != Progress::Idle, sent != Progress::Idle);
            let wait = [received.wait(), sent.wait()].into_iter().flatten().min();
            for event in poller.wait(wait).map_err(host)? {
                match event.data() {
                    RECEIVE => {
                        self.receive.take_kick();
                        receive = true;
                    }
                    TRANSMIT => {
                        self.transmit.take_kick();
                        transmit = true;
                    }
                    TAP => {
                        self.tap_ready = true;
                        receive = true;
                    }
                    LIMITS => self.limiter.0.take_event(),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Moves packets from the tap to the guest.
    fn receive(&mut self) -> Result<Progress, Fault> {
        let mut moved = 0;
        let progress = loop {
            if !self.tap_ready {
                break Progress::Idle;
            }
            if moved == BUDGET {
                break Progress::More;
            }
            if !self.refill()? {
                break Progress::Idle;
            }
            if let Err(wait) = self.limiter.may_receive() {
                break Progress::Limited(wait);
            }
            match self.receive_one(&self.session.memory.memory()) {
                Ok(()) => moved += 1,
                Err(Fault::Host { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => self.tap_ready = false,
                Err(fault) => return Err(fault),
            }
        };
        if moved > 0 {
            self.receive.notify(&self.session.memory.memory())?;
        }
        Ok(progress)
    }

    /// Takes chains from the ring until the longest packet fits. `false`: the guest has to give some first, and will kick.
    fn refill(&mut self) -> Result<bool, Fault> {
        if self.buffers.enough(self.mode) {
            return Ok(true);
        }
        loop {
            self.receive.disarm(&self.session.memory.memory())?;
            loop {
                let mut chain = self.buffers.blank();
                if !self.receive.pop(&self.session.memory.memory(), &mut chain)? {
                    self.buffers.keep(chain);
                    break;
                }
                if chain.writable.len() < HEADER {
                    return Err(Fault::Request("a receive buffer shorter than a packet's header"));
                }
                self.buffers.push(chain);
                if self.buffers.enough(self.mode) {
                    return Ok(true);
                }
            }
            if self.receive.size() < SMALL_RING && self.buffers.chains() > 0 {
                return Ok(true);
            }
            if !self.receive.arm(&self.session.memory.memory())? {
                return Ok(false);
            }
        }
    }

    fn receive_one(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        let malformed = |source| Fault::Chain { index: 0, source };
        let mut room: Option<IoVecs<'_>> = None;
        for segments in self.buffers.front(self.mode) {
            let more = segments.iovecs(memory, 0..segments.len()).map_err(malformed)?;
            match &mut room {
                Some(room) => room.append(more),
                None => room = Some(more),
            }
        }
        let Some(mut room) = room else { return Ok(()) };
        let fits = room.len();
        room.append_own(&mut self.overflow);
        let length = room.read_from(self.tap.as_raw_fd()).map_err(|source| Fault::Host { context: "could not read the tap", source })?;
        self.limiter.received(length.saturating_sub(HEADER));
        if length > fits || length < HEADER {
            // The guest's buffers are too small for this packet: it is lost, the buffers are not, but they hold some of it now.
            self.counters.dropped.fetch_add(1, Relaxed);
            let mut written = self.buffers.front(self.mode);
            return written.try_for_each(|segments| segments.mark_written(memory, segments.len())).map_err(malformed);
        }
        let receive = &mut self.receive;
        let mut used = Ok(());
        self.buffers
            .take(memory, length, |head, written| {
                if used.is_ok() {
                    used = receive.complete(memory, head, written);
                }
            })
            .map_err(malformed)?;
        used?;
        self.counters.received_packets.fetch_add(1, Relaxed);
        self.counters.received_bytes.fetch_add((length - HEADER) as u64, Relaxed);
        Ok(())
    }

    /// Moves packets from the guest to the tap.
    fn transmit(&mut self, chain: &mut Chain) -> Result<Progress, Fault> {
        let mut memory = self.session.memory.memory();
        let mut moved = 0;
        let progress = loop {
            self.transmit.disarm(&memory)?;
            let mut limited = None;
            while moved < BUDGET && {
                memory = self.session.memory.memory();
                self.transmit.pop(&memory, chain)?
            } {
                // What is no packet is dropped, and that costs nothing.
                let bytes = if request::sendable(&chain.readable) { chain.readable.len() - HEADER } else { 0 };
                if let Err(wait) = self.limiter.take_sent(bytes) {
                    self.transmit.undo_pop(1);
                    limited = Some(wait);
                    break;
                }
                self.transmit_one(&memory, chain)?;
                self.transmit.complete(&memory, chain.head, 0)?;
                moved += 1;
            }
            if let Some(wait) = limited {
                break Progress::Limited(wait);
            }
            if moved == BUDGET {
                break Progress::More;
            }
            if !self.transmit.arm(&memory)? {
                break Progress::Idle;
            }
        };
        if moved > 0 {
            self.transmit.notify(&memory)?;
        }
        Ok(progress)
    }

    fn transmit_one(&self, memory: &GuestMemoryMmap, chain: &Chain) -> Result<(), Fault> {
        let packet = &chain.readable;
        if !request::sendable(packet) {
            self.counters.dropped.fetch_add(1, Relaxed);
            return Ok(());
        }
        let vectors = packet.iovecs(memory, 0..packet.len()).map_err(|source| Fault::Chain { index: 1, source })?;
        match vectors.write_to(self.tap.as_raw_fd()) {
            Ok(_) => {
                self.counters.sent_packets.fetch_add(1, Relaxed);
                self.counters.sent_bytes.fetch_add((packet.len() - HEADER) as u64, Relaxed);
            }
            // The tap's queue is full, the interface is down, or the guest wrote a header that makes no sense: the packet is
            // lost, as on any wire.
            Err(_) => {
                self.counters.dropped.fetch_add(1, Relaxed);
            }
        }
        Ok(())
    }
}

const _: () = assert!(PACKET_MAX < u32::MAX as usize);
