//! Hosts: machines with an agent.

use form_types::{ClusterId, HostId, PublicKey};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    pub id: HostId,
    /// The machine's host name.
    pub name: String,
    pub public_key: PublicKey,
    pub cluster: ClusterId,
    /// Version of `form-agent`.
    pub version: String,
    pub kernel: String,
    pub owner: Option<PublicKey>,
    pub started_at: Timestamp,
    pub now: Timestamp,
    pub vcpus_total: u32,
    pub vcpus_allocated: u32,
    pub memory_total_mib: u64,
    pub memory_allocated_mib: u64,
    pub disk_total_bytes: u64,
    pub disk_free_bytes: u64,
    pub vms: u32,
    pub max_vms: u32,
}

/// Makes the key that signed the request the owner of an agent that has none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClaimRequest {
    /// The secret half of the token that `form-agent init` printed.
    pub secret: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    pub checks: Vec<Check>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// `kvm`, `cgroup`, `nftables`, `leftover/tap/form0a1b2c-3` …
    pub name: String,
    pub status: CheckStatus,
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// `form doctor --fix` can mend it.
    pub fixable: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CheckStatus {
    Ok,
    Warning,
    Problem,
}

impl DoctorReport {
    pub fn is_clean(&self) -> bool {
        self.checks.iter().all(|check| check.status != CheckStatus::Problem)
    }
}
