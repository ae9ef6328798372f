//! The source of entropy, in the hands of a hostile driver.

#![no_main]

use arbitrary::Arbitrary;
use form_fuzz::device::{Parts, Target, input::Input, run};
use form_vmm::virtio::{VirtioDevice, rng::Rng};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Request {
    room: u16,
    /// What a driver never sends.
    data: Option<[u8; 4]>,
}

#[derive(Default)]
struct Entropy;

impl Target for Entropy {
    type Request = Request;
    type Event = ();

    fn device(&mut self, _variant: u8) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new("rng".to_owned()))
    }

    fn parts(&self, request: &Request) -> Parts {
        Parts { queue: 0, readable: request.data.map(Vec::from).unwrap_or_default(), writable: u32::from(request.room) }
    }

    fn event(&mut self, (): &()) {}
}

fuzz_target!(|input: Input<Request, ()>| run::<Entropy>(input));
