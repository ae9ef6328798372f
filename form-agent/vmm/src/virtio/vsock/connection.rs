//! One stream as a state machine without any input or output: what a packet from the guest means, what is to be sent, and
//! how much each side may send (section 5.10.6.3).

use std::{collections::VecDeque, num::Wrapping};

use super::request::{HOST_CID, Header, Operation, PAYLOAD_MAX, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};

/// Our receive buffer for each stream, in bytes: what a guest can make us hold while the host's end does not read.
pub const BUFFER: u32 = 128 * 1024;

/// The two ends of a stream, as the guest names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// What a packet from the guest did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Nothing to do but to look at what may be sent now.
    Continue,
    /// The guest's listener took the connection.
    Opened,
    /// The packet's payload is to be delivered; it fits into the buffer.
    Data,
    /// The guest will not send, or not receive, any more: see [`Connection::guest_sends`], [`Connection::guest_receives`].
    HalfClosed,
    /// The guest reset the stream: it is gone there. While connecting: nobody listens.
    Gone,
    /// The guest broke the protocol: the stream is to be reset.
    Violation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Requested,
    Open,
}

#[derive(Debug)]
pub struct Connection {
    key: Key,
    guest_cid: u64,
    phase: Phase,
    /// Received from the guest and not yet taken by the host's end; at most [`BUFFER`] bytes.
    backlog: VecDeque<u8>,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// The last `forwarded` that the guest was told.
    announced: Wrapping<u32>,
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    guest_sends: bool,
    guest_receives: bool,
    host_sends: bool,
    host_receives: bool,
    /// The flags of the last SHUTDOWN sent.
    told: u32,
    request_due: bool,
    update_due: bool,
    /// Credit was asked for and none came yet.
    credit_asked: bool,
    credit_request_due: bool,
}

impl Connection {
    /// A stream that the host opens: first [`Connection::next_control`] is the REQUEST.
    pub fn request(key: Key, guest_cid: u64) -> Self {
        Self {
            key,
            guest_cid,
            phase: Phase::Requested,
            backlog: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            host_receives: true,
            told: 0,
            request_due: true,
            update_due: false,
            credit_asked: false,
            credit_request_due: false,
        }
    }

    pub fn key(&self) -> Key {
        self.key
    }

    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    pub fn guest_sends(&self) -> bool {
        self.guest_sends
    }

    pub fn guest_receives(&self) -> bool {
        self.guest_receives
    }

    /// The guest closed its end and everything it sent was delivered: only a RST remains to be sent.
    pub fn is_finished(&self) -> bool {
        !self.guest_sends && !self.guest_receives && self.backlog.is_empty()
    }

    /// Takes a packet of this stream.
    pub fn packet(&mut self, header: &Header) -> Reaction {
        if header.operation == Operation::Reset {
            return Reaction::Gone;
        }
        self.guest_buffer = header.buffer;
        self.guest_forwarded = Wrapping(header.forwarded);
        if self.credit() > 0 {
            self.credit_asked = false;
            self.credit_request_due = false;
        }
        match (self.phase, header.operation) {
            (Phase::Requested, Operation::Response) if !self.request_due => {
                self.phase = Phase::Open;
                Reaction::Opened
            }
            (Phase::Open, Operation::Data) if self.guest_sends && header.length <= self.free() => {
                self.received += header.length;
                Reaction::Data
            }
            (Phase::Open, Operation::CreditUpdate) => Reaction::Continue,
            (Phase::Open, Operation::CreditRequest) => {
                self.update_due = true;
                Reaction::Continue
            }
            (Phase::Open, Operation::Shutdown) => {
                self.guest_receives &= header.flags & SHUTDOWN_RECEIVE == 0;
                self.guest_sends &= header.flags & SHUTDOWN_SEND == 0;
                Reaction::HalfClosed
            }
            _ => Reaction::Violation,
        }
    }

    /// Room in our receive buffer.
    fn free(&self) -> u32 {
        BUFFER.saturating_sub((self.received - self.forwarded).0)
    }

    /// Keeps bytes of a [`Reaction::Data`] that the host's end did not take at once.
    pub fn hold(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
    }

    /// What is held, in two pieces.
    pub fn held(&self) -> (&[u8], &[u8]) {
        self.backlog.as_slices()
    }

