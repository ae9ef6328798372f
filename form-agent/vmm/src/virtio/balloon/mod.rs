//! virtio-balloon (virtio 1.2, section 5.5): memory that the guest gives back, when asked (inflate) and by itself (free page
//! reporting).

mod device;
mod request;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Balloon, Handle};
