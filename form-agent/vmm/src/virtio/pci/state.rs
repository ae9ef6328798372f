//! What a saved virtio device consists of.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

use crate::pci::msix::VectorState;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioPciState {
    pub config: Vec<u8>,
    pub vectors: Vec<VectorState>,
    /// The interrupt status register.
    pub interrupt_status: u8,
    pub common: CommonSave,
    pub needs_reset: bool,
    /// The device's own state: see `VirtioDevice::save`.
    pub device: serde_json::Value,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommonSave {
    pub driver_features: u64,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub status: u8,
    pub queue_select: u16,
    pub config_vector: u16,
    pub queues: Vec<QueueSave>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSave {
    pub size: u16,
    pub ready: bool,
    pub vector: u16,
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
    pub next_avail: u16,
    pub next_used: u16,
}

impl QueueSave {
    pub(super) fn new(queue: &QueueState, vector: u16) -> Self {
        QueueSave {
            size: queue.size,
            ready: queue.ready,
            vector,
            desc_table: queue.desc_table,
            avail_ring: queue.avail_ring,
            used_ring: queue.used_ring,
            next_avail: queue.next_avail,
            next_used: queue.next_used,
        }
    }

    /// Saved bytes are not trusted: `Queue::try_from` checks the result when the device is activated.
    pub(super) fn state(&self, max_size: u16) -> QueueState {
        QueueState {
            max_size,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: false,
        }
    }
}
