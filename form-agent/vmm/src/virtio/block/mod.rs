//! virtio-blk (virtio 1.2, section 5.2): one queue and one thread a disk.

mod backend;
mod device;
mod limiter;
mod lock;
mod qcow2;
mod raw;
mod request;
mod state;
#[cfg(test)]
mod tests;
mod uring;
mod worker;

use std::{io, os::fd::OwnedFd};

pub use backend::{DiskBackend, Payload};
pub use device::{Block, Counters};
pub use limiter::Limiter;
pub use qcow2::{Layer, Qcow2Image};
pub use raw::RawFile;
pub use uring::provide as provide_rings;

use crate::config::DiskFormat;

/// Opens a disk from its descriptors; `backing` lies behind it, the nearest first. A disk that is not `read_only` is locked
/// against other writers as long as a copy of its descriptor is open anywhere.
///
/// # Errors
/// When the image is malformed, needs a file that was not passed, or somebody else writes to it.
pub fn open(disk: Layer, backing: Vec<Layer>, read_only: bool) -> io::Result<Box<dyn DiskBackend>> {
    let Layer { file, format } = disk;
    match format {
        DiskFormat::Raw if backing.is_empty() => raw(file, read_only),
        DiskFormat::Raw => Err(io::Error::new(io::ErrorKind::InvalidInput, "a raw disk cannot have backing files: pass it as qcow2")),
        DiskFormat::Qcow2 => Ok(Box::new(Qcow2Image::open(file, backing, read_only)?)),
    }
}

fn raw(file: OwnedFd, read_only: bool) -> io::Result<Box<dyn DiskBackend>> {
    Ok(Box::new(RawFile::new(file, read_only)?))
}
