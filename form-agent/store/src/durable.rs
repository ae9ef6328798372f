//! Files and directories that are there as a whole or not at all, whenever the power fails.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::{Result, StoreError};

pub const TEMPORARY: &str = ".tmp";

/// Makes a directory with its parents.
pub fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(StoreError::io("make the directory", path))
}

pub fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(StoreError::io("flush the directory", path))
}

/// Removes what an agent that was killed left half made below `parent`.
pub fn clear_temporary(parent: &Path) -> Result<()> {
    remove_tree(&parent.join(TEMPORARY))
}

/// Removes a directory with all it holds; that it is not there is fine.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", path)(source)),
        _ => Ok(()),
    }
}

/// A directory that is being made. Dropped before [`Draft::publish`] it is gone, with everything in it.
pub struct Draft {
    path: PathBuf,
    published: bool,
}

impl Draft {
    /// A new, empty directory below `<parent>/.tmp`, on the same file system as `parent`.
    pub fn new(parent: &Path) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let path = parent.join(TEMPORARY).join(NUMBER.fetch_add(1, Ordering::Relaxed).to_string());
        make_dir(&path)?;
        Ok(Self { path, published: false })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the directory its name, durably: its entries reach the disk first, then the name. The files in it must have been
    /// flushed by whoever wrote them.
    pub fn publish(mut self, target: &Path) -> Result<()> {
        sync_dir(&self.path)?;
        if let Some(parent) = target.parent() {
            make_dir(parent)?;
        }
        fs::rename(&self.path, target).map_err(StoreError::io("name", target))?;
        self.published = true;
        target.parent().map_or(Ok(()), sync_dir)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = remove_tree(&self.path)
        {
            tracing::warn!(%error, "a half-made directory stays until the next start");
        }
    }
}

/// Takes a directory out of sight in one step, then removes it; a crash in between leaves only what [`clear_temporary`] finds.
pub fn retire(directory: &Path, parent: &Path) -> Result<()> {
    bury(directory, parent).map(drop)
}

/// As [`retire`], but it is removed when what is given back is dropped: NFS does not remove what somebody of this host still has open.
pub fn bury(directory: &Path, parent: &Path) -> Result<Draft> {
    let draft = Draft::new(parent)?;
    let grave = draft.path().join("retired");
    match fs::rename(directory, grave) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(draft),
        other => other.map_err(StoreError::io("remove", directory))?,
    }
    directory.parent().map_or(Ok(()), sync_dir)?;
    Ok(draft)
}

/// Writes a file and flushes it, with these permissions.
pub fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write().map_err(StoreError::io("write", path))
}

/// Puts a new file in the place of `path`, durably.
pub fn replace_file(parent: &Path, path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let draft = Draft::new(parent)?;
    let temporary = draft.path().join("file");
    write_file(&temporary, bytes, mode)?;
    fs::rename(&temporary, path).map_err(StoreError::io("write", path))?;
    path.parent().map_or(Ok(()), sync_dir)
}

pub fn to_json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| StoreError::io("write", path)(error.into()))
}

pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(StoreError::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|error| StoreError::io("read", path)(error.into()))
}

/// What a file looked like when it was sealed: a cheap check that nobody wrote to it since, for a write changes the times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Seal {
    /// Of a file that nobody writes to any more.
    pub fn of(path: &Path) -> Result<Self> {
        let meta = fs::symlink_metadata(path).map_err(StoreError::io("look at", path))?;
        Ok(Self {
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }

    /// Whether nobody has written to it since, whatever became of its name, links and permissions.
    pub fn has_same_bytes(&self, path: &Path) -> Result<bool> {
        Ok(Self { changed: self.changed, ..Self::of(path)? } == *self)
    }

    /// # Errors
    /// [`StoreError::Damaged`] with what is different.
    pub fn check(&self, path: &Path) -> Result<()> {
        let now = Self::of(path)?;
        let reason = match () {
            () if now.size != self.size => format!("its size is {} instead of {}", now.size, self.size),
            () if now.inode != self.inode => "it is another file".to_owned(),
            () if now.modified != self.modified => "it was written to".to_owned(),
            () if now.changed != self.changed => "its contents, owner or permissions were changed".to_owned(),
            () => return Ok(()),
        };
        Err(StoreError::Damaged { what: path.display().to_string(), reason })
    }
}
