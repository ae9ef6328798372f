//! virtio-net (virtio 1.2, section 5.1) on a tap: one queue pair, and packets that go straight between tap and guest memory. A thread of ours moves
//! them ([`worker`]), or the host's kernel does ([`vhost`]).

mod device;
mod limiter;
mod request;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;
mod worker;

pub use device::{Carrier, Counters, Net};
pub use limiter::Limiter;
