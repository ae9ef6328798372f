//! Directories by descriptor: between two steps somebody else may put a link where a directory was, and a path would follow it.

use std::{
    ffi::{OsStr, OsString},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat},
    io::{Errno, Result},
};

/// Directories in directories. Deeper trees are made to make programs fall over, here by their stack or their open descriptors.
pub const MAX_DEPTH: usize = 256;

/// To go on from; it need not be readable.
const THROUGH: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The directory that a user names: links on the way are the user's.
pub fn named(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, THROUGH, Mode::empty())
}

/// The directory `name` in `at`. For a link it is `NOTDIR`.
pub fn below(at: &OwnedFd, name: &OsStr) -> Result<OwnedFd> {
    rustix::fs::openat(at, name, THROUGH.union(OFlags::NOFOLLOW), Mode::empty())
}

/// As [`below`], to list it or change its mode.
pub fn readable_below(at: &OwnedFd, name: &OsStr) -> Result<OwnedFd> {
    rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// What is there; a link is a link.
pub fn look(at: &OwnedFd, name: &OsStr) -> Result<Option<Stat>> {
    match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

pub fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// What a link leads to; none when it leads nowhere.
pub fn beyond(at: &OwnedFd, name: &OsStr) -> Option<Stat> {
    rustix::fs::statat(at, name, AtFlags::empty()).ok()
}

/// The names in a directory, sorted, so that equal trees give equal streams.
pub fn list(directory: &OwnedFd) -> Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The directory at `path`, to list it.
pub fn readable(path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}
