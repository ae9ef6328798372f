//! One place in the file system: what is made beside it and moved there, and what that then is.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, FileTimes, Permissions},
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, fchown},
        },
    },
    path::Path,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::fs::{AtFlags, FileType, Gid, Uid};

use crate::{
    ArchiveError,
    error::{failed, file},
    tree,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    pub uid: u32,
    pub gid: u32,
}

/// What an entry says beside its content.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    pub mode: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    /// None leaves it with who unpacks.
    pub owner: Option<Ids>,
}

impl Attributes {
    /// Gives a new file or directory its owner, its mode and its time.
    ///
    /// # Errors
    /// What the file system does not allow.
    pub fn apply(&self, opened: &File, path: &Path) -> Result<(), ArchiveError> {
        if let Some(Ids { uid, gid }) = self.owner {
            fchown(opened, Some(uid), Some(gid)).map_err(file("change the owner of", path))?;
        }
        // After the owner: a change of that takes set-id bits away.
        opened.set_permissions(Permissions::from_mode(self.mode)).map_err(file("change the mode of", path))?;
        let time = UNIX_EPOCH.checked_add(Duration::from_secs(self.mtime)).unwrap_or_else(SystemTime::now);
        opened.set_times(FileTimes::new().set_modified(time)).map_err(file("set the time of", path))
    }
}

/// Where something is to be.
pub struct Place<'a> {
    pub parent: &'a Rc<OwnedFd>,
    pub name: &'a OsStr,
    pub path: &'a Path,
}

impl Place<'_> {
    /// Makes something new beside its place and moves it there.
    pub fn fill(&self, make: impl FnOnce(&OsStr) -> rustix::io::Result<()>) -> Result<(), ArchiveError> {
        let temporary = beside(self.name);
        make(&temporary).map_err(failed("create", self.path))?;
        let taken = self.take(&temporary);
        // Also when that went well: of two links to one file `rename` leaves both.
        self.drop(&temporary);
        taken
    }

    /// Moves what was made beside it into its place. What is neither a file nor a link stays.
    pub fn take(&self, temporary: &OsStr) -> Result<(), ArchiveError> {
        match tree::look(self.parent, self.name).map_err(failed("create", self.path))?.map(|stat| tree::kind(&stat)) {
            None | Some(FileType::RegularFile | FileType::Symlink) => {}
            Some(FileType::Directory) => return Err(ArchiveError::Invalid(format!("{} is a directory", self.path.display()))),
            Some(_) => return Err(ArchiveError::Invalid(format!("{} is a device, a pipe or a socket", self.path.display()))),
        }
        let parent = &**self.parent;
        rustix::fs::renameat(parent, temporary, parent, self.name).map_err(failed("create", self.path))
    }

    pub fn drop(&self, temporary: &OsStr) {
        let _ = rustix::fs::unlinkat(&**self.parent, temporary, AtFlags::empty());
    }

    /// Gives what is there, if it is a link the link itself, to its owner.
    pub fn own(&self, owner: Option<Ids>) -> Result<(), ArchiveError> {
        let Some(Ids { uid, gid }) = owner else { return Ok(()) };
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        let changed = rustix::fs::chownat(&**self.parent, self.name, uid, gid, AtFlags::SYMLINK_NOFOLLOW);
        changed.map_err(failed("change the owner of", self.path))
    }
}

/// A name that nobody else has.
pub fn beside(name: &OsStr) -> OsString {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // A name has 255 bytes at most.
    let name = String::from_utf8_lossy(name.as_bytes().get(..180).unwrap_or(name.as_bytes())).into_owned();
    let short = name.get(..name.floor_char_boundary(180)).unwrap_or_default();
    format!(".{short}.form-copy-{}-{now:x}-{count:x}", std::process::id()).into()
}
