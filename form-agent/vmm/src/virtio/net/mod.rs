//! virtio-net (virtio 1.2, section 5.1) on a tap: one queue pair, one thread, packets straight between tap and guest memory.

mod device;
mod limiter;
mod request;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Counters, Net};
pub use limiter::Limiter;
