//! Volumes: disks with a life of their own, and the pools they live in.

//!
//! What a volume holds travels after the Upgrades `form-import` and `form-contents` as [`crate::exec::Frame`]s. Who has the bytes sends [`Piece`]s
//! (the client as `Stdin`, the agent as `Stdout`), in any order; what is not sent reads as zeros. The client's last frame is `StdinClosed`. The
//! agent's last frame is `Exit` with code 0 when all of it has arrived, or was sent, else `Error`.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use form_types::{DiskLimits, HostId, Name, VolumeFormat, VolumeId, limits::given};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::snapshot::Consistency;

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
    /// What a VM may do with it in a second.
    #[serde(default)]
    pub limits: DiskLimits,
    pub attachment: Option<Attachment>,
    /// How many snapshots there are of it.
    #[serde(default)]
    pub snapshots: u32,
    /// Where programs of the host reach it over NBD.
    #[serde(default)]
    pub export: Option<Export>,
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
    /// Its size, as the guest reported it.
    #[serde(default)]
    pub device_size_bytes: Option<u64>,
    /// When the host and the guest were last at one about it: the guest reported the device, or took part in a change or a `sync` of the volume.
    #[serde(default)]
    pub synced_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    /// The VM does not run; it has the volume when it starts.
    Waiting,
    /// The VM runs without it: it gets it when its guest answers, or it is started again.
    NeedsRestart,
    /// The VM runs with it, and its guest has not reported yet.
    Starting,
    /// The guest has found it. Of a VM that runs a kernel of its own: it runs with it, and more is not known.
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

/// How a volume is served over NBD. It ends with the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Export {
    /// As NBD clients take it: `nbd+unix:///data?socket=/run/formation/nbd/data.sock`, `nbd://127.0.0.1:10809/data`, `nbds://192.0.2.1:10809/data`
    /// with TLS.
    pub uri: String,
    /// Clients may write; meanwhile nothing else has the volume.
    pub writable: bool,
    /// Clients that are connected now.
    pub clients: u32,
    /// With TLS: the certificate, in PEM, of the authority by which clients know the server.
    #[serde(default)]
    pub authority: Option<String>,
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
    /// None without them.
    #[serde(default)]
    pub limits: DiskLimits,
}

/// `PATCH /v1/volumes/{name}`: what is left out stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetVolumeRequest {
    /// Operations a second, reads and writes together; `null` ends the limit.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000_000)]
    pub iops: Option<Option<u64>>,
    /// Read and written together; `null` ends the limit.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1024, maximum = 1_099_511_627_776_i64)]
    pub bytes_per_second: Option<Option<u64>>,
}

impl SetVolumeRequest {
    pub const fn is_empty(&self) -> bool {
        self.iops.is_none() && self.bytes_per_second.is_none()
    }
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

/// `POST /v1/volumes/{name}/detach`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetachRequest {
    /// Take it away from a guest that uses it, or does not answer: what uses it then gets errors, and what it had not written is lost.
    #[serde(default)]
    pub force: bool,
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
    /// A snapshot of the other one: what it held then, and not what it holds now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Name>,
    /// That of the snapshot, when it is not the other volume's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16_777_216, maximum = 70_368_744_177_664_i64, multiple_of = 512)]
    pub size_bytes: Option<u64>,
}

/// What a volume held at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeSnapshot {
    /// One volume has no two of the same name.
    pub name: Name,
    pub volume: Name,
    pub volume_id: VolumeId,
    pub host: HostId,
    pub host_name: String,
    /// The volume's own.
    pub pool: Name,
    pub format: VolumeFormat,
    pub created_at: Option<Timestamp>,
    /// None of one that cannot be used. `stopped`: nobody could write to the volume.
    pub consistency: Option<Consistency>,
    /// Of the volume, as a guest saw it then.
    pub size_bytes: Option<u64>,
    /// What its file takes. Blocks that it shares with the volume are counted.
    pub allocated_bytes: Option<u64>,
    /// How long the VM stood still for it, in milliseconds; none when none had to.
    pub pause_ms: Option<u64>,
    /// Why it cannot be used.
    pub fault: Option<String>,
}

/// `POST /v1/volumes/{name}/snapshots`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeSnapshotRequest {
    /// Without it the agent makes one of the time.
    #[serde(default)]
    pub name: Option<Name>,
}

/// `POST /v1/volumes/{name}/restore`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRestoreRequest {
    pub snapshot: Name,
    /// That of the snapshot, which the volume then has; needed when it is another than the volume's now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16_777_216, maximum = 70_368_744_177_664_i64, multiple_of = 512)]
    pub size_bytes: Option<u64>,
}

