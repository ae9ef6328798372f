//! Empty network, IPC and UTS namespaces, and a mount namespace with nothing in it.

use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount};
use rustix::thread::UnshareFlags;

use super::{JailError, io};

/// Directories of which every system has one; the empty root is mounted over it, in our own namespace only.
const PLACES: [&str; 5] = ["/proc", "/sys", "/dev", "/run", "/tmp"];
const ROOT_OPTIONS: &core::ffi::CStr = c"mode=555,size=4k,nr_inodes=1";

/// # Errors
/// When the process may not (it must be root).
pub fn enter() -> Result<(), JailError> {
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: none of the flags takes a resource of this process away from another thread; NEWNS makes the calling thread's view of
    // the file system its own, and there is one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io("make namespaces (this needs root)"))?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).map_err(io("separate the mount namespace"))?;
    let flags = MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID;
    let place = PLACES
        .into_iter()
        .find(|place| mount("none", *place, "tmpfs", flags, ROOT_OPTIONS).is_ok())
        .ok_or_else(|| io("mount an empty root")(Errno::NOENT))?;
    rustix::process::chdir(place).map_err(io("enter the empty root"))?;
    // The old root is put on top of the new one, and then taken away: no directory is needed for it.
    rustix::process::pivot_root(".", ".").map_err(io("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(io("leave the old root"))?;
    rustix::process::chdir("/").map_err(io("enter the empty root"))?;
    mount_remount("/", flags | MountFlags::RDONLY, ROOT_OPTIONS).map_err(io("make the empty root read-only"))?;
    Ok(())
}
