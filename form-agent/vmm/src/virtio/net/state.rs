//! What a network device keeps beside its queues: only what must be equal when it is restored.

use serde::{Deserialize, Serialize};

use crate::virtio::DeviceError;

pub const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    pub version: u32,
    pub mac: [u8; 6],
    pub mtu: u16,
}

impl NetState {
    /// # Errors
    /// When `state` is of another version or of a device with another MTU.
    pub fn check(&self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let refuse = |reason: String| DeviceError::State { device: "net", reason };
        let saved: Self = serde_json::from_value(state.clone()).map_err(|error| refuse(error.to_string()))?;
        if saved.version != VERSION {
            return Err(refuse(format!("version {}, this program knows {VERSION}", saved.version)));
        }
        // A copy of the VM gets an address of its own, which its guest is told.
        let as_saved = Self { mac: saved.mac, ..self.clone() };
        if saved != as_saved {
            return Err(refuse(format!("saved from {saved:?}, this device is {self:?}")));
        }
        Ok(())
    }
}
