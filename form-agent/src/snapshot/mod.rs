//! Snapshots of VMs: made, listed, removed, and gone back to.

pub mod describe;
pub mod operate;
pub mod restore;
pub mod still;
mod take;

use form_api::{ApiError, ErrorCode, deploy::DeployRequest, snapshot::Consistency};
use form_store::SnapshotEntry;
use form_types::{Name, OperationId, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{agent::Agent, desired::DesiredVm, serve::store_error, volume::of_vm};

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

/// Volumes are not in a snapshot, and a VM that goes back without them would find other bytes on them than it remembers.
fn without_volumes(agent: &Agent, vm: &DesiredVm, what: &str) -> Result<(), ApiError> {
    let attached = of_vm(&agent.view(), &vm.id);
    if attached.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = attached.iter().map(|volume| volume.name.as_str()).collect();
    let name = vm.name();
    Err(ApiError::new(ErrorCode::Conflict, format!("vm/{name} has volumes ({}), and snapshots do not hold volumes", names.join(", ")))
        .hint(format!("{what} a VM without volumes: stop it, `form volume detach {}`, and start it", names[0])))
}
