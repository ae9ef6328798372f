//! What the balloon keeps beside its queues.

use serde::{Deserialize, Serialize};

use crate::virtio::DeviceError;

pub const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    pub version: u32,
    /// Pages of 4 KiB asked for.
    pub target: u32,
    /// Pages of 4 KiB that the driver says it gave.
    pub actual: u32,
}

impl BalloonState {
    /// # Errors
    /// When `state` is of another version or malformed.
    pub fn read(state: &serde_json::Value) -> Result<Self, DeviceError> {
        let refuse = |reason: String| DeviceError::State { device: "balloon", reason };
        let state: Self = serde_json::from_value(state.clone()).map_err(|error| refuse(error.to_string()))?;
        if state.version != VERSION {
            return Err(refuse(format!("version {}, this program knows {VERSION}", state.version)));
        }
        Ok(state)
    }
}
