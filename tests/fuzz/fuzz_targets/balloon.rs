//! The balloon, in the hands of a hostile driver. It gives pages back that no chain permits to write, wherever they are in guest
//! memory: what must never happen is that a page beside it goes.

#![no_main]

use arbitrary::Arbitrary;
use form_fuzz::device::{
    Parts, Target,
    input::{Input, Place},
    run,
};
use form_vmm::virtio::{
    VirtioDevice,
    balloon::{Balloon, Handle},
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Request {
    Inflate(Vec<Page>),
    Deflate(Vec<Page>),
    Report { room: u16 },
    Other { queue: u8, data: Vec<u8>, room: u16 },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Page {
    Of(Place),
    Number(u32),
    /// So many pages from there on.
    Run(Place, u8),
}

fn numbers(pages: &[Page]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for page in pages.iter().take(300) {
        let (first, count) = match page {
            Page::Of(place) => ((place.address() / 4096) as u32, 1),
            Page::Number(number) => (*number, 1),
            Page::Run(place, count) => ((place.address() / 4096) as u32, u32::from(*count % 64)),
        };
        (0..count).for_each(|offset| bytes.extend(first.wrapping_add(offset).to_le_bytes()));
    }
    bytes
}

#[derive(Default)]
struct Memory {
    handle: Option<Handle>,
}

impl Target for Memory {
    type Request = Request;
    type Event = u32;

    const WRITES_CHAINS_ONLY: bool = false;

    fn device(&mut self, _variant: u8) -> Box<dyn VirtioDevice> {
        let balloon = Balloon::new("balloon".to_owned());
        self.handle = Some(balloon.handle());
        Box::new(balloon)
    }

    fn parts(&self, request: &Request) -> Parts {
        match request {
            Request::Inflate(pages) => Parts { queue: 0, readable: numbers(pages), writable: 0 },
            Request::Deflate(pages) => Parts { queue: 1, readable: numbers(pages), writable: 0 },
            Request::Report { room } => Parts { queue: 2, readable: Vec::new(), writable: u32::from(*room) },
            Request::Other { queue, data, room } => {
                Parts { queue: usize::from(queue % 3), readable: data.clone(), writable: u32::from(*room) }
            }
        }
    }

    fn event(&mut self, target: &u32) {
        if let Some(handle) = &self.handle {
            let _ = handle.set_target_mib(u64::from(*target));
            let _ = (handle.actual_mib(), handle.freed_bytes());
        }
    }
}

fuzz_target!(|input: Input<Request, u32>| run::<Memory>(input));
