//! Locks on the files of volumes: one writer, or any number of readers, of whatever program.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

use crate::error::{Result, StoreError};

/// A byte on which QEMU and its tools hold a shared lock while they may write: they lock bytes from 100 on, one for each thing that they do to
/// a file (QEMU, docs/system/qemu-block-drivers, "Disk image file locking").
const QEMU_WRITES: libc::off_t = 101;

/// Takes an open-file-description lock (fcntl(2)) on the whole file. It belongs to the open file: whoever gets a copy of the
/// descriptor holds it too, and it ends with the last copy. QEMU and its tools lock in the same way and so keep out, and are kept out.
///
/// # Errors
/// [`StoreError::VolumeInUse`], with the process that has it as far as that can be seen.
pub fn take(file: &File, path: &Path, write: bool) -> Result<()> {
    let range = |kind, from, length| libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: from,
        l_len: length,
        l_pid: 0,
    };
    let set = |kind, from, length| fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, from, length)));
    let take = || {
        if write {
            return set(libc::F_WRLCK, 0, 0);
        }
        // All but that byte, on which any lock at all then is a writer's; also when this was the writer until now.
        set(libc::F_UNLCK, QEMU_WRITES, 1)?;
        set(libc::F_RDLCK, 0, QEMU_WRITES)?;
        set(libc::F_RDLCK, QEMU_WRITES + 1, 0)?;
        let mut writer = range(libc::F_WRLCK, QEMU_WRITES, 1);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut writer))?;
        if writer.l_type == libc::F_UNLCK as libc::c_short { Ok(0) } else { Err(Errno::EAGAIN) }
    };
    match take() {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(StoreError::VolumeInUse { path: path.to_owned(), user: user_of(file) }),
        // A file system without locks: the state still knows one VM for each volume.
        Err(Errno::ENOLCK | Errno::EOPNOTSUPP) => Ok(()),
        Err(error) => Err(StoreError::io("lock", path)(io::Error::from(error))),
    }
}

/// A process that has the file open, for people: `form-vmm (pid 4711)`. Nobody's file is looked at but such as have this one's inode number: a
/// look at one on a server that does not answer takes its time.
fn user_of(file: &File) -> String {
    let find = || -> io::Result<Option<String>> {
        let wanted = file.metadata()?;
        let number = inode_of("self", &file.as_raw_fd().to_string());
        let times_open = |process: &Path, pid: &str| {
            let is_it = |descriptor: &fs::DirEntry| {
                inode_of(pid, &descriptor.file_name().to_string_lossy()) == number
                    && fs::metadata(descriptor.path()).is_ok_and(|meta| (meta.dev(), meta.ino()) == (wanted.dev(), wanted.ino()))
            };
            fs::read_dir(process.join("fd")).map_or(0, |descriptors| descriptors.flatten().filter(is_it).count())
        };
        let own = std::process::id().to_string();
        for process in fs::read_dir("/proc")?.flatten() {
            let name = process.file_name();
            let Some(pid) = name.to_str().filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()) && **pid != own) else { continue };
            if times_open(&process.path(), pid) > 0 {
                let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Ok(Some(format!("{} (pid {pid})", program.trim())));
            }
        }
        // Once is the file that was to be locked.
        let is_ours = times_open(Path::new("/proc/self"), "self") > 1;
        Ok(is_ours.then(|| "the agent, for something that is under way (see `form op ls`)".to_owned()))
    };
    find().ok().flatten().unwrap_or_else(|| "another program".to_owned())
}

/// The inode number of a descriptor's file, as the kernel has it in memory (proc_pid_fdinfo(5), since Linux 5.14); none where it does not say.
fn inode_of(process: &str, descriptor: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{process}/fdinfo/{descriptor}")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("ino:")).map(|number| number.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_alone_may_write_for_a_moment() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (first, second) = (open(), open());
        take(&first, file.path(), false).unwrap();
        take(&first, file.path(), true).unwrap();
        assert!(take(&second, file.path(), false).is_err());
        take(&first, file.path(), false).unwrap();
        take(&second, file.path(), false).unwrap();
        assert!(take(&first, file.path(), true).is_err(), "another reads too");
        assert!(take(&open(), file.path(), true).is_err(), "and both locks are as they were");
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (first, second, third) = (open(), open(), open());
        take(&first, file.path(), false).unwrap();
        take(&second, file.path(), false).unwrap();
        let in_use = take(&third, file.path(), true).unwrap_err();
        assert!(in_use.to_string().contains("form op ls"), "{in_use}");
        drop((first, second));
        take(&third, file.path(), true).unwrap();
        let copy = third.try_clone().unwrap();
        drop(third);
        let late = open();
        assert!(matches!(take(&late, file.path(), false), Err(StoreError::VolumeInUse { .. })), "a copy holds it too");
        drop(copy);
        take(&late, file.path(), false).unwrap();
    }
}
