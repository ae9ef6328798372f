//! The thread that moves bytes between the guest and the host ends of its streams.

use std::{
    io,
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{
    epoll::{EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    connection::{Key, Reaction},
    connector::Door,
    device::CONNECTIONS_MAX,
    link::{LinkId, Links},
    request::{self, HEADER, Header, Operation, PAYLOAD_MAX, Packet},
};
use crate::memory::GuestMemoryMmap;
use crate::virtio::{
    chain::Chain,
    ring::{Fault, Ring, Session},
    task::{Exit, Poller},
};

const EXIT: u64 = 0;
const RECEIVE: u64 = 1;
const TRANSMIT: u64 = 2;
const EVENT: u64 = 3;
const DOOR: u64 = 4;
/// Tokens from here on are links.
const LINKS: u64 = 16;

/// Packets moved one way before the other way gets its turn.
const BUDGET: usize = 128;
/// RSTs that may wait for receive buffers: beyond that nothing more is taken from a guest that does not listen.
const RESETS_MAX: usize = 256;
/// How long a guest may take to confirm that a stream is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

pub struct VsockWorker {
    session: Session,
    receive: Ring,
    transmit: Ring,
    event: Ring,
    cid: u64,
    links: Links,
    door: Arc<Door>,
    announce_reset: bool,
    /// The earliest deadline of a link, or earlier.
    alarm: Option<Instant>,
    poller: Option<Poller>,
}

impl VsockWorker {
    #[expect(clippy::too_many_arguments, reason = "three rings and what they work on")]
    pub fn new(
        session: Session,
        receive: Ring,
        transmit: Ring,
        event: Ring,
        cid: u64,
        links: Links,
        door: Arc<Door>,
        announce_reset: bool,
    ) -> Self {
        Self { session, receive, transmit, event, cid, links, door, announce_reset, alarm: None, poller: None }
    }

    /// The streams, whether the guest still has to be told of a reset, and the queues.
    pub fn into_parts(self) -> (Links, bool, Vec<(u16, Queue, EventFd)>) {
        (self.links, self.announce_reset, vec![self.receive.into_parts(), self.transmit.into_parts(), self.event.into_parts()])
    }

    pub fn run(mut self, exit: &Exit) -> Self {
        if let Err(fault) = self.serve(exit) {
            self.session.report(&fault);
            // The guest's side is lost until it is reset; do not let the host's ends wait for it.
            self.door.set_open(false);
            self.links = Links::from_port(self.links.next_port());
        }
        self.poller = None;
        self
    }

    fn serve(&mut self, exit: &Exit) -> Result<(), Fault> {
        let host = |source| Fault::Host { context: "could not wait for the driver", source };
        let poller = Poller::new(64).map_err(host)?;
        for (fd, token) in [
            (exit.as_raw_fd(), EXIT),
            (self.receive.kick_fd(), RECEIVE),
            (self.transmit.kick_fd(), TRANSMIT),
            (self.event.kick_fd(), EVENT),
            (self.door.as_raw_fd(), DOOR),
        ] {
            poller.add(fd, token, EventSet::IN).map_err(host)?;
        }
        self.poller = Some(poller);
        self.resume()?;
        let mut chain = Chain::default();
        let (mut receive, mut transmit) = (true, true);
        while !exit.requested() {
            if transmit {
                transmit = self.transmit(&mut chain)?;
            }
            if receive || self.links.has_work() {
                receive = self.receive(&mut chain)?;
            }
            self.announce(&mut chain)?;
            // A guest that is owed RSTs and gives no buffers for them is not listened to until it does.
            let wait = if receive || (transmit && !self.is_clogged()) { Some(Duration::ZERO) } else { self.until_alarm() };
            let Some(poller) = &mut self.poller else { return Ok(()) };
            let events: Vec<EpollEvent> = poller.wait(wait).map_err(host)?.to_vec();
            for event in events {
                match event.data() {
                    EXIT => {}
                    RECEIVE => {
                        self.receive.take_kick();
                        receive = true;
                    }
                    TRANSMIT => {
                        self.transmit.take_kick();
                        transmit = true;
                    }
                    EVENT => self.event.take_kick(),
                    DOOR => self.open_wanted(),
                    token => self.host_event(token - LINKS, event.event_set()),
                }
            }
            self.give_up_overdue();
        }
        Ok(())
    }

    fn is_clogged(&self) -> bool {
        self.links.resets.len() >= RESETS_MAX
    }

    /// Takes up the streams that a pause left.
    fn resume(&mut self) -> Result<(), Fault> {
        for id in self.links.ids() {
            let open = self.links.get(id).is_some_and(|link| link.connection.is_open());
            if open {
                self.watch(id)?;
            }
            self.links.enqueue(id);
        }
        self.alarm = self.links.next_deadline();
        Ok(())
    }

    /// Watches a host end by edge: what it was ready for is remembered in the link.
    fn watch(&mut self, id: LinkId) -> Result<(), Fault> {
        let (Some(link), Some(poller)) = (self.links.get(id), &self.poller) else { return Ok(()) };
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        poller
            .add(link.stream.as_raw_fd(), LINKS + id, events)
            .map_err(|source| Fault::Host { context: "could not watch a stream", source })
    }

    fn until_alarm(&self) -> Option<Duration> {
        self.alarm.map(|alarm| alarm.saturating_duration_since(Instant::now()))
    }

    fn set_deadline(&mut self, id: LinkId, deadline: Instant) {
        if let Some(link) = self.links.get(id) {
            link.deadline = Some(deadline);
            self.alarm = Some(self.alarm.map_or(deadline, |alarm| alarm.min(deadline)));
        }
    }

    fn give_up_overdue(&mut self) {
        let now = Instant::now();
        if self.alarm.is_none_or(|alarm| alarm > now) {
            return;
        }
        for id in self.links.overdue(now) {
            self.reset(id);
        }
        self.alarm = self.links.next_deadline();
    }

    fn open_wanted(&mut self) {
        for wanted in self.door.take() {
            // Dropping the answer tells who asked that it was refused.
            if self.links.len() < CONNECTIONS_MAX {
                let id = self.links.open(wanted.port, self.cid, wanted.stream, wanted.answer, wanted.deadline);
                self.set_deadline(id, wanted.deadline);
                self.links.enqueue(id);
            }
        }
    }

    /// Something happened at the host's end of a stream.
    fn host_event(&mut self, id: LinkId, events: EventSet) {
        let Some(link) = self.links.get(id) else { return };
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            link.readable = true;
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            link.hung_up = true;
        }
        self.deliver(id);
    }

    /// Delivers what is held for the host's end and draws the consequences.
    fn deliver(&mut self, id: LinkId) {
        let Some(link) = self.links.get(id) else { return };
        if !link.flush() {
            // Nobody will ever take what the guest sent.
            self.reset(id);
            return;
        }
        if link.draining {
            if !link.connection.holds() {
                self.links.remove(id);
            }
            return;
        }
        if link.connection.is_finished() {
            self.reset(id);
            return;
        }
        link.pass_on_shutdown();
        self.links.enqueue(id);
    }

    /// Ends a stream on both sides.
    fn reset(&mut self, id: LinkId) {
        let known = self.links.get(id).is_some_and(|link| !link.draining);
        if let Some(mut link) = self.links.remove(id)
            && known
        {
            self.links.resets.push_back(link.connection.reset());
        }
    }

    /// Moves packets from the guest. `true`: there is more at once.
    fn transmit(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        let mut memory = self.session.memory.memory();
        let mut moved = 0;
        let more = loop {
            self.transmit.disarm(&memory)?;
            while moved < BUDGET && !self.is_clogged() && {
                memory = self.session.memory.memory();
                self.transmit.pop(&memory, chain)?
            } {
                self.take_packet(&memory, chain)?;
                self.transmit.complete(&memory, chain.head, 0)?;
                moved += 1;
            }
            if moved == BUDGET || self.is_clogged() {
                break true;
            }
            if !self.transmit.arm(&memory)? {
                break false;
            }
        };
        if moved > 0 {
            self.transmit.notify(&memory)?;
        }
        Ok(more)
    }

    fn take_packet(&mut self, memory: &GuestMemoryMmap, chain: &Chain) -> Result<(), Fault> {
        let packet = request::parse(memory, &chain.readable, self.cid).map_err(|source| Fault::Chain { index: 1, source })?;
        let header = match packet {
            Packet::Ignore => return Ok(()),
            Packet::Foreign(header) => {
                self.refuse(&header);
                return Ok(());
            }
            Packet::Stream(header) => header,
        };
        let key = Key { host_port: header.destination_port, guest_port: header.source_port };
        let Some(id) = self.links.find(key) else {
            // Streams are opened by the host only, so a REQUEST belongs here too.
            self.refuse(&header);
            return Ok(());
        };
        let Some(link) = self.links.get(id) else { return Ok(()) };
        match link.connection.packet(&header) {
            Reaction::Continue => self.links.enqueue(id),
            Reaction::Opened => {
                link.deadline = None;
                // Who asked may have given up meanwhile.
                let heard = link.answer.take().is_some_and(|answer| answer.send(()).is_ok());
                if heard {
                    self.watch(id)?;
                    self.links.enqueue(id);
                } else {
                    self.reset(id);
                }
            }
            Reaction::Data => self.take_data(memory, chain, id, header.length as usize)?,
            Reaction::HalfClosed => self.deliver(id),
            Reaction::Gone => {
                self.links.forget(id);
                self.deliver(id);
            }
            Reaction::Violation => self.reset(id),
        }
        Ok(())
    }

    fn refuse(&mut self, header: &Header) {
        if header.operation != Operation::Reset {
            self.links.resets.push_back(header.reset_for());
        }
    }

    /// Gives the payload of a packet to the host's end, and holds what it does not take.
    fn take_data(&mut self, memory: &GuestMemoryMmap, chain: &Chain, id: LinkId, length: usize) -> Result<(), Fault> {
        let malformed = |source| Fault::Chain { index: 1, source };
        let Some(link) = self.links.get(id) else { return Ok(()) };
        let mut taken = 0;
        if !link.connection.holds() {
            let payload = chain.readable.iovecs(memory, HEADER..HEADER + length).map_err(malformed)?;
            taken = match payload.send_to(link.stream.as_raw_fd()) {
                Ok(count) => count,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                Err(_) => {
                    self.reset(id);
                    return Ok(());
                }
            };
            link.connection.passed(taken);
        }
        let mut piece = [0; 4096];
        while taken < length {
            let count = piece.len().min(length - taken);
            chain.readable.read(memory, HEADER + taken, &mut piece[..count]).map_err(malformed)?;
            link.connection.hold(&piece[..count]);
            taken += count;
        }
        self.deliver(id);
        Ok(())
    }

    /// Moves packets to the guest. `true`: there is more at once.
    fn receive(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        let mut moved = 0;
        let mut armed = false;
        while self.links.has_work() && moved < BUDGET {
            let memory = self.session.memory.memory();
            if !self.receive.pop(&memory, chain)? {
                if armed || !self.receive.arm(&memory)? {
                    break;
                }
                armed = true;
                continue;
            }
            if chain.writable.len() < HEADER {
                return Err(Fault::Request("a vsock receive buffer shorter than a packet's header"));
            }
            match self.next_packet(&memory, chain)? {
                Some(written) => {
                    self.receive.complete(&memory, chain.head, written)?;
                    moved += 1;
                }
                None => self.receive.undo_pop(1),
            }
        }
        if moved > 0 {
            self.receive.notify(&self.session.memory.memory())?;
        }
        Ok(moved == BUDGET && self.links.has_work())
    }

    /// Writes the next packet into the chain; gives its length. `None`: the link in turn had nothing after all.
    fn next_packet(&mut self, memory: &GuestMemoryMmap, chain: &Chain) -> Result<Option<usize>, Fault> {
        let malformed = |source| Fault::Chain { index: 0, source };
        if let Some(header) = self.links.resets.pop_front() {
            chain.writable.write(memory, 0, &header.encode()).map_err(malformed)?;
            return Ok(Some(HEADER));
        }
        let Some(id) = self.links.dequeue() else { return Ok(None) };
        let Some(link) = self.links.get(id) else { return Ok(None) };
        if link.draining {
            return Ok(None);
        }
        if link.hung_up && !link.connection.wants_host_data() {
            link.connection.host_closed();
        }
        if let Some(header) = link.connection.next_control() {
            let awaits_close = link.connection.awaits_close() && header.operation == Operation::Shutdown;
            self.links.enqueue(id);
            if awaits_close {
                self.set_deadline(id, Instant::now() + CLOSE_TIMEOUT);
            }
            chain.writable.write(memory, 0, &header.encode()).map_err(malformed)?;
            return Ok(Some(HEADER));
        }
        if !link.readable || !link.connection.may_send() {
            if link.connection.has_control() {
                self.links.enqueue(id);
            }
            return Ok(None);
        }
        let room = (chain.writable.len() - HEADER).min(PAYLOAD_MAX).min(link.connection.credit() as usize);
        if room == 0 {
            return Err(Fault::Request("a vsock receive buffer without room for data"));
        }
        let mut payload = chain.writable.iovecs(memory, HEADER..HEADER + room).map_err(malformed)?;
        match payload.read_from(link.stream.as_raw_fd()) {
            Ok(0) => {
                link.readable = false;
                if link.hung_up { link.connection.host_closed() } else { link.connection.host_ended() }
            }
            Ok(count) => {
                let header = link.connection.data(count as u32);
                self.links.enqueue(id);
                chain.writable.write(memory, 0, &header.encode()).map_err(malformed)?;
                chain.writable.mark_written(memory, HEADER + count).map_err(malformed)?;
                return Ok(Some(HEADER + count));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                link.readable = false;
                return Ok(None);
            }
            Err(_) => {
                link.readable = false;
                link.connection.host_closed();
            }
        }
        self.links.enqueue(id);
        Ok(None)
    }

    /// Tells the guest that its streams are gone, once it gave a buffer for that.
    fn announce(&mut self, chain: &mut Chain) -> Result<(), Fault> {
        if !self.announce_reset {
            return Ok(());
        }
        let memory = self.session.memory.memory();
        let found = self.event.pop(&memory, chain)? || (self.event.arm(&memory)? && self.event.pop(&memory, chain)?);
        if !found {
            return Ok(());
        }
        chain.writable.write(&memory, 0, &EVENT_TRANSPORT_RESET).map_err(|source| Fault::Chain { index: 2, source })?;
        self.event.complete(&memory, chain.head, EVENT_TRANSPORT_RESET.len())?;
        self.announce_reset = false;
        self.event.notify(&memory)
    }
}
