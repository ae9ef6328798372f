//! What can go wrong with what is on disk.

use std::{
    io,
    path::{Path, PathBuf},
};

use form_bundle::{blocks::BlockError, initramfs::InitramfsError, kernel::KernelError, manifest::ManifestError};
use form_types::{Digest, HostId, ImageReference, Name, VmId, VolumeId, volume::VolumeSizeError};

use crate::compressed::CompressedError;

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system is full, or a quota is reached. What was begun is gone again.
    #[error("there is no room left to {action} {path}: remove images or VMs (`form image rm`, `form destroy`), or add space")]
    NoRoom { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{0} is in use by another agent")]
    Locked(PathBuf),
    #[error("the image manifest is refused: {0}")]
    Manifest(#[from] ManifestError),
    #[error("the kernel manifest is refused: {0}")]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Block(#[from] BlockError),
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    #[error("{} blocks are not here yet (the first is {}): ask which are missing, and send them", .0.len(), .0.first().map(Digest::short).unwrap_or_default())]
    MissingBlocks(Vec<Digest>),
    #[error("the manifest {} is not here: send it, then import it", .0.short())]
    NoManifest(Digest),
    #[error("what was sent is no manifest: {0}")]
    ManifestStream(#[source] io::Error),
    #[error("there is no image `{0}`")]
    NoImage(ImageReference),
    #[error("there is no image with digest {}", .0.short())]
    NoImageDigest(Digest),
    #[error("the image has no block {0}")]
    NoBlock(u64),
    #[error("there is no kernel with digest {}", .0.short())]
    NoKernel(Digest),
    #[error("the kernel {} was sent or asked for lately, and is kept until {until} for a VM that may come", .kernel.short())]
    KernelWanted { kernel: Digest, until: jiff::Timestamp },
    #[error("VM {} has no root disk", .0.short())]
    NoDisk(VmId),
    #[error("VM {} has a root disk already", .0.short())]
    DiskExists(VmId),
    #[error("there is no pool `{0}` on this host: list them with `form pool ls`")]
    NoPool(Name),
    #[error("there is a pool `{name}` already, in {directory}: choose another name")]
    PoolExists { name: Name, directory: PathBuf },
    #[error("{path} cannot be a pool: {reason}")]
    PoolPlace { path: PathBuf, reason: String },
    #[error("{path} is pool/{pool} of another agent, the host {host}: take another directory, or remove that pool there first")]
    PoolTaken { path: PathBuf, host: HostId, pool: Name },
    /// Nothing is looked for in it and nothing made as long as that is so.
    #[error("pool/{name} is not there: {reason} (is its file system mounted at {directory}?)")]
    PoolAway { name: Name, directory: PathBuf, reason: String },
    /// Of an NFS pool. It is asked again every few seconds.
    #[error("pool/{name} is not answering: {reason}")]
    PoolSilent { name: Name, reason: String },
    /// Of an NFS pool.
    #[error("pool/{name} is not there: {reason}")]
    PoolMount { name: Name, reason: String },
    #[error(transparent)]
    PoolExport(#[from] crate::NfsError),
    #[error("pool/{other} is {export} already, and neither may lie in the other: take another directory of the server")]
    PoolOverlaps { other: Name, export: String },
    #[error("pool/{0} was not made by `form pool create`: it is the host's own, or in `pools:` of agent.yaml")]
    PoolFixed(Name),
    #[error("pool/{name} is in use: {reason}")]
    PoolInUse { name: Name, reason: String },
    #[error("there is no volume with id {}", .0.short())]
    NoVolume(VolumeId),
    #[error("volume {} exists already", .0.short())]
    VolumeExists(VolumeId),
    /// It was made here, and its file is not where it was.
    #[error("the volume's file {path} is gone: bring it back (is the file system of its pool mounted?), or remove the volume")]
    VolumeGone { id: VolumeId, path: PathBuf },
    /// Another open file holds the lock, be it a VM of ours or a foreign program.
    #[error("{path} is in use: {user} has it open")]
    VolumeInUse { path: PathBuf, user: String },
    #[error("a volume is never made smaller: it has {has} bytes, and {wanted} were asked for")]
    VolumeShrinks { has: u64, wanted: u64 },
    #[error(transparent)]
    VolumeSize(#[from] VolumeSizeError),
    #[error("the file system of {pool} has no files of {size_bytes} bytes: ask for less, or use the format qcow2 or another pool")]
    VolumeTooLarge { pool: PathBuf, size_bytes: u64 },
    #[error("image `{image}` is used by {}", list(.users))]
    ImageInUse { image: ImageReference, users: Vec<String> },
    #[error("image `{0}` is to be kept: say `form image set {0} --no-keep` first")]
    ImageKept(ImageReference),
    #[error("there is no snapshot `{0}` of this VM")]
    NoSnapshot(Name),
    #[error("there is a snapshot `{0}` of this VM already: choose another name, or remove it with `form vm snapshot rm`")]
    SnapshotExists(Name),
    #[error("the snapshot `{name}` has version {found}, this agent reads {known}: use the release that made it")]
    SnapshotVersion { name: Name, found: u32, known: u32 },
    #[error("the snapshot `{name}` cannot be used: {reason}. Remove it with `form vm snapshot rm`")]
    SnapshotDamaged { name: Name, reason: String },
    #[error("the snapshot `{name}` cannot be restored: {source}")]
    SnapshotMemory { name: Name, source: CompressedError },
    #[error("there is no snapshot `{0}` of this volume")]
    NoVolumeSnapshot(Name),
    #[error("there is a snapshot `{0}` of this volume already: choose another name, or remove it with `form volume snapshot rm`")]
    VolumeSnapshotExists(Name),
    #[error("the snapshot `{name}` has version {found}, this agent reads {known}: use the release that made it")]
    VolumeSnapshotVersion { name: Name, found: u32, known: u32 },
    #[error("the snapshot `{name}` cannot be used: {reason}. Remove it with `form volume snapshot rm`")]
    VolumeSnapshotDamaged { name: Name, reason: String },
    /// Files cannot share blocks there: a copy takes its time.
    #[error("the file system of {0} does not share blocks between files")]
    NoSharing(PathBuf),
    #[error("{what} was changed on disk: {reason}. Run `form image verify`, or remove it and deploy again")]
    Damaged { what: String, reason: String },
    #[error("a disk of {wanted} bytes is smaller than the {least} bytes it has to hold")]
    DiskTooSmall { wanted: u64, least: u64 },
}

fn list(names: &[String]) -> String {
    names.join(", ")
}

impl StoreError {
    /// Whether the file system is full: the caller reports it as such, and may clean up and try again.
    pub const fn is_no_room(&self) -> bool {
        matches!(self, Self::NoRoom { .. })
    }

    /// Turns an I/O error into one that says what was done to which path.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoRoom { action, path, source },
            _ => Self::Io { action, path, source },
        }
    }

    pub(crate) fn in_use(name: &Name, version: u32, users: Vec<String>) -> Self {
        Self::ImageInUse { image: ImageReference { name: name.clone(), version: Some(version) }, users }
    }
}