    pub fn holds(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The host's end took `count` bytes that were held.
    pub fn released(&mut self, count: usize) {
        let count = count.min(self.backlog.len());
        self.backlog.drain(..count);
        if self.backlog.is_empty() {
            // Most streams never hold anything: do not keep the memory of one slow moment.
            self.backlog = VecDeque::new();
        }
        self.passed(count);
    }

    /// The host's end took `count` bytes that were never held.
    pub fn passed(&mut self, count: usize) {
        self.forwarded += count as u32;
        let untold = (self.forwarded - self.announced).0;
        let seen_free = BUFFER.saturating_sub((self.received - self.announced).0);
        if untold >= BUFFER / 2 || (untold > 0 && seen_free < PAYLOAD_MAX as u32) {
            self.update_due = true;
        }
    }

    /// How many bytes the guest can take now.
    pub fn credit(&self) -> u32 {
        // A guest that claims to have taken more than was sent gets a huge number here, and so no more bytes.
        self.guest_buffer.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    /// Whether bytes of the host's end will be sent, now or when there is credit.
    pub fn wants_host_data(&self) -> bool {
        self.phase == Phase::Open && self.host_sends && self.guest_receives
    }

    /// Whether bytes of the host's end may be sent now. If only credit is missing, it is asked for, once.
    pub fn may_send(&mut self) -> bool {
        let wanted = self.wants_host_data();
        if wanted && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.credit_request_due = true;
        }
        wanted && self.credit() > 0
    }

    /// The header for `length` bytes of the host's end, at most [`Connection::credit`].
    pub fn data(&mut self, length: u32) -> Header {
        self.sent += length;
        self.header(Operation::Data, length, 0)
    }

    /// The host's end will send no more.
    pub fn host_ended(&mut self) {
        self.host_sends = false;
    }

    /// The host's end is closed: it will neither send nor take any more.
    pub fn host_closed(&mut self) {
        self.host_sends = false;
        self.host_receives = false;
    }

    /// Whether the guest was told that the host's end is closed, and has not answered.
    pub fn awaits_close(&self) -> bool {
        self.told == SHUTDOWN_RECEIVE | SHUTDOWN_SEND
    }

    /// Whether [`Connection::next_control`] has something.
    pub fn has_control(&self) -> bool {
        self.request_due || (self.phase == Phase::Open && (self.update_due || self.credit_request_due || self.shutdown_due().is_some()))
    }

    /// The next packet without payload that is to be sent. Data read before the host's end closed is sent before it is asked.
    pub fn next_control(&mut self) -> Option<Header> {
        if self.request_due {
            self.request_due = false;
            return Some(self.header(Operation::Request, 0, 0));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.update_due {
            return Some(self.header(Operation::CreditUpdate, 0, 0));
        }
        if self.credit_request_due {
            self.credit_request_due = false;
            return Some(self.header(Operation::CreditRequest, 0, 0));
        }
        let flags = self.shutdown_due()?;
        self.told = flags;
        Some(self.header(Operation::Shutdown, 0, flags))
    }

    fn shutdown_due(&self) -> Option<u32> {
        let receive = if self.host_receives { 0 } else { SHUTDOWN_RECEIVE };
        let send = if self.host_sends { 0 } else { SHUTDOWN_SEND };
        let flags = receive | send;
        (flags != self.told).then_some(flags)
    }

    /// The RST that ends the stream.
    pub fn reset(&mut self) -> Header {
        self.header(Operation::Reset, 0, 0)
    }

    fn header(&mut self, operation: Operation, length: u32, flags: u32) -> Header {
        // Every packet carries our credit, so none needs to be told apart.
        self.announced = self.forwarded;
        self.update_due = false;
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: self.key.host_port,
            destination_port: self.key.guest_port,
            length,
            kind: TYPE_STREAM,
            operation,
            flags,
            buffer: BUFFER,
            forwarded: self.forwarded.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: Key = Key { host_port: 7, guest_port: 80 };

    fn from_guest(operation: Operation, length: u32, flags: u32, buffer: u32, forwarded: u32) -> Header {
        Header {
            source_cid: 3,
            destination_cid: HOST_CID,
            source_port: KEY.guest_port,
            destination_port: KEY.host_port,
            length,
            kind: TYPE_STREAM,
            operation,
            flags,
            buffer,
            forwarded,
        }
    }

    fn open(guest_buffer: u32) -> Connection {
        let mut connection = Connection::request(KEY, 3);
        assert_eq!(connection.next_control().unwrap().operation, Operation::Request);
        assert_eq!(connection.packet(&from_guest(Operation::Response, 0, 0, guest_buffer, 0)), Reaction::Opened);
        connection
    }

    #[test]
    fn a_response_without_a_request_is_a_violation() {
        let mut connection = Connection::request(KEY, 3);
        assert_eq!(connection.packet(&from_guest(Operation::Response, 0, 0, 1, 0)), Reaction::Violation);
        let mut connection = open(1);
        assert_eq!(connection.packet(&from_guest(Operation::Response, 0, 0, 1, 0)), Reaction::Violation);
        assert_eq!(connection.packet(&from_guest(Operation::Request, 0, 0, 1, 0)), Reaction::Violation);
        assert_eq!(connection.packet(&from_guest(Operation::Unknown(9), 0, 0, 1, 0)), Reaction::Violation);
        assert_eq!(connection.packet(&from_guest(Operation::Reset, 0, 0, 0, 0)), Reaction::Gone);
    }

    #[test]
    fn what_is_sent_stays_within_the_guests_credit() {
        let mut connection = open(100);
        assert!(connection.may_send());
        assert_eq!(connection.data(100).length, 100);
        assert_eq!(connection.credit(), 0);
        assert!(!connection.may_send());
        assert_eq!(connection.next_control().unwrap().operation, Operation::CreditRequest);
        assert!(!connection.may_send());
        assert!(connection.next_control().is_none(), "asked once");
        connection.packet(&from_guest(Operation::CreditUpdate, 0, 0, 100, 60));
        assert_eq!(connection.credit(), 60);
        // A smaller buffer, or a claim to have read the future, gives nothing.
        connection.packet(&from_guest(Operation::CreditUpdate, 0, 0, 10, 60));
        assert_eq!(connection.credit(), 0);
        connection.packet(&from_guest(Operation::CreditUpdate, 0, 0, u32::MAX, 101));
        assert_eq!(connection.credit(), 0);
    }

    #[test]
    fn counters_wrap() {
        let mut connection = open(1000);
        connection.sent = Wrapping(u32::MAX - 10);
        connection.guest_forwarded = Wrapping(u32::MAX - 110);
        assert_eq!(connection.credit(), 900);
        connection.data(900);
        connection.packet(&from_guest(Operation::CreditUpdate, 0, 0, 1000, 889));
        assert_eq!(connection.credit(), 1000);
    }

    #[test]
    fn the_guest_is_told_when_there_is_room_again() {
        let mut connection = open(1);
        let mut taken = 0;
        while connection.packet(&from_guest(Operation::Data, 4096, 0, 1, 0)) == Reaction::Data {
            connection.hold(&[1; 4096]);
            taken += 4096;
        }
        assert_eq!(taken, BUFFER, "more than our buffer is a violation");
        assert!(!connection.has_control());
        connection.released(1);
        let update = connection.next_control().unwrap();
        assert_eq!((update.operation, update.buffer, update.forwarded), (Operation::CreditUpdate, BUFFER, 1));
        connection.released(BUFFER as usize);
        assert!(!connection.holds());
        assert_eq!(connection.next_control().unwrap().forwarded, BUFFER);
        assert!(connection.next_control().is_none());
    }

    #[test]
    fn both_sides_close_in_halves() {
        let mut connection = open(10);
        connection.host_ended();
        assert!(!connection.may_send());
        assert_eq!(connection.next_control().unwrap().flags, SHUTDOWN_SEND);
        assert!(!connection.awaits_close());
        assert_eq!(connection.packet(&from_guest(Operation::Data, 3, 0, 10, 0)), Reaction::Data);
        connection.hold(b"abc");
        assert_eq!(connection.packet(&from_guest(Operation::Shutdown, 0, SHUTDOWN_SEND, 10, 0)), Reaction::HalfClosed);
        assert_eq!(connection.packet(&from_guest(Operation::Data, 3, 0, 10, 0)), Reaction::Violation);
        assert_eq!(connection.packet(&from_guest(Operation::Shutdown, 0, SHUTDOWN_RECEIVE, 10, 0)), Reaction::HalfClosed);
        assert!(!connection.is_finished(), "there is something to deliver");
        connection.released(3);
        assert!(connection.is_finished());
        connection.host_closed();
        assert_eq!(connection.next_control().unwrap().flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        assert!(connection.awaits_close());
    }

    proptest! {
        /// Any sequence of packets and of what the host does: neither side's buffer is ever overrun.
        #[test]
        fn credit_holds_whatever_happens(steps in prop::collection::vec((0_u8..8, any::<u32>(), any::<u32>()), 0..200)) {
            let mut connection = open(1000);
            let mut held = 0;
            for (step, one, two) in steps {
                match step {
                    0..=2 => {
                        let length = one % 70_000;
                        if connection.packet(&from_guest(Operation::Data, length, 0, two % 5000, one)) == Reaction::Data {
                            held += length;
                            connection.hold(&vec![0; length as usize]);
                        }
                    }
                    3 => {
                        let count = (one % 50_000).min(held);
                        held -= count;
                        connection.released(count as usize);
                    }
                    4 => { connection.packet(&from_guest(Operation::CreditUpdate, 0, 0, one % 5000, two)); }
                    5 => {
                        let length = connection.credit().min(one % 3000);
                        if connection.may_send() && length > 0 {
                            connection.data(length);
                        }
                    }
                    6 => { while connection.next_control().is_some() {} }
                    _ => { connection.packet(&from_guest(Operation::CreditRequest, 0, 0, one % 5000, two)); }
                }
                let (front, back) = connection.held();
                prop_assert_eq!(front.len() + back.len(), held as usize);
                prop_assert!(held <= BUFFER);
                prop_assert!(connection.credit() <= 5000);
            }
        }
    }
}
