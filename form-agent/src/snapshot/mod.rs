//! Snapshots of VMs: made, listed, removed, and gone back to.

mod base;
mod compress;
pub mod describe;
pub mod operate;
pub mod precopy;
pub mod restore;
pub mod still;
mod take;
pub mod volumes;

use form_api::{ApiError, ErrorCode, deploy::DeployRequest, snapshot::Consistency};
use form_store::SnapshotEntry;
use form_types::{Name, OperationId, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{agent::Agent, serve::store_error};

/// What the store keeps of a snapshot for the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// That made it: a restarted agent knows by it that the operation has come to its end.
    pub operation: OperationId,
    pub created_at: Timestamp,
    pub consistency: Consistency,
    /// What the VM was.
    pub request: DeployRequest,
    pub pause_ms: Option<u64>,
    /// The line of the guest's log that was to come next: those before it are in the host's log already.
    pub next_log_sequence: u64,
    /// It is another VM's, for this one to go on from once and become itself; then it is removed.
    #[serde(default)]
    pub is_shared: bool,
    /// None when the VM did not run, or an earlier release made it.
    #[serde(default)]
    pub memory: Option<KeptMemory>,
    /// Those that the VM had.
    #[serde(default)]
    pub volumes: Vec<volumes::KeptVolume>,
    /// The numbers of the network interfaces that are in the saved memory beside the first one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<u8>,
}

/// How memory got into a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptMemory {
    /// The snapshot since which only what had changed was written; none of a full one. Nothing depends on it any more.
    pub base: Option<Name>,
    /// Of pages that were written; none when the VM's process is of an earlier release.
    pub written_bytes: Option<u64>,
}

impl Details {
    /// # Errors
    /// When another release wrote something else.
    pub fn of(entry: &SnapshotEntry) -> Result<Self, ApiError> {
        serde_json::from_value(entry.details.clone()).map_err(|error| {
            ApiError::new(ErrorCode::Failed, format!("the snapshot `{}` cannot be understood: {error}", entry.name))
                .hint("use the release that made it, or remove it with `form vm snapshot rm`")
        })
    }
}

/// A snapshot with what the agent keeps of it.
///
/// # Errors
/// Not found, damaged, of another release.
pub fn find(agent: &Agent, vm: &VmId, name: &Name) -> Result<(SnapshotEntry, Details), ApiError> {
    let entry = agent.store.snapshot(vm, name).map_err(|error| store_error(&error))?;
    let details = Details::of(&entry)?;
    Ok((entry, details))
}
