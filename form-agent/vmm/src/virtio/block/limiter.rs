//! What a disk may do in a second.

#[cfg(test)]
mod tests;

use std::{io, sync::Arc, time::Duration};

use super::request::Cost;
use crate::{
    config::DiskLimits,
    virtio::limit::{Buckets, Rate},
};

/// What a burst of bytes is at least: a request of a usual size need not wait for a full bucket.
const BYTES_AT_ONCE: u64 = 128 * 1024;

/// The limits of one disk, shared with its worker.
#[derive(Clone)]
pub struct Limiter(pub(super) Arc<Buckets>);

impl Limiter {
    /// # Errors
    /// When the operating system has no eventfd left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Buckets::new()?)))
    }

    /// These hold from now on.
    pub fn set(&self, limits: DiskLimits) {
        let iops = limits.iops.map(|iops| Rate::new(iops, 1));
        let bytes = limits.bytes_per_second.map(|bytes| Rate::new(bytes, BYTES_AT_ONCE));
        self.0.set([iops, bytes]);
    }

    /// Lets a request of this cost through, or says when to ask again.
    pub(super) fn take(&self, cost: Cost) -> Result<(), Duration> {
        self.0.take([cost.operations, cost.bytes])
    }
}
