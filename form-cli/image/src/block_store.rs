//! The builder's blocks: one zstd frame a file, named by the digest of the plain bytes, shared by all layers and images.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use form_bundle::blocks::{self, BLOCK_SIZE, BlockMap};
use form_types::Digest;
use rustix::fs::SeekFrom;

use crate::{BuildError, Cancel, error::IoContext};

#[derive(Clone, Debug)]
pub(crate) struct BlockStore {
    directory: PathBuf,
}

/// A file system's blocks, and how many plain bytes differ from its parent.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub map: BlockMap,
    pub changed_blocks: u64,
}

impl BlockStore {
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.directory.join(&name[..2]).join(name)
    }

    pub fn contains(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Keeps a block. It appears whole or not at all.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn put(&self, digest: &Digest, plain: &[u8]) -> Result<(), BuildError> {
        let path = self.path(digest);
        if path.is_file() {
            return Ok(());
        }
        let frame = blocks::compress(plain).map_err(|error| BuildError::Cache { path: path.clone(), reason: error.to_string() })?;
        self.replace(digest, &frame)
    }

    /// Keeps a frame that was checked, in the place of a damaged one when there is one. It appears whole or not at all.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn replace(&self, digest: &Digest, frame: &[u8]) -> Result<(), BuildError> {
        let path = self.path(digest);
        let directory = path.parent().unwrap_or(&self.directory);
        fs::create_dir_all(directory).during("create", directory)?;
        let mut file = tempfile::Builder::new().prefix("tmp-").tempfile_in(directory).during("create", directory)?;
        file.write_all(frame).during("write", &path)?;
        file.persist(&path).map_err(|error| error.error).during("rename", &path)?;
        Ok(())
    }

    /// Removes a block that nothing needs.
    pub fn remove(&self, digest: &Digest) {
        if let Err(error) = fs::remove_file(self.path(digest)) {
            tracing::debug!(%digest, %error, "a block stays until the next prune");
        }
    }

    /// The compressed bytes of a block, as they travel.
    ///
    /// # Errors
    /// When it is not there.
    pub fn read_frame(&self, digest: &Digest) -> Result<Vec<u8>, BuildError> {
        fs::read(self.path(digest)).map_err(|_| BuildError::Block(*digest))
    }

    /// The plain bytes of a block, checked.
    ///
    /// # Errors
    /// When it is not there or damaged.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>, BuildError> {
        blocks::open(digest, &self.read_frame(digest)?).map_err(|_| BuildError::Block(*digest))
    }

    /// Whether every block of a file is there; content is not read.
    pub fn has_all(&self, map: &BlockMap) -> bool {
        map.iter().all(|(_, digest)| self.contains(digest))
    }

    /// Writes a sparse file. An existing one is replaced.
    ///
    /// # Errors
    /// When a block is missing or damaged, or the disk is full.
    pub fn restore(&self, map: &BlockMap, path: &Path, cancel: &Cancel) -> Result<(), BuildError> {
        let file = File::create(path).during("create", path)?;
        file.set_len(map.size()).during("size", path)?;
        for (index, digest) in map.iter() {
            if cancel.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
            file.write_all_at(&self.read(digest)?, index * BLOCK_SIZE as u64).during("write", path)?;
        }
        Ok(())
    }

    /// Cuts a sparse file into blocks and keeps those that `parent` does not have at the same place.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn snapshot(&self, path: &Path, parent: Option<&BlockMap>, cancel: &Cancel) -> Result<Snapshot, BuildError> {
        let file = File::open(path).during("open", path)?;
        let size = file.metadata().during("examine", path)?.len();
        let mut map = BlockMap::new(size);
        let mut changed_blocks = 0;
        let mut buffer = vec![0; BLOCK_SIZE];
        let mut index = 0;
        while let Some(begin) = next_data(&file, index * BLOCK_SIZE as u64, size).during("seek in", path)? {
            index = begin / BLOCK_SIZE as u64;
            if cancel.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
            let length = map.block_len(index);
            file.read_exact_at(&mut buffer[..length], index * BLOCK_SIZE as u64).during("read", path)?;
            if !blocks::is_zero(&buffer[..length]) {
                let digest = Digest::of(&buffer[..length]);
                if parent.and_then(|parent| parent.get(index)) != Some(&digest) {
                    changed_blocks += 1;
                    self.put(&digest, &buffer[..length])?;
                }
                map.push(index, digest);
            }
            index += 1;
        }
        Ok(Snapshot { map, changed_blocks })
    }

    /// Removes what `keep` does not want, and leftovers of killed writers. Gives back how many bytes went.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn sweep(&self, keep: impl Fn(&Digest) -> bool) -> Result<u64, BuildError> {
        let mut freed = 0;
        for directory in fs::read_dir(&self.directory).during("list", &self.directory)?.flatten() {
            let Ok(files) = fs::read_dir(directory.path()) else { continue };
            for file in files.flatten() {
                let digest = file.file_name().to_str().and_then(|name| name.parse::<Digest>().ok());
                if !digest.is_some_and(|digest| keep(&digest)) {
                    freed += file.metadata().map_or(0, |meta| meta.len());
                    fs::remove_file(file.path()).during("remove", file.path())?;
                }
            }
        }
        Ok(freed)
    }
}

/// Where the next data at or after `from` begins; `None` at the end. A file system without holes has data everywhere.
fn next_data(file: &File, from: u64, size: u64) -> io::Result<Option<u64>> {
    if from >= size {
        return Ok(None);
    }
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(begin) => Ok(Some(begin)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(rustix::io::Errno::INVAL) => Ok(Some(from)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_files_come_back_and_only_changes_are_new() {
        let directory = tempfile::tempdir().unwrap();
        let store = BlockStore::new(directory.path().join("blocks"));
        fs::create_dir(directory.path().join("blocks")).unwrap();
        let path = directory.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"one", 5 << 20).unwrap();
        file.write_all_at(b"two", (64 << 20) - 3).unwrap();
        let first = store.snapshot(&path, None, &Cancel::new()).unwrap();
        assert_eq!((first.map.stored_blocks(), first.changed_blocks), (2, 2));
        let copy = directory.path().join("copy");
        store.restore(&first.map, &copy, &Cancel::new()).unwrap();
        assert_eq!(fs::read(&copy).unwrap(), fs::read(&path).unwrap());
        file.write_all_at(b"three", 5 << 20).unwrap();
        let second = store.snapshot(&path, Some(&first.map), &Cancel::new()).unwrap();
        assert_eq!(second.changed_blocks, 1);
        let kept = second.map.digests();
        assert!(store.sweep(|digest| kept.contains(digest)).unwrap() > 0);
        assert!(store.has_all(&second.map) && !store.has_all(&first.map));
        assert!(matches!(store.restore(&first.map, &copy, &Cancel::new()), Err(BuildError::Block(_))));
    }
}
