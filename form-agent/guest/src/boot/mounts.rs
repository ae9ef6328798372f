//! The kernel's own file systems, and the console.

use std::{ffi::CStr, fs, os::unix::fs::PermissionsExt, path::Path};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::{
    error::{Context, Error},
    report::BootReport,
};

struct Kernel {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    data: Option<&'static CStr>,
}

const NOTHING: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

const MOUNTS: [Kernel; 8] = [
    Kernel { source: "proc", target: "/proc", kind: "proc", flags: NOTHING, data: None },
    Kernel { source: "sysfs", target: "/sys", kind: "sysfs", flags: NOTHING, data: None },
    Kernel { source: "devtmpfs", target: "/dev", kind: "devtmpfs", flags: MountFlags::NOSUID, data: Some(c"mode=0755") },
    Kernel {
        source: "devpts",
        target: "/dev/pts",
        kind: "devpts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: Some(c"gid=5,mode=0620,ptmxmode=0666"),
    },
    Kernel {
        source: "tmpfs",
        target: "/dev/shm",
        kind: "tmpfs",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        data: Some(c"mode=1777"),
    },
    Kernel { source: "mqueue", target: "/dev/mqueue", kind: "mqueue", flags: NOTHING, data: None },
    // Programs run from here: the agent's own copy does when the image has an init.
    Kernel { source: "tmpfs", target: "/run", kind: "tmpfs", flags: MountFlags::NOSUID.union(MountFlags::NODEV), data: Some(c"mode=0755") },
    Kernel { source: "cgroup2", target: "/sys/fs/cgroup", kind: "cgroup2", flags: NOTHING, data: Some(c"nsdelegate") },
];

/// Mounts them all. One that is there already (devtmpfs by the kernel) is left as it is.
pub fn kernel_file_systems(report: &mut BootReport) {
    for entry in &MOUNTS {
        if let Err(error) = fs::create_dir_all(entry.target) {
            report.warn("mounts", format_args!("cannot create {}: {error}", entry.target));
        }
        match mount(entry.source, entry.target, entry.kind, entry.flags, entry.data) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => report.warn("mounts", format_args!("cannot mount {}: {error}", entry.target)),
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if !Path::new(link).is_symlink() {
            report.warn_on("mounts", std::os::unix::fs::symlink(target, link).at("create", link));
        }
    }
}

/// Makes the console our standard streams: the kernel gives none when the initramfs had no `/dev/console`.
pub fn take_console() -> Result<(), Error> {
    let console = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).at("open", "/dev/console")?;
    rustix::stdio::dup2_stdin(&console).doing("use /dev/console as standard input")?;
    rustix::stdio::dup2_stdout(&console).doing("use /dev/console as standard output")?;
    rustix::stdio::dup2_stderr(&console).doing("use /dev/console as standard error")
}

/// A directory anyone may write to, in a machine that stays in its initramfs.
pub fn temporary_directory() -> Result<(), Error> {
    fs::create_dir_all("/tmp").at("create", "/tmp")?;
    fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777)).at("open to everyone", "/tmp")
}
