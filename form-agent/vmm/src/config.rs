//! What a VM is made of. The daemon writes it, sends it over the control socket with every file already open, and the VM
//! process holds no path at all: an [`Fd`] is the index of a descriptor in the `SCM_RIGHTS` list of the same message.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// The index of a passed descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub u16);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// 1 to 128.
    pub vcpus: u8,
    /// How many it can have while it runs, up to 128: the guest makes room for as many. `None`: those that it starts with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_vcpus: Option<u8>,
    /// Guest memory in MiB, 128 to 262144 (smaller is allowed for test kernels).
    pub memory_mib: u64,
    /// `/dev/kvm`, opened read-write.
    pub kvm: Fd,
    /// An uncompressed ELF kernel with a PVH entry note.
    pub kernel: Fd,
    /// Segments of the initramfs, laid one behind the other (each padded to four bytes, as the kernel's cpio reader wants).
    pub initramfs: Vec<Fd>,
    pub cmdline: String,
    /// PCI order; the guest finds each by its serial.
    pub disks: Vec<DiskConfig>,
    pub networks: Vec<NetworkConfig>,
    /// virtio-vsock with this guest CID (3 or more). Host ends are made with `ControlRequest::VsockConnect`.
    pub vsock_cid: Option<u64>,
    pub rng: bool,
    pub balloon: bool,
    /// The log ring that serial output goes to (`log_ring`); `None`: standard output.
    pub console_log: Option<Fd>,
    /// Where the exit record is written, as JSON ([`crate::control::ExitRecord`]).
    pub exit_record: Option<Fd>,
    pub jail: JailConfig,
}

/// What a saved VM goes on from. vCPUs, memory and CPU model are in the state; devices are given again, the same and in the same order,
/// each with its own descriptors. Only the vsock CID may be another than it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// `/dev/kvm`, opened read-write.
    pub kvm: Fd,
    /// What `ControlRequest::Save` wrote to its `state`, opened for reading.
    pub state: Fd,
    /// What it wrote to its `memory`, opened for reading. It is mapped and never changes; it must not be cut while the VM runs.
    pub memory: Fd,
    /// Disks with the content that they had at the save.
    pub disks: Vec<DiskConfig>,
    pub networks: Vec<NetworkConfig>,
    pub vsock_cid: Option<u64>,
    pub rng: bool,
    pub balloon: bool,
    pub console_log: Option<Fd>,
    pub exit_record: Option<Fd>,
    pub jail: JailConfig,
    /// Run at once; otherwise the VM waits for `ControlRequest::Resume`.
    pub resume: bool,
    /// Note what changes in its memory: the next save can build upon this one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub track: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// For messages, metrics and hotplug.
    pub id: String,
    /// `VIRTIO_BLK_ID`: at most 20 bytes.
    pub serial: String,
    pub format: DiskFormat,
    /// The image itself; for qcow2 the overlay.
    pub file: Fd,
    /// The read-only files behind a qcow2 overlay, the nearest first. Its own backing path is never followed.
    pub backing: Vec<BackingFile>,
    pub read_only: bool,
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub limits: DiskLimits,
}

/// What a disk may do in a second, reads and writes together. They are no part of a saved VM: a restored one has those of its
/// configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    /// Requests of the guest; a flush is one too. `None`: as many as it can.
    #[serde(default)]
    pub iops: Option<NonZeroU64>,
    /// Bytes read, written and zeroed. `None`: as many as it can.
    #[serde(default)]
    pub bytes_per_second: Option<NonZeroU64>,
}

impl DiskLimits {
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingFile {
    pub file: Fd,
    pub format: DiskFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    pub id: String,
    /// A tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: Fd,
    /// `/dev/vhost-net`, opened for this interface alone: the host's kernel moves its packets while it has no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<Fd>,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// Bytes that it may move in a second, each way. `None`: as many as it can. No part of a saved VM, like those of disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<NonZeroU64>,
}

/// What the process gives up before the guest runs its first instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// Change to this uid and gid. Needs root.
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Empty network, mount, IPC and UTS namespaces. Needs root.
    pub namespaces: bool,
    /// A seccomp filter per thread kind.
    pub seccomp: bool,
    /// Landlock: no file system at all.
    pub landlock: bool,
}