/// `DELETE /v1/volumes/{name}`: how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct RemoveVolumeQuery {
    /// Remove its snapshots as well. Without it a volume that has some is not removed.
    #[serde(default)]
    #[param(required = false)]
    pub snapshots: bool,
    /// Its pool is gone for good: it is forgotten, and nothing is touched that is left of it. A conflict while the pool is there.
    #[serde(default)]
    #[param(required = false)]
    pub lost: bool,
}

/// `POST /v1/volumes/{name}/move`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// The pool that it lives in from then on.
    pub pool: Name,
}

/// `POST /v1/volumes/{name}/export`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// Let clients write.
    #[serde(default)]
    pub writable: bool,
    /// An address of the host, port 0 for any; one of the loopback interface unless there is a `client_certificate`. Without it: a Unix socket.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub listen: Option<SocketAddr>,
    /// TLS, for who has the key of this X.509 certificate (in PEM, of at most 16 KiB), and for nobody else.
    #[serde(default)]
    #[schema(max_length = 16_384)]
    pub client_certificate: Option<String>,
}

/// `GET /v1/volumes/{name}/import`: the new volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ImportQuery {
    /// A multiple of 512.
    #[param(minimum = 16_777_216, maximum = 70_368_744_177_664_i64, multiple_of = 512)]
    pub size_bytes: u64,
    /// How its bytes are kept; raw without it.
    #[serde(default)]
    pub format: VolumeFormat,
    /// `local` without it.
    #[serde(default)]
    pub pool: Option<Name>,
}

impl ImportQuery {
    /// The empty volume that is filled.
    pub fn volume(self, name: Name) -> CreateRequest {
        CreateRequest { name, size_bytes: self.size_bytes, format: self.format, pool: self.pool, limits: DiskLimits::default() }
    }
}

/// Bytes of a volume that are consecutive: in a frame the offset (u64, little-endian), then the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub offset: u64,
    pub bytes: Vec<u8>,
}

impl Piece {
    /// The most bytes of one piece: less than fits in a frame, so that pieces of data do not cross what disks and images are cut into.
    pub const MAX_BYTES: usize = crate::exec::MAX_PAYLOAD / 2;

    /// The payload of a frame.
    pub fn encode(offset: u64, bytes: &[u8]) -> Vec<u8> {
        [&offset.to_le_bytes()[..], bytes].concat()
    }

    /// None when the payload is too short to be one.
    pub fn decode(mut payload: Vec<u8>) -> Option<Self> {
        let offset = u64::from_le_bytes(*payload.first_chunk()?);
        payload.drain(..size_of::<u64>());
        Some(Self { offset, bytes: payload })
    }
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
    /// The NFS export that is mounted there.
    #[serde(default)]
    pub source: Option<String>,
    /// With which options, when it is not with those that every pool has.
    #[serde(default)]
    pub options: Option<String>,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// The sizes of its volumes together, and what their snapshots take; it may be more than there is room for: volumes take room as they fill.
    pub provisioned_bytes: u64,
    /// What its volumes and their snapshots take. Blocks that they share are counted for each.
    pub allocated_bytes: u64,
    pub volumes: u32,
    /// Of all its volumes.
    #[serde(default)]
    pub snapshots: u32,
    /// With less free room than this nothing new is begun in it.
    #[serde(default)]
    pub reserve_bytes: u64,
    /// The most that its volumes may promise together.
    #[serde(default)]
    pub limit_bytes: Option<u64>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// It was made by `form pool create` and can be removed; else it is the host's own, or in its `agent.yaml`.
    #[serde(default)]
    pub removable: bool,
    /// The server of the export does not answer. It is asked again every few seconds.
    #[serde(default)]
    pub silent: bool,
    /// Why it cannot be used. With one the pool is unavailable, and its volumes are with it.
    pub fault: Option<String>,
}

impl Pool {
    /// In one word.
    pub const fn state(&self) -> &'static str {
        match self.fault {
            Some(_) if self.silent => "not-answering",
            Some(_) => "unavailable",
            None => "available",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PoolKind {
    /// A directory of the host.
    #[default]
    Local,
    /// An NFS export that the agent mounts.
    Nfs,
}

impl PoolKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Nfs => "nfs",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_as_they_are_written() {
        let encoded = Piece::encode(0x0102_0304, b"bytes");
        assert_eq!(encoded[..8], [4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(Piece::decode(encoded), Some(Piece { offset: 0x0102_0304, bytes: b"bytes".to_vec() }));
        assert_eq!(Piece::decode(vec![0; 7]), None);
        assert!(Piece::encode(0, &[0; Piece::MAX_BYTES]).len() <= crate::exec::MAX_PAYLOAD);
    }
}
