//! What the socket device keeps. Streams end with the process that holds their host ends, so none is saved: the guest is told
//! after a restore.

use serde::{Deserialize, Serialize};

use crate::virtio::DeviceError;

pub const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    pub version: u32,
    pub cid: u64,
    /// The host's end of the next stream. The guest may still be closing streams of before, and would take a new one for one of those.
    #[serde(default)]
    pub next_port: u32,
}

impl VsockState {
    /// # Errors
    /// When `state` is of another version or malformed.
    pub fn read(state: &serde_json::Value) -> Result<Self, DeviceError> {
        let refuse = |reason: String| DeviceError::State { device: "vsock", reason };
        let state: Self = serde_json::from_value(state.clone()).map_err(|error| refuse(error.to_string()))?;
        if state.version != VERSION {
            return Err(refuse(format!("version {}, this program knows {VERSION}", state.version)));
        }
        Ok(state)
    }
}
