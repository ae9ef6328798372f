//! Snapshots: memory, devices, root disk and volumes of a VM at one instant.

use form_types::{Digest, HostId, Name, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// One VM has no two of the same name.
    pub name: Name,
    pub vm: Name,
    pub vm_id: VmId,
    pub host: HostId,
    pub host_name: String,
    pub created_at: Option<Timestamp>,
    /// None of one that cannot be used.
    pub consistency: Option<Consistency>,
    /// Of the memory that is in it; none when the VM did not run, or it cannot be used.
    pub memory_mib: Option<u64>,
    pub vcpus: Option<u32>,
    /// Of the disk, as the guest sees it.
    pub disk_bytes: Option<u64>,
    /// What its files take. Blocks that they share with others are counted. What it holds of volumes is in their pools, and not counted.
    pub allocated_bytes: Option<u64>,
    /// How its memory was written; none when there is none, or an earlier release made it.
    #[serde(default)]
    pub memory_kind: Option<MemoryKind>,
    /// Of an incremental one: the snapshot since which only what had changed in memory was written. It need not be there any more.
    #[serde(default)]
    pub based_on: Option<Name>,
    /// The bytes of memory that were written for it, twice what changed meanwhile. What an incremental one did not write, it shares with the one that it is based on.
    #[serde(default)]
    pub written_bytes: Option<u64>,
    /// Its memory is kept compressed, and is unfolded before a restore. No later snapshot builds upon it.
    #[serde(default)]
    pub compressed: bool,
    /// Of a compressed one: the room that its memory takes unfolded, in bytes. A VM that was restored from it takes that as long as its process runs.
    #[serde(default)]
    pub unfolded_bytes: Option<u64>,
    /// The volumes that it holds: those that the VM could write to. Each has a snapshot of the same name, which goes with this one.
    #[serde(default)]
    pub volumes: Vec<Name>,
    /// How long the VM stood still for it, in milliseconds; none when it did not run.
    pub pause_ms: Option<u64>,
    /// The image that the VM ran.
    pub image_digest: Option<Digest>,
    /// Why it cannot be used.
    pub fault: Option<String>,
}

/// How the memory of a snapshot was written. Each is whole by itself, and is restored in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryKind {
    /// All of it.
    Full,
    /// What had changed since an earlier snapshot; it shares the rest with that one's file.
    Incremental,
}

impl MemoryKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// How much its disk can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// The guest had written everything out and held back writes.
    Quiesced,
    /// The guest was not asked (it was paused) or did not answer: the disk alone is as after a loss of power. Memory and disk belong
    /// together all the same.
    Crash,
    /// The VM did not run: its disk alone.
    Stopped,
}

impl Consistency {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Quiesced => "quiesced",
            Self::Crash => "crash",
            Self::Stopped => "stopped",
        }
    }
}

/// `GET /v1/vms/{name}/snapshots/{snapshot}`: how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ShowSnapshotQuery {
    /// Read all of its memory and compare it with its checksums: what is damaged is its `fault`. Without it only what was written to since it was
    /// made is compared, and only when it is restored.
    #[serde(default)]
    #[param(required = false)]
    pub verify: bool,
}

/// `POST /v1/vms/{name}/snapshots`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Without it the agent makes one of the time.
    #[serde(default)]
    pub name: Option<Name>,
    /// Compress its memory once it is written, while the VM runs on. When that cannot be done the snapshot is kept uncompressed, and the last step of the
    /// operation says why. A VM that does not run has no memory to compress: that is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub compress: bool,
}

/// `POST /v1/vms/{name}/restore`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    pub snapshot: Name,
}
