//! virtio-rng (virtio 1.2, section 5.4): entropy from the host's kernel.

mod device;
mod request;
mod state;
#[cfg(test)]
mod tests;

pub use device::Rng;
