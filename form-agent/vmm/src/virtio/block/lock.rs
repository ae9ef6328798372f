//! One writer at a time, also across processes that share no parent.

use std::{fs::File, io, os::fd::AsRawFd};

/// Takes an open-file-description lock for writing on the whole file. It belongs to the open file, not to this process: it
/// is released when the last copy of the descriptor is closed, and the daemon that passed a copy holds it as well.
///
/// # Errors
/// `ResourceBusy` when another open file holds it; otherwise those of `fcntl`. A file system that knows no locks is no error.
pub fn write_lock(file: &File) -> io::Result<()> {
    // SAFETY: all zeros is a valid flock: the whole file, counted from its start; l_pid must be zero for OFD locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `lock` is a valid flock that outlives the call, and `file` keeps the descriptor open.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "the disk is in use: another process has it open for writing; stop that one first",
        )),
        Some(libc::ENOLCK | libc::EOPNOTSUPP) => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_writer_is_refused_until_the_first_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = file.reopen().unwrap();
        let second = file.reopen().unwrap();
        write_lock(&first).unwrap();
        assert_eq!(write_lock(&second).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        write_lock(&second).unwrap();
    }
}
