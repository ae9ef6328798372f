//! The memory device, in the hands of a hostile driver. What the host gives and takes must be what the device says, and never more than the
//! guest should have.

#![no_main]

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex},
};

use arbitrary::Arbitrary;
use form_fuzz::device::{Parts, Target, input::Input, run};
use form_vmm::virtio::{
    VirtioDevice,
    mem::{BLOCK, Backing, Handle, Mem, Region},
};
use libfuzzer_sys::fuzz_target;

const REGION: Region = Region { start: 68 << 30, blocks: 12 };

#[derive(Arbitrary, Debug)]
enum Request {
    Plug(Blocks),
    Unplug(Blocks),
    UnplugAll,
    State(Blocks),
    Other { kind: u16, blocks: Blocks },
    Bytes { data: Vec<u8>, room: u16 },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Blocks {
    Of { first: u8, count: u8 },
    Any { address: u64, count: u16 },
}

fn bytes(kind: u16, blocks: Blocks) -> Vec<u8> {
    let (address, count) = match blocks {
        // Often beside the end.
        Blocks::Of { first, count } => (REGION.start + u64::from(first % 14) * BLOCK, u16::from(count % 6)),
        Blocks::Any { address, count } => (address, count),
    };
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

#[derive(Arbitrary, Debug)]
enum Event {
    Want(u8),
    /// The host cannot give or take this block from now on.
    Fail(Option<u8>),
}

#[derive(Default)]
struct Given {
    blocks: BTreeSet<u32>,
    fails: Option<u32>,
    /// The most that the guest should have had since it had less.
    most: usize,
}

#[derive(Clone, Default)]
struct Host(Arc<Mutex<Given>>);

impl Backing for Host {
    fn plug(&self, index: u32) -> io::Result<()> {
        let mut given = self.0.lock().unwrap();
        if given.fails == Some(index) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(index < REGION.blocks && given.blocks.insert(index), "block {index} was given twice, or is none");
        assert!(given.blocks.len() <= given.most, "more than the guest should have");
        Ok(())
    }

    fn unplug(&self, index: u32) -> io::Result<()> {
        let mut given = self.0.lock().unwrap();
        if given.fails == Some(index) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(given.blocks.remove(&index), "block {index} was taken, and the guest had it not");
        Ok(())
    }
}

#[derive(Default)]
struct Memory {
    host: Host,
    handle: Option<Handle>,
}

impl Target for Memory {
    type Request = Request;
    type Event = Event;

    fn device(&mut self, variant: u8) -> Box<dyn VirtioDevice> {
        let wanted = u32::from(variant) % (REGION.blocks + 1);
        let memory = Mem::new("memory".to_owned(), REGION, Box::new(self.host.clone()));
        self.host.0.lock().unwrap().most = wanted as usize;
        memory.handle().want(wanted).expect("as many as there are");
        self.handle = Some(memory.handle());
        Box::new(memory)
    }

    fn parts(&self, request: &Request) -> Parts {
        let whole = |kind, blocks| Parts { queue: 0, readable: bytes(kind, blocks), writable: 10 };
        match request {
            Request::Plug(blocks) => whole(0, *blocks),
            Request::Unplug(blocks) => whole(1, *blocks),
            Request::UnplugAll => whole(2, Blocks::Any { address: 0, count: 0 }),
            Request::State(blocks) => whole(3, *blocks),
            Request::Other { kind, blocks } => whole(*kind, *blocks),
            Request::Bytes { data, room } => Parts { queue: 0, readable: data.clone(), writable: u32::from(*room) },
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Want(wanted) => {
                let wanted = u32::from(*wanted) % (REGION.blocks + 2);
                let possible = self.handle.as_ref().is_some_and(|handle| handle.want(wanted).is_ok());
                assert_eq!(possible, wanted <= REGION.blocks);
                if possible {
                    self.host.0.lock().unwrap().most = wanted as usize;
                }
            }
            Event::Fail(index) => self.host.0.lock().unwrap().fails = index.map(u32::from),
        }
    }

    fn check(&mut self) {
        let Some(handle) = &self.handle else { return };
        let given = self.host.0.lock().unwrap();
        assert_eq!(handle.plugged() as usize, given.blocks.len(), "the device and the host disagree");
    }
}

fuzz_target!(|input: Input<Request, Event>| run::<Memory>(input));
