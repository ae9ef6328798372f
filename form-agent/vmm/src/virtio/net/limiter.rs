//! What a network interface may move in a second.

#[cfg(test)]
mod tests;

use std::{io, num::NonZeroU64, sync::Arc, time::Duration};

use super::{request::PACKET_MAX, tap::HEADER};
use crate::virtio::limit::{Buckets, Rate};

/// The longest packet that a tap takes or gives, without its header.
const LONGEST: u64 = (PACKET_MAX - HEADER) as u64;
/// What a burst is at least: two packets of the longest kind, so that one can always go while the bucket fills.
const BYTES_AT_ONCE: u64 = 2 * LONGEST;

/// The limits of one interface, a budget for each way, shared with its worker.
#[derive(Clone)]
pub struct Limiter(pub(super) Arc<Buckets>);

impl Limiter {
    /// # Errors
    /// When the operating system has no eventfd left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Buckets::new()?)))
    }

    /// This holds from now on, each way.
    pub fn set(&self, bytes_per_second: Option<NonZeroU64>) {
        let rate = bytes_per_second.map(|bytes| Rate::new(bytes, BYTES_AT_ONCE));
        self.0.set([rate, rate]);
    }

    /// Whether there is a limit at all.
    pub(super) fn is_any(&self) -> bool {
        self.0.is_any()
    }

    /// Whether the guest may receive a packet, whose length is known only when it was taken from the tap; otherwise when to ask again.
    pub(super) fn may_receive(&self) -> Result<(), Duration> {
        self.0.wait([LONGEST, 0]).map_or(Ok(()), Err)
    }

    pub(super) fn received(&self, bytes: usize) {
        self.0.spend([bytes as u64, 0]);
    }

    /// Lets a packet of this length go, or says when to ask again.
    pub(super) fn take_sent(&self, bytes: usize) -> Result<(), Duration> {
        self.0.take([0, bytes as u64])
    }
}
