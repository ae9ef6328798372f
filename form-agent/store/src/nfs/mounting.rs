//! mount(2) and umount(2) of NFS, and what is mounted where.

use std::{
    ffi::CString,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs, UdpSocket},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

use super::{Fault, NfsExport};

/// The port of NFS servers, as far as this host's own address towards one goes.
const NFS_PORT: u16 = 2049;

/// Mounts the export when it is not mounted, and asks its server for the room it has: an answer that is never taken from memory. `mounted`: what
/// is mounted there was mounted by an earlier look, whatever the kernel calls it.
pub(super) fn look(export: &NfsExport, directory: &Path, mounted: &mut bool) -> Result<(), Fault> {
    let is_ours = |found: &Mounted| found.kind == "nfs4" && (*mounted || found.source == export.source());
    if mounted_at(directory).is_none_or(|found| !is_ours(&found)) {
        let failed = |error: io::Error| Fault::Refused(format!("{} cannot be unmounted: {error}", directory.display()));
        unmount_all(directory).map_err(failed)?;
        mount_export(export, directory)?;
    }
    *mounted = true;
    match rustix::fs::statvfs(directory) {
        Ok(_) => Ok(()),
        Err(Errno::STALE) => {
            // The next look mounts what is there now.
            let _ = unmount_all(directory);
            Err(Fault::Refused(format!("{} is another directory now, or no longer exported: see the server's exports", export.source())))
        }
        Err(Errno::TIMEDOUT | Errno::IO) => Err(Fault::Silent(format!("the server of {} does not answer", export.source()))),
        Err(error) => Err(fault(export, error)),
    }
}

/// As the newest version that the server speaks, unless one is asked for.
fn mount_export(export: &NfsExport, directory: &Path) -> Result<(), Fault> {
    let unknown =
        |error: &dyn std::fmt::Display| Fault::Refused(format!("the name of the server `{}` is not known: {error}", export.server()));
    let addresses: Vec<IpAddr> = match export.server().parse() {
        Ok(address) => vec![address],
        Err(_) => {
            let found = (export.server(), 0).to_socket_addrs().map_err(|error| unknown(&error))?;
            found.map(|address| address.ip()).collect()
        }
    };
    let mut failed = unknown(&"it has no address");
    for address in addresses {
        for version in export.versions() {
            match mount_from(export, address, version, directory) {
                Ok(()) => return Ok(()),
                // Only here another version may help.
                Err(error @ (Errno::PROTONOSUPPORT | Errno::OPNOTSUPP)) => failed = fault(export, error),
                Err(error) => {
                    failed = fault(export, error);
                    break;
                }
            }
        }
    }
    Err(failed)
}

fn mount_from(export: &NfsExport, address: IpAddr, version: &str, directory: &Path) -> Result<(), Errno> {
    let own = own_address(address).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::NETUNREACH))?;
    let protocol = if address.is_ipv6() { "tcp6" } else { "tcp" };
    let options = format!("vers={version},proto={protocol},softerr,{},addr={address},clientaddr={own}", export.kernel_options());
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    mount(export.source(), directory, "nfs4", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, options.as_c_str())
}

/// This host's address as that server sees it.
fn own_address(server: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if server.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((server, NFS_PORT))?;
    Ok(socket.local_addr()?.ip())
}

/// What the kernel's word for a failed mount means, and what to do.
fn fault(export: &NfsExport, error: Errno) -> Fault {
    let (source, server) = (export.source(), export.server());
    let said = io::Error::from(error);
    let text = match error {
        Errno::TIMEDOUT | Errno::HOSTDOWN => return Fault::Silent(format!("the server of {source} does not answer")),
        Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::NETDOWN => {
            return Fault::Silent(format!("the server of {source} cannot be reached: {said}"));
        }
        Errno::CONNREFUSED => return Fault::Silent(format!("no NFS server answers at {server}: start it, or set the option port=")),
        Errno::NODEV => "this host's kernel has no NFS client: `modprobe nfsv4`, or install its modules".to_owned(),
        Errno::PERM => format!(
            "mounting {source} is not permitted: the agent has to be root of the host (in a container: with CAP_SYS_ADMIN), and the server \
             has to export to this host"
        ),
        Errno::ACCESS => format!("{server} does not let this host mount {source}: export it to this host's address (exports(5))"),
        Errno::NOENT => format!("{server} has no export {}: see `exportfs -v` there", export.path()),
        Errno::PROTONOSUPPORT | Errno::OPNOTSUPP => format!("{server} does not speak this version of NFS 4: set the option vers="),
        Errno::INVAL => format!("the kernel does not take {source} with the options {}", export.kernel_options()),
        Errno::NOTDIR => format!("{source} is no directory"),
        _ => format!("{source} cannot be mounted: {said}"),
    };
    Fault::Refused(text)
}

/// What is mounted at a directory, by the kernel's list: nobody asks a server for that. Of several the topmost.
fn mounted_at(directory: &Path) -> Option<Mounted> {
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    find_mount(&String::from_utf8_lossy(&mounts), directory)
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    /// Of the file system.
    pub(super) kind: String,
    pub(super) source: String,
}

/// `36 35 98:0 / /mount/point rw,noatime master:1 - nfs4 server:/export rw` (proc(5)).
pub(super) fn find_mount(mounts: &str, directory: &Path) -> Option<Mounted> {
    let of_line = |line: &str| {
        let (place, what) = line.split_once(" - ")?;
        let at = unescaped(place.split(' ').nth(4)?);
        let (kind, source) = (what.split(' ').next()?.to_owned(), unescaped(what.split(' ').nth(1)?));
        (at == directory.as_os_str().as_bytes()).then(|| Mounted { kind, source: String::from_utf8_lossy(&source).into_owned() })
    };
    mounts.lines().rev().find_map(of_line)
}

/// Blanks and backslashes are written as three octal digits.
fn unescaped(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| byte == b'\\') {
            Some(escaped) => {
                plain.push(escaped);
                at += 4;
            }
            None => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    plain
}

pub(super) fn is_mounted(directory: &Path) -> bool {
    mounted_at(directory).is_some()
}

/// Ends every request to the server that is under way, with an error.
pub(super) fn force(directory: &Path) {
    if is_mounted(directory)
        && let Err(error) = unmount(directory, UnmountFlags::FORCE | UnmountFlags::NOFOLLOW)
    {
        tracing::debug!("{} is unmounted a moment later: {error}", directory.display());
    }
}

/// Nobody finds it there any more; files that are open stay so.
pub(super) fn unmount_all(directory: &Path) -> io::Result<()> {
    while is_mounted(directory) {
        match unmount(directory, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Err(error) if is_mounted(directory) => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}
