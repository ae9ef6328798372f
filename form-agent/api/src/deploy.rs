//! Deploying: what should be, and the plan that leads there.

use std::collections::BTreeMap;

use form_types::{Digest, ImageReference, Name, Spec};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The VM that should run. The image and the kernel bundle have been uploaded before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeployRequest {
    pub spec: Spec,
    /// User name to crypt(5) hash (sha512-crypt). The client keeps the hash it finds in [`crate::vm::VmDetail`] while the Formfile's password still
    /// verifies against it, so that an unchanged Formfile gives an unchanged request.
    pub passwd_hashes: BTreeMap<String, String>,
    /// Digest of the image's manifest.
    pub image: Digest,
    /// Digest of the kernel bundle.
    pub kernel: Digest,
}

/// Makes a VM again what it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// The `request` of one of the [`VmVersion`]s that the host keeps of it.
    pub to: DeployRequest,
}

/// Something that a VM was before, and became healthy as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmVersion {
    /// Its image; without it the image is gone and nobody knows any more which version it was.
    pub image: Option<ImageReference>,
    /// The host still has image and kernel: the VM can go back to it.
    pub is_there: bool,
    /// When the VM became healthy as this.
    pub deployed_at: Option<Timestamp>,
    /// What was asked for, with what was set later.
    pub request: DeployRequest,
}

/// A VM that is not there yet, made without a Formfile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVmRequest {
    /// As for a deploy; that there is a VM of this name is a conflict.
    pub vm: DeployRequest,
    /// Start it; without it the VM is there and stopped.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub start: bool,
    /// Its root disk is a copy of the one that this stopped VM has. The image has to be the one that disk was made from.
    #[serde(default)]
    pub disk_of: Option<Name>,
    /// It goes on from a snapshot of another VM, with an identity of its own. Instead of `disk_of`, and always started.
    #[serde(default)]
    pub fork_of: Option<ForkOf>,
}

/// A snapshot that a new VM is made from. With memory in it the new VM goes on where the other one stood; without it starts from the disk.
/// Apart from name, labels, restart policy and ports it has to be what the other one was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkOf {
    pub vm: Name,
    pub snapshot: Name,
}

const fn yes() -> bool {
    true
}

/// What a deploy would do: plain data, made by the agent, rendered by the CLI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    pub vms: Vec<PlannedVm>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedVm {
    pub name: Name,
    pub action: PlanAction,
    pub changes: Vec<FieldChange>,
    /// The VM is stopped and started again.
    pub restarts: bool,
    /// What is gone afterwards, in words: "everything written to its root disk".
    pub loses: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PlanAction {
    Create,
    Update,
    Unchanged,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldChange {
    /// `image`, `vcpus`, `memory`, `disk`, `ports`, `entrypoint`, `env`, `users` …
    pub field: String,
    /// `None` when it was not there before.
    pub from: Option<String>,
    pub to: Option<String>,
}

impl Plan {
    pub fn is_unchanged(&self) -> bool {
        self.vms.iter().all(|vm| vm.action == PlanAction::Unchanged)
    }
}
