//! The socket device, in the hands of a hostile driver, with host ends that connect, write, read and close.

#![no_main]

use std::{os::fd::OwnedFd, time::Duration};

use arbitrary::Arbitrary;
use form_fuzz::device::{Parts, Target, input::Input, run};
use form_vmm::virtio::{
    VirtioDevice,
    vsock::{Connecting, Connector, Vsock},
};
use libfuzzer_sys::fuzz_target;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};

const GUEST: u64 = 3;
/// The ports that the host's ends get first (an implementation detail that a guest learns from the first REQUEST).
const HOST_PORT: u32 = 1 << 30;

/// A packet as the guest sends it.
#[derive(Arbitrary, Debug)]
struct Packet {
    /// Of which stream.
    stream: u8,
    port: u8,
    operation: u8,
    flags: u8,
    length: u16,
    /// What the header says of the length, when it lies.
    claimed: Option<u32>,
    buffer: u32,
    forwarded: u32,
    odd: Option<Odd>,
}

#[derive(Arbitrary, Debug)]
struct Odd {
    source_cid: u64,
    destination_cid: u64,
    source_port: u32,
    destination_port: u32,
    kind: u16,
    operation: u16,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut odd = Odd {
            source_cid: GUEST,
            destination_cid: 2,
            source_port: u32::from(self.port % 4),
            destination_port: HOST_PORT + u32::from(self.stream % 8),
            kind: 1,
            operation: u16::from(self.operation % 9),
        };
        if let Some(Odd { source_cid, destination_cid, source_port, destination_port, kind, operation }) = self.odd {
            odd = Odd { source_cid, destination_cid, source_port, destination_port, kind, operation };
        }
        let mut bytes = Vec::with_capacity(44 + usize::from(self.length));
        bytes.extend(odd.source_cid.to_le_bytes());
        bytes.extend(odd.destination_cid.to_le_bytes());
        bytes.extend(odd.source_port.to_le_bytes());
        bytes.extend(odd.destination_port.to_le_bytes());
        bytes.extend(self.claimed.unwrap_or(u32::from(self.length)).to_le_bytes());
        bytes.extend(odd.kind.to_le_bytes());
        bytes.extend(odd.operation.to_le_bytes());
        bytes.extend(u32::from(self.flags).to_le_bytes());
        bytes.extend(self.buffer.to_le_bytes());
        bytes.extend(self.forwarded.to_le_bytes());
        bytes.resize(44 + usize::from(self.length), self.port);
        bytes
    }
}

#[derive(Arbitrary, Debug)]
enum Request {
    Transmit(Packet),
    Receive { room: u16 },
    Event { room: u8 },
    Other { queue: u8, data: Vec<u8>, room: u16 },
}

#[derive(Arbitrary, Debug)]
enum Event {
    Connect { port: u8 },
    GiveUp { which: u8 },
    Write { which: u8, length: u16 },
    Read { which: u8, length: u16 },
    Close { which: u8 },
    Shutdown { which: u8, how: u8 },
}

#[derive(Default)]
struct Sockets {
    connector: Option<Connector>,
    waiting: Vec<Connecting>,
    open: Vec<OwnedFd>,
}

impl Sockets {
    /// Takes up what the guest's listeners took.
    fn settle(&mut self) {
        for connecting in std::mem::take(&mut self.waiting) {
            match connecting.taken() {
                Ok(stream) => self.open.push(stream),
                Err(connecting) => self.waiting.push(connecting),
            }
        }
    }

    fn stream(&self, which: u8) -> Option<&OwnedFd> {
        self.open.get(usize::from(which) % self.open.len().max(1))
    }
}

impl Target for Sockets {
    type Request = Request;
    type Event = Event;

    fn device(&mut self, _variant: u8) -> Box<dyn VirtioDevice> {
        let vsock = Vsock::new(GUEST).expect("an eventfd");
        self.connector = Some(vsock.connector());
        Box::new(vsock)
    }

    fn parts(&self, request: &Request) -> Parts {
        match request {
            Request::Receive { room } => Parts { queue: 0, readable: Vec::new(), writable: u32::from(*room) },
            Request::Transmit(packet) => Parts { queue: 1, readable: packet.bytes(), writable: 0 },
            Request::Event { room } => Parts { queue: 2, readable: Vec::new(), writable: u32::from(*room) },
            Request::Other { queue, data, room } => {
                Parts { queue: usize::from(queue % 3), readable: data.clone(), writable: u32::from(*room) }
            }
        }
    }

    fn event(&mut self, event: &Event) {
        self.settle();
        match event {
            Event::Connect { port } => {
                if self.waiting.len() + self.open.len() < 16
                    && let Some(connector) = &self.connector
                    && let Ok(connecting) = connector.start(u32::from(port % 4), Duration::from_secs(3600))
                {
                    self.waiting.push(connecting);
                }
            }
            Event::GiveUp { which } => {
                if !self.waiting.is_empty() {
                    self.waiting.remove(usize::from(*which) % self.waiting.len());
                }
            }
            Event::Close { which } => {
                if !self.open.is_empty() {
                    self.open.remove(usize::from(*which) % self.open.len());
                }
            }
            Event::Write { which, length } => {
                if let Some(stream) = self.stream(*which) {
                    let _ = rustix::io::ioctl_fionbio(stream, true);
                    let _ = rustix::net::send(stream, &vec![*which; usize::from(*length)], rustix::net::SendFlags::NOSIGNAL);
                }
            }
            Event::Read { which, length } => {
                if let Some(stream) = self.stream(*which) {
                    let mut buffer = vec![0; usize::from(*length)];
                    let _ = recv(stream, &mut buffer, RecvFlags::DONTWAIT);
                }
            }
            Event::Shutdown { which, how } => {
                if let Some(stream) = self.stream(*which) {
                    let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(how % 3)];
                    let _ = shutdown(stream, how);
                }
            }
        }
    }
}

fuzz_target!(|input: Input<Request, Event>| run::<Sockets>(input));
