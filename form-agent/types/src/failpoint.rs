//! Places at which an agent may be killed by a test: every step after which a crash leaves something half done.
//!
//! [`reach`] costs nothing in a build without debug assertions, and does nothing in one with them until somebody has said with
//! [`on_reach`] what to do. The agent says so when the variable `FORM_FAILPOINT` names a point. A test walks [`Failpoint::ALL`].

use std::str::FromStr;
#[cfg(debug_assertions)]
use std::sync::OnceLock;

macro_rules! failpoints {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// One such place, named after what has just been done there.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Failpoint {
            $($(#[$doc])* $point,)*
        }

        impl Failpoint {
            /// Every point there is.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// As `FORM_FAILPOINT` names it.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

failpoints! {
    /// A block of an upload has its name in the store.
    BlockKept = "upload.block-kept",
    /// The files of a kernel bundle are written and have no name yet.
    KernelAssembled = "kernel.assembled",
    /// A kernel bundle has its name.
    KernelPublished = "kernel.published",
    /// The file of an image is written and has no name yet.
    ImageAssembled = "image.assembled",
    /// The image's version is taken.
    ImageVersionTaken = "image.version-taken",
    /// An image has its name; its blocks still wait among the uploaded ones.
    ImagePublished = "image.published",
    /// An operation is on record as executing; nothing has been done for it.
    OperationRecorded = "operation.recorded",
    /// A change of the state is signed and not yet on the disk.
    StateSigned = "state.signed",
    /// A change of the state is on the disk.
    StateStored = "state.stored",
    /// A deploy has noted where it leads, and has changed nothing.
    DeployRemembered = "deploy.remembered",
    /// What a deploy asks for is in the state; the operation does not know yet that it is.
    DeploySubmitted = "deploy.submitted",
    /// The operation knows it too; the driver has not been told.
    DeployRecorded = "deploy.recorded",
    /// A VM's directory says what its disk will be made from.
    DiskRecorded = "disk.recorded",
    /// A disk is made and has no name yet.
    DiskDrafted = "disk.drafted",
    /// A copy of a VM's disk is made and has no name yet.
    DiskCopied = "disk.copied",
    /// A clone has its disk; the state does not know the VM.
    CloneMade = "clone.made",
    /// A new VM shares the snapshot that it is to go on from; the state does not know it.
    ForkShared = "fork.shared",
    /// A copy of a VM has been told who it is; the host has not noted that.
    ForkTold = "fork.told",
    /// A VM that runs has the disk of a volume; its guest has not been told.
    VolumePlugged = "volume.plugged",
    /// A VM that runs has given a volume back; neither the record nor the state says so.
    VolumeUnplugged = "volume.unplugged",
    /// A VM that runs has other vCPUs; neither the state nor a note says so.
    VcpusChanged = "vcpus.changed",
    /// It is noted what a VM that runs was made; the state does not say so.
    VcpusNoted = "vcpus.noted",
    /// A disk has its name.
    DiskMade = "disk.made",
    /// The old disk is gone and the new one is not there.
    DiskRetired = "disk.retired",
    /// All files of a start are open.
    LaunchOpened = "launch.opened",
    /// A VM has its runtime directory.
    LaunchDirectoryMade = "launch.directory-made",
    /// The firewall and the names know the VM.
    LaunchRulesSet = "launch.rules-set",
    /// The tap is there.
    LaunchTapMade = "launch.tap-made",
    /// The cgroup is there.
    LaunchCgroupMade = "launch.cgroup-made",
    /// A VM process runs that is on no record.
    LaunchProcessSpawned = "launch.process-spawned",
    /// The VM process is on record and has no VM yet.
    LaunchProcessRecorded = "launch.process-recorded",
    /// The guest runs; the record says that it does not.
    LaunchBooted = "launch.booted",
    /// The record says so too.
    LaunchBootRecorded = "launch.boot-recorded",
    /// The guest has reported.
    GuestReady = "guest.ready",
    /// A deploy has what it waited for.
    DeployHealthy = "deploy.healthy",
    /// The deploy is kept as the one to go back to; the operation is still executing.
    DeployKept = "deploy.kept",
    /// An operation has ended on record; nobody has been told.
    OperationEnded = "operation.ended",
    /// The state holds the old version again after a deploy that failed.
    RollbackSubmitted = "rollback.submitted",
    /// A start, stop, restart or destroy is in the state; the driver has not been told.
    LifecycleSubmitted = "lifecycle.submitted",
    /// The guest has been asked to power off.
    StopAsked = "stop.asked",
    /// The VM process is gone, everything around it is still there.
    StopProcessGone = "stop.process-gone",
    /// What was asked of the interfaces of a VM is in the state; nobody else knows.
    InterfaceSubmitted = "interface.submitted",
    /// An interface that comes to a VM has its tap; the VM does not have it.
    InterfaceTapMade = "interface.tap-made",
    /// The VM has an interface that its guest was not told of.
    InterfacePlugged = "interface.plugged",
    /// The VM has let an interface go; the state says that it has it.
    InterfaceUnplugged = "interface.unplugged",
    /// A volume has its bytes and no name yet.
    VolumeDrafted = "volume.drafted",
    /// A volume has its name in the pool; that it was made is not noted.
    VolumeNamed = "volume.named",
    /// A volume is made; the state does not know it.
    VolumeMade = "volume.made",
    /// What was asked of a volume is in the state; the pool is as before.
    VolumeSubmitted = "volume.submitted",
    /// A volume's file has grown; its record says the old size.
    VolumeGrown = "volume.grown",
    /// Nobody knows a volume any more; its file is still there.
    VolumeForgotten = "volume.forgotten",
    /// A VM stands still for a snapshot of its volume, of which nothing is written.
    VolumeSnapshotPaused = "volume-snapshot.paused",
    /// A snapshot of a volume has its bytes and its record, and no name yet.
    VolumeSnapshotDrafted = "volume-snapshot.drafted",
    /// A snapshot of a volume has its name; the operation does not know.
    VolumeSnapshotNamed = "volume-snapshot.named",
    /// A snapshot of a volume that is to be removed has lost its name; its files are still there.
    VolumeSnapshotRetired = "volume-snapshot.retired",
    /// What a volume goes back to lies beside it; the state does not say so.
    VolumeRestoreDrafted = "volume-restore.drafted",
    /// It lies where it is to be; the volume is still what it was.
    VolumeRestoreMoved = "volume-restore.moved",
    /// The volume is what it was then; what it was since still takes room.
    VolumeRestoreSwitched = "volume-restore.switched",
    /// A directory bears the marker of a pool that is not on record.
    PoolMarked = "pool.marked",
    /// A pool is on record; its operation is still executing.
    PoolRecorded = "pool.recorded",
    /// A pool is on record no more; its directory still bears the marker.
    PoolForgotten = "pool.forgotten",
    /// The memory of a VM that runs is being copied to its snapshot's file.
    SnapshotCopied = "snapshot.copied",
    /// A VM stands still to be saved; of what is left nothing is written.
    SnapshotPaused = "snapshot.paused",
    /// Memory, devices and disk are written; the VM still stands.
    SnapshotSaved = "snapshot.saved",
    /// The VM goes on; its snapshot has no name yet.
    SnapshotDrafted = "snapshot.drafted",
    /// The snapshot has its name; the operation does not know.
    SnapshotNamed = "snapshot.named",
    /// The memory of a snapshot lies compressed beside it; the snapshot is as it was.
    SnapshotCompressed = "snapshot.compressed",
    /// The snapshot is the one with compressed memory; what it was lies beside it.
    SnapshotExchanged = "snapshot.exchanged",
    /// A snapshot that is to be removed has lost its name; its files are still there.
    SnapshotRetired = "snapshot.retired",
    /// The disk that a VM goes back to is made; the VM runs on.
    RestoreDrafted = "restore.drafted",
    /// The VM process that was to be replaced is gone.
    RestoreEnded = "restore.ended",
    /// A process holds the restored VM; its disk has no name yet.
    RestoreHeld = "restore.held",
    /// The restored disk has taken the old one's place; the process is on no record as booted.
    RestoreSwapped = "restore.swapped",
    /// The restored VM is on record; that the restore is done is not.
    RestoreRecorded = "restore.recorded",
    /// The tap is removed.
    CleanTapRemoved = "clean.tap-removed",
    /// The runtime directory is removed.
    CleanDirectoryRemoved = "clean.directory-removed",
    /// The cgroup is removed; the firewall still knows the VM.
    CleanCgroupRemoved = "clean.cgroup-removed",
    /// The disk of a VM that nobody wants is removed.
    RemoveDiskRemoved = "remove.disk-removed",
    /// Its directory is removed; there is still its log.
    RemoveDirectoryRemoved = "remove.directory-removed",
    /// Nothing of it is left.
    RemoveLogRemoved = "remove.log-removed",
}

impl FromStr for Failpoint {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|point| point.as_str() == name).ok_or_else(|| {
            let known = Self::ALL.iter().map(|point| point.as_str()).collect::<Vec<_>>().join(", ");
            format!("`{name}` is no failpoint; there are {known}")
        })
    }
}

#[cfg(debug_assertions)]
static HOOK: OnceLock<fn(Failpoint)> = OnceLock::new();

/// Says what to do at every point from now on. The first one who says so is heard.
#[cfg(debug_assertions)]
pub fn on_reach(hook: fn(Failpoint)) {
    let _ = HOOK.set(hook);
}

/// The program has come to this point.
#[inline]
pub fn reach(point: Failpoint) {
    #[cfg(debug_assertions)]
    if let Some(hook) = HOOK.get() {
        hook(point);
    }
    #[cfg(not(debug_assertions))]
    let _ = point;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_are_unique() {
        for point in Failpoint::ALL {
            assert_eq!(point.as_str().parse(), Ok(*point));
        }
        assert!("deploy.nonsense".parse::<Failpoint>().unwrap_err().contains("disk.made"));
    }
}
