//! A network interface over a socket, in the hands of a hostile driver.

#![no_main]

use std::os::fd::OwnedFd;

use arbitrary::Arbitrary;
use form_fuzz::device::{Parts, Target, input::Input, run};
use form_vmm::virtio::{VirtioDevice, net::Net};
use libfuzzer_sys::fuzz_target;
use rustix::{
    io::{read, write},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};

const HEADER: usize = 12;
const MTU: u16 = 1500;

#[derive(Arbitrary, Debug)]
enum Request {
    /// Buffers for packets that come.
    Receive {
        room: u16,
    },
    Transmit {
        header: [u8; HEADER],
        fill: u8,
        length: u16,
    },
    /// To queue 0 or 1, whatever it is.
    Other {
        queue: bool,
        data: Vec<u8>,
        room: u16,
    },
}

#[derive(Arbitrary, Debug)]
enum Event {
    /// A packet comes: its length, the header included.
    Packet {
        length: u16,
        fill: u8,
    },
    Packets {
        length: u16,
        count: u8,
    },
}

#[derive(Default)]
struct Interface {
    wire: Option<OwnedFd>,
}

impl Interface {
    fn send(&self, length: u16, fill: u8) {
        if let Some(wire) = &self.wire {
            // A full socket loses packets, as a wire does.
            let _ = write(wire, &vec![fill; usize::from(length)]);
        }
    }
}

impl Target for Interface {
    type Request = Request;
    type Event = Event;

    fn device(&mut self, _variant: u8) -> Box<dyn VirtioDevice> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (wire, tap) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).expect("two sockets");
        self.wire = Some(wire);
        Box::new(Net::over_socket("net".to_owned(), tap, [2, 0, 0, 0, 0, 9], MTU).expect("an eventfd"))
    }

    fn parts(&self, request: &Request) -> Parts {
        match request {
            Request::Receive { room } => Parts { queue: 0, readable: Vec::new(), writable: u32::from(*room) },
            Request::Transmit { header, fill, length } => {
                let mut readable = header.to_vec();
                readable.resize(HEADER + usize::from(*length), *fill);
                Parts { queue: 1, readable, writable: 0 }
            }
            Request::Other { queue, data, room } => {
                Parts { queue: usize::from(*queue), readable: data.clone(), writable: u32::from(*room) }
            }
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Packet { length, fill } => self.send(*length, *fill),
            Event::Packets { length, count } => (0..*count % 8).for_each(|fill| self.send(*length, fill)),
        }
    }

    fn check(&mut self) {
        let Some(wire) = &self.wire else { return };
        let mut packet = vec![0; 1 << 17];
        while let Ok(length) = read(wire, &mut packet) {
            assert!((HEADER + 14..=65550 + HEADER).contains(&length), "a packet of {length} bytes was sent");
        }
    }
}

fuzz_target!(|input: Input<Request, Event>| run::<Interface>(input));
