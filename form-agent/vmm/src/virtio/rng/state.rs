//! The entropy device has no state of its own; what is saved says so, with a version.

use crate::virtio::DeviceError;

const VERSION: u64 = 1;

pub fn save() -> serde_json::Value {
    serde_json::json!({ "version": VERSION })
}

/// # Errors
/// When `state` is of another version.
pub fn check(state: &serde_json::Value) -> Result<(), DeviceError> {
    if state.get("version").and_then(serde_json::Value::as_u64) == Some(VERSION) {
        return Ok(());
    }
    Err(DeviceError::State { device: "rng", reason: format!("not of version {VERSION}") })
}
