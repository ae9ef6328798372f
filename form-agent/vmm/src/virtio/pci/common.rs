//! The common configuration structure (virtio 1.2, section 4.1.4.3) and the device status (section 2.1).

use std::sync::Arc;

use virtio_queue::QueueState;

use super::interrupt::PciInterrupt;
use super::state::{CommonSave, QueueSave};

const STATUS_FEATURES_OK: u8 = 8;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_NEEDS_RESET: u8 = 64;
/// What a driver may set: ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED.
const STATUS_DRIVER_BITS: u8 = 1 | 2 | 4 | 8 | 128;
const VERSION_1: u64 = 1 << 32;

/// What a write asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    Nothing,
    Reset,
    DriverOk,
}

pub struct Common {
    device_features: u64,
    pub driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: u8,
    queue_select: u16,
    /// As the driver set them up; `ready` is `queue_enable`. While the device works the indices in here are old.
    pub queues: Vec<QueueState>,
    interrupt: Arc<PciInterrupt>,
}

impl Common {
    pub fn new(device_features: u64, queue_sizes: &[u16], interrupt: Arc<PciInterrupt>) -> Self {
        Common {
            device_features,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|size| fresh(*size)).collect(),
            interrupt,
        }
    }

    pub fn driver_ok(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
    }

    pub fn reset(&mut self) {
        self.driver_features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.status = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = fresh(queue.max_size);
        }
    }

    pub fn read(&self, offset: u64, needs_reset: bool, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.queue_select)).copied().unwrap_or_default();
        let device_features = select(self.device_features, self.device_feature_select);
        let driver_features = select(self.driver_features, self.driver_feature_select);
        let status = self.status | if needs_reset { STATUS_NEEDS_RESET } else { 0 };
        let mut image = [0u8; 64];
        image[0..4].copy_from_slice(&self.device_feature_select.to_le_bytes());
        image[4..8].copy_from_slice(&device_features.to_le_bytes());
        image[8..12].copy_from_slice(&self.driver_feature_select.to_le_bytes());
        image[12..16].copy_from_slice(&driver_features.to_le_bytes());
        image[16..18].copy_from_slice(&self.interrupt.config_vector().to_le_bytes());
        image[18..20].copy_from_slice(&(self.queues.len() as u16).to_le_bytes());
        image[20] = status;
        image[21] = self.interrupt.generation();
        image[22..24].copy_from_slice(&self.queue_select.to_le_bytes());
        image[24..26].copy_from_slice(&queue.size.to_le_bytes());
        image[26..28].copy_from_slice(&self.interrupt.queue_vector(self.queue_select).to_le_bytes());
        image[28..30].copy_from_slice(&u16::from(queue.ready).to_le_bytes());
        image[30..32].copy_from_slice(&self.queue_select.to_le_bytes());
        image[32..40].copy_from_slice(&queue.desc_table.to_le_bytes());
        image[40..48].copy_from_slice(&queue.avail_ring.to_le_bytes());
        image[48..56].copy_from_slice(&queue.used_ring.to_le_bytes());
        let from = offset.min(64) as usize;
        for (byte, value) in data.iter_mut().zip(&image[from..]) {
            *byte = *value;
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Written {
        match *data {
            [value] if offset == 20 => return self.write_status(value),
            [a, b] => self.write_word(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_double(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if (32..56).contains(&offset) && offset.is_multiple_of(8) => {
                self.write_double(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_double(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Written::Nothing
    }

    fn write_word(&mut self, offset: u64, value: u16) {
        match offset {
            16 => self.interrupt.set_config_vector(value),
            22 => self.queue_select = value,
            26 => self.interrupt.set_queue_vector(self.queue_select, value),
            24 => {
                if let Some(queue) = self.open_queue().filter(|queue| value <= queue.max_size && value.is_power_of_two()) {
                    queue.size = value;
                }
            }
            // A queue can be enabled, and is disabled only by a reset (VIRTIO_F_RING_RESET is not offered).
            28 if value == 1 => {
                if let Some(queue) = self.open_queue() {
                    queue.ready = true;
                }
            }
            _ => {}
        }
    }

    fn write_double(&mut self, offset: u64, value: u32) {
        match offset {
            0 => self.device_feature_select = value,
            8 => self.driver_feature_select = value,
            12 if self.status & STATUS_FEATURES_OK == 0 => put(&mut self.driver_features, self.driver_feature_select, value),
            32..56 => {
                let half = u32::from(offset % 8 == 4);
                if let Some(queue) = self.open_queue() {
                    match offset {
                        32 | 36 => put(&mut queue.desc_table, half, value),
                        40 | 44 => put(&mut queue.avail_ring, half, value),
                        48 | 52 => put(&mut queue.used_ring, half, value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    /// The selected queue while it may still be changed.
    fn open_queue(&mut self) -> Option<&mut QueueState> {
        if self.driver_ok() {
            return None;
        }
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.ready)
    }

    fn write_status(&mut self, value: u8) -> Written {
        if value == 0 {
            return Written::Reset;
        }
        let mut new = value & STATUS_DRIVER_BITS | self.status;
        if new & STATUS_FEATURES_OK != 0 && self.status & STATUS_FEATURES_OK == 0 && !self.features_acceptable() {
            new &= !STATUS_FEATURES_OK;
        }
        if new & STATUS_FEATURES_OK == 0 {
            new &= !STATUS_DRIVER_OK;
        }
        let started = new & STATUS_DRIVER_OK != 0 && !self.driver_ok();
        self.status = new;
        if started { Written::DriverOk } else { Written::Nothing }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device_features == 0 && self.driver_features & VERSION_1 != 0
    }

    pub fn save(&self) -> CommonSave {
        CommonSave {
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            status: self.status,
            queue_select: self.queue_select,
            config_vector: self.interrupt.config_vector(),
            queues: (0..).zip(&self.queues).map(|(index, queue)| QueueSave::new(queue, self.interrupt.queue_vector(index))).collect(),
        }
    }

    pub fn restore(&mut self, saved: &CommonSave) -> Result<(), &'static str> {
        if saved.queues.len() != self.queues.len() {
            return Err("another number of queues");
        }
        if saved.driver_features & !self.device_features != 0 {
            return Err("the driver uses features that this device does not have");
        }
        self.driver_features = saved.driver_features;
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.status = saved.status & STATUS_DRIVER_BITS;
        self.queue_select = saved.queue_select;
        self.interrupt.set_config_vector(saved.config_vector);
        for (index, (queue, saved)) in (0..).zip(self.queues.iter_mut().zip(&saved.queues)) {
            *queue = saved.state(queue.max_size);
            self.interrupt.set_queue_vector(index, saved.vector);
        }
        Ok(())
    }
}

fn fresh(max_size: u16) -> QueueState {
    QueueState { max_size, size: max_size, ..QueueState::default() }
}

fn select(features: u64, word: u32) -> u32 {
    match word {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn put(target: &mut u64, word: u32, value: u32) {
    match word {
        0 => *target = *target & !0xFFFF_FFFF | u64::from(value),
        1 => *target = *target & 0xFFFF_FFFF | u64::from(value) << 32,
        _ => {}
    }
}
