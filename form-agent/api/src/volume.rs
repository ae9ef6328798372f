//! Volumes: disks with a life of their own, and the pools they live in.

use std::path::PathBuf;

use form_types::{HostId, Name, VolumeFormat, VolumeId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    pub id: VolumeId,
    pub name: Name,
    pub host: HostId,
    pub host_name: String,
    pub pool: Name,
    pub format: VolumeFormat,
    /// To the byte, as a guest sees it from its next start on.
    pub size_bytes: u64,
    /// What it takes of its pool; none as long as it was not made, or cannot be found.
    pub allocated_bytes: Option<u64>,
    /// By which a guest finds it.
    pub serial: String,
    pub attachment: Option<Attachment>,
    pub created_at: Timestamp,
    /// Why it cannot be used.
    pub fault: Option<String>,
}

/// Which VM has a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    pub vm: Name,
    /// Where it is mounted; none: the VM has the bare device.
    pub path: Option<String>,
    pub read_only: bool,
    /// `VOLUME` of the VM's Formfile attached it, and the next deploy may detach it.
    pub by_formfile: bool,
    pub state: AttachmentState,
    /// The device node that the guest reported: `/dev/vdb`.
    pub device: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    /// The VM does not run; it has the volume when it starts.
    Waiting,
    /// The VM runs without it: it has to be started again.
    NeedsRestart,
    /// The VM runs with it, and its guest has not reported yet.
    Starting,
    /// The guest has found it.
    Attached,
}

impl AttachmentState {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::NeedsRestart => "needs-restart",
            Self::Starting => "starting",
            Self::Attached => "attached",
        }
    }
}

/// `POST /v1/volumes`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRequest {
    pub name: Name,
    /// A multiple of 512.
    #[schema(minimum = 16_777_216, maximum = 70_368_744_177_664_i64, multiple_of = 512)]
    pub size_bytes: u64,
    #[serde(default)]
    pub format: VolumeFormat,
    /// `local` without it.
    #[serde(default)]
    pub pool: Option<Name>,
}

/// `POST /v1/volumes/{name}/attach`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    pub vm: Name,
    /// Where to mount it. Without it the VM gets the bare device.
    #[serde(default)]
    pub path: Option<String>,
    #[serde(default)]
    pub read_only: bool,
}

/// `POST /v1/volumes/{name}/resize`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// A multiple of 512, and not less than it has.
    #[schema(minimum = 16_777_216, maximum = 70_368_744_177_664_i64, multiple_of = 512)]
    pub size_bytes: u64,
}

/// `POST /v1/volumes/{name}/clone`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneRequest {
    /// Of the new volume.
    pub name: Name,
}

/// A place that volumes live in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    pub name: Name,
    pub kind: PoolKind,
    pub host: HostId,
    pub host_name: String,
    #[schema(value_type = String)]
    pub path: PathBuf,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// The sizes of its volumes together, which may be more than there is room for: they take room as they fill.
    pub provisioned_bytes: u64,
    /// What its volumes take.
    pub allocated_bytes: u64,
    pub volumes: u32,
    /// Why it cannot be used.
    pub fault: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PoolKind {
    /// A directory of the host.
    Local,
}

impl PoolKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
        }
    }
}
