//! virtio-blk (virtio 1.2, section 5.2): one queue and one thread a disk.

mod backend;
mod device;
mod lock;
mod raw;
mod request;
mod state;

pub use backend::{DiskBackend, Payload};
pub use device::{Block, Counters};
pub use raw::RawFile;
