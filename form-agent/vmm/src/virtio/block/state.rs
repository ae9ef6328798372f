//! What a disk's device keeps beside its queue: only what must be equal when it is restored.

use serde::{Deserialize, Serialize};

use crate::virtio::DeviceError;

pub const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    pub version: u32,
    pub serial: String,
    /// In sectors of 512 bytes: the guest knows the size, another one would corrupt it.
    pub sectors: u64,
    pub read_only: bool,
}

impl BlockState {
    /// # Errors
    /// When `state` is of another version or was saved from another disk.
    pub fn check(&self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let refuse = |reason: String| DeviceError::State { device: "block", reason };
        let saved: Self = serde_json::from_value(state.clone()).map_err(|error| refuse(error.to_string()))?;
        if saved.version != VERSION {
            return Err(refuse(format!("version {}, this program knows {VERSION}", saved.version)));
        }
        // A copy of the VM has a disk of its own: the guest asks for the serial anew each time.
        let as_saved = Self { serial: saved.serial.clone(), ..self.clone() };
        if saved != as_saved {
            return Err(refuse(format!("saved from {saved:?}, this disk is {self:?}")));
        }
        Ok(())
    }
}
