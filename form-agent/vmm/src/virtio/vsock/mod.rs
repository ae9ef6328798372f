//! virtio-vsock (virtio 1.2, section 5.10) in user space: streams that the host opens to listeners in the guest.
//!
//! Each is one end of a Unix socket pair; the device's thread moves bytes between the other end and the guest. What the guest
//! may send is bounded by the credit it was given, what we send by the credit it gave; a slow end on either side stops its
//! own stream only.

mod connection;
mod connector;
mod device;
mod link;
mod request;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use connector::{Connecting, Connector};
pub use device::{CONNECTIONS_MAX, Vsock};
