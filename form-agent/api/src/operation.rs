//! Operations: every change that somebody asked for, from pending to completed or failed.

use form_types::{IdempotencyKey, OperationId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::ApiError;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    pub id: OperationId,
    pub kind: OperationKind,
    /// What it is about: `vm/web`, `image/web:2`.
    pub subject: String,
    /// Who asked: a public key, or `local:<uid>`.
    pub actor: String,
    pub idempotency_key: IdempotencyKey,
    /// What was asked for; without it an earlier release recorded the operation.
    #[serde(default)]
    pub request: Option<OperationRequest>,
    pub status: OperationStatus,
    /// What was said of it while it went on, in order: at most 32, the last among them. One that an agent finishes which did not begin it
    /// has those of the second.
    #[serde(default)]
    pub steps: Vec<String>,
    pub error: Option<ApiError>,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
}

/// The request that an operation came of, without what is secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationRequest {
    /// `POST`, `PUT`, `PATCH` or `DELETE`.
    pub method: String,
    /// With its query.
    pub path: String,
    /// Passwords, secrets and values of variables are `…`. `None`: there was none, or it is longer than 8 KiB.
    #[schema(value_type = Option<Object>)]
    pub body: Option<serde_json::Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OperationKind {
    Deploy,
    VmCreate,
    VmClone,
    VmFork,
    VmStart,
    VmStop,
    VmRestart,
    VmPause,
    VmResume,
    VmReset,
    VmRename,
    VmSet,
    VmRestore,
    VmRollback,
    VmDestroy,
    InterfaceAttach,
    InterfaceDetach,
    SnapshotCreate,
    SnapshotRemove,
    VolumeCreate,
    VolumeAttach,
    VolumeDetach,
    VolumeResize,
    VolumeSet,
    VolumeClone,
    VolumeMove,
    VolumeRestore,
    VolumeSync,
    VolumeSnapshotCreate,
    VolumeSnapshotRemove,
    VolumeImport,
    VolumeExport,
    VolumeUnexport,
    VolumeRemove,
    PoolCreate,
    PoolSet,
    PoolRemove,
    ImageImport,
    ImageSet,
    ImageRemove,
    KernelRemove,
    Claim,
    DoctorFix,
    Bench,
}

impl OperationKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deploy => "deploy",
            Self::VmCreate => "vm-create",
            Self::VmClone => "vm-clone",
            Self::VmFork => "vm-fork",
            Self::VmStart => "vm-start",
            Self::VmStop => "vm-stop",
            Self::VmRestart => "vm-restart",
            Self::VmPause => "vm-pause",
            Self::VmResume => "vm-resume",
            Self::VmReset => "vm-reset",
            Self::VmRename => "vm-rename",
            Self::VmSet => "vm-set",
            Self::VmRestore => "vm-restore",
            Self::VmRollback => "vm-rollback",
            Self::VmDestroy => "vm-destroy",
            Self::InterfaceAttach => "interface-attach",
            Self::InterfaceDetach => "interface-detach",
            Self::SnapshotCreate => "snapshot-create",
            Self::SnapshotRemove => "snapshot-remove",
            Self::VolumeCreate => "volume-create",
            Self::VolumeAttach => "volume-attach",
            Self::VolumeDetach => "volume-detach",
            Self::VolumeResize => "volume-resize",
            Self::VolumeSet => "volume-set",
            Self::VolumeClone => "volume-clone",
            Self::VolumeMove => "volume-move",
            Self::VolumeRestore => "volume-restore",
            Self::VolumeSync => "volume-sync",
            Self::VolumeSnapshotCreate => "volume-snapshot-create",
            Self::VolumeSnapshotRemove => "volume-snapshot-remove",
            Self::VolumeImport => "volume-import",
            Self::VolumeExport => "volume-export",
            Self::VolumeUnexport => "volume-unexport",
            Self::VolumeRemove => "volume-remove",
            Self::PoolCreate => "pool-create",
            Self::PoolSet => "pool-set",
            Self::PoolRemove => "pool-remove",
            Self::ImageImport => "image-import",
            Self::ImageSet => "image-set",
            Self::ImageRemove => "image-remove",
            Self::KernelRemove => "kernel-remove",
            Self::Claim => "claim",
            Self::DoctorFix => "doctor-fix",
            Self::Bench => "bench",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OperationStatus {
    Pending,
    Executing,
    Completed,
    Failed,
}

impl OperationStatus {
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed)
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Executing => "executing",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct OperationsQuery {
    /// The newest so many; 50 without it.
    pub limit: Option<usize>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct WaitQuery {
    /// Answer when the operation is final, or after so many milliseconds (at most 60000), whichever is first.
    pub wait_ms: Option<u64>,
}
