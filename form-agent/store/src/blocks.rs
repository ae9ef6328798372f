//! Blocks that came in and wait for their manifest, and files made of blocks.
//!
//! A block waits as the frame it came in. It is not flushed: its digest is checked again when it is used, so a block that a
//! power failure tore is found then and asked for again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File, Permissions},
    io,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use form_bundle::{BLOCK_SIZE, BlockMap, blocks};
use form_types::{Digest, Failpoint, failpoint::reach};

use crate::{
    durable::{TEMPORARY, clear_temporary, make_dir},
    error::{Result, StoreError},
};

/// A block that nobody asked for in this time belongs to an upload that was given up.
pub const STALE_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// Blocks on their way in.
pub struct Incoming {
    root: PathBuf,
}

impl Incoming {
    pub fn open(parent: &Path) -> Result<Self> {
        let incoming = Self { root: parent.join("incoming") };
        make_dir(&incoming.root)?;
        clear_temporary(&incoming.root)?;
        make_dir(&incoming.root.join(TEMPORARY))?;
        Ok(incoming)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let text = digest.to_string();
        self.root.join(&text[..2]).join(text)
    }

    pub fn contains(&self, digest: &Digest) -> bool {
        self.path(digest).exists()
    }

    /// Keeps a compressed block.
    pub fn put(&self, digest: &Digest, frame: &[u8]) -> Result<()> {
        blocks::open(digest, frame)?;
        let path = self.path(digest);
        if path.exists() {
            return Ok(());
        }
        // A file alone, not a directory for it as a draft has: an image is thousands of blocks.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let temporary = self.root.join(TEMPORARY).join(NUMBER.fetch_add(1, Ordering::Relaxed).to_string());
        let keep = || {
            fs::write(&temporary, frame)?;
            match fs::rename(&temporary, &path) {
                // The first block of its directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    path.parent().map_or(Ok(()), fs::create_dir_all)?;
                    fs::rename(&temporary, &path)
                }
                renamed => renamed,
            }
        };
        if let Err(error) = keep() {
            let _ = fs::remove_file(&temporary);
            return Err(StoreError::io("keep a block in", &self.root)(error));
        }
        reach(Failpoint::BlockKept);
        Ok(())
    }

    /// The plain bytes. A block that does not have its digest any more is removed, and counts as not there.
    fn get(&self, digest: &Digest) -> Result<Option<Vec<u8>>> {
        let path = self.path(digest);
        let frame = match fs::read(&path) {
            Ok(frame) => frame,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::io("read", &path)(source)),
        };
        match blocks::open(digest, &frame) {
            Ok(plain) => Ok(Some(plain)),
            Err(error) => {
                tracing::warn!(block = %digest.short(), %error, "a stored block is torn and will be asked for again");
                self.remove(digest);
                Ok(None)
            }
        }
    }

    /// Forgets a block; one that cannot be removed now is stale tomorrow.
    pub fn remove(&self, digest: &Digest) {
        let _ = fs::remove_file(self.path(digest));
    }

    /// Removes blocks that came in more than `age` ago. Gives back how many.
    pub fn remove_stale(&self, age: Duration) -> Result<u64> {
        let now = SystemTime::now();
        let mut removed = 0;
        // The directories stay, up to 256 of them: a block may be on its way into one.
        let directories = read_dir(&self.root)?;
        for directory in directories.iter().filter(|directory| !directory.ends_with(TEMPORARY)) {
            for block in read_dir(directory)? {
                // A block that vanishes meanwhile was used by an import.
                let age_of = |path: &Path| now.duration_since(fs::metadata(path).ok()?.modified().ok()?).ok();
                if age_of(&block).is_some_and(|found| found >= age) && fs::remove_file(&block).is_ok() {
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }
}

pub fn read_dir(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(StoreError::io("list", path))?,
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(StoreError::io("list", path))).collect()
}

/// Where the blocks of stored files lie.
#[derive(Default)]
pub struct Stored {
    places: HashMap<Digest, Place>,
}

struct Place {
    file: Arc<(PathBuf, File)>,
    offset: u64,
    length: usize,
}

impl Stored {
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// Notes those of the `wanted` blocks that a sealed file holds.
    pub fn note(&mut self, path: &Path, map: &BlockMap, wanted: &BTreeSet<Digest>) -> Result<()> {
        let mut open: Option<Arc<(PathBuf, File)>> = None;
        for (index, digest) in map.iter() {
            if !wanted.contains(digest) || self.places.contains_key(digest) {
                continue;
            }
            let file = match &open {
                Some(file) => file.clone(),
                None => {
                    let file = Arc::new((path.to_owned(), File::open(path).map_err(StoreError::io("read", path))?));
                    open.insert(file).clone()
                }
            };
            let place = Place { file, offset: index * blocks::BLOCK_SIZE as u64, length: map.block_len(index) };
            self.places.insert(*digest, place);
        }
        Ok(())
    }
}

/// Makes files out of blocks.
pub struct Assembler<'a> {
    pub incoming: &'a Incoming,
    pub stored: Stored,
}

impl Assembler<'_> {
    /// The blocks of `wanted` that are nowhere.
    pub fn missing(&self, wanted: &BTreeSet<Digest>) -> Vec<Digest> {
        wanted.iter().filter(|digest| !self.stored.places.contains_key(digest) && !self.incoming.contains(digest)).copied().collect()
    }

    /// Writes a sparse, read-only file and flushes it. Every block is checked against its digest on the way.
    ///
    /// # Errors
    /// [`StoreError::MissingBlocks`] when a block turns out to be torn; the others are of the file system.
    pub fn write(&self, path: &Path, map: &BlockMap) -> Result<()> {
        let fault = || StoreError::io("write", path);
        let file = File::create_new(path).map_err(fault())?;
        file.set_len(map.size()).map_err(fault())?;
        let mut torn = BTreeMap::new();
        for (index, digest) in map.iter() {
            let offset = index * blocks::BLOCK_SIZE as u64;
            match self.plain(digest)? {
                Some((plain, _)) if plain.len() != map.block_len(index) => {
                    return Err(StoreError::Damaged {
                        what: format!("block {index} of the file"),
                        reason: format!("it has {} bytes instead of {}", plain.len(), map.block_len(index)),
                    });
                }
                Some((plain, place)) => place
                    .and_then(|place| share(place, &file, offset))
                    .map_or_else(|| file.write_all_at(&plain, offset), Ok)
                    .map_err(fault())?,
                None => {
                    torn.insert(*digest, ());
                }
            }
        }
        if !torn.is_empty() {
            return Err(StoreError::MissingBlocks(torn.into_keys().collect()));
        }
        file.set_permissions(Permissions::from_mode(0o444)).map_err(fault())?;
        file.sync_all().map_err(fault())
    }

    /// The bytes of a block, and the place they can be shared with. The upload is looked at first: it is what a client sends
    /// to mend a stored file that has gone bad.
    fn plain(&self, digest: &Digest) -> Result<Option<(Vec<u8>, Option<&Place>)>> {
        if let Some(plain) = self.incoming.get(digest)? {
            return Ok(Some((plain, None)));
        }
        let Some(place) = self.stored.places.get(digest) else { return Ok(None) };
        let (path, file) = &*place.file;
        let mut plain = vec![0; place.length];
        file.read_exact_at(&mut plain, place.offset).map_err(StoreError::io("read", path))?;
        blocks::verify(digest, &plain).map_err(|_| StoreError::Damaged {
            what: path.display().to_string(),
            reason: format!("the block at byte {} is not what it was", place.offset),
        })?;
        Ok(Some((plain, Some(place))))
    }
}

/// Lets the new file share a block with the one it is in, where the file system can (XFS, btrfs). `None` where it cannot, and
/// the bytes have to be written.
fn share(place: &Place, file: &File, offset: u64) -> Option<()> {
    let (mut from, mut to) = (place.offset, offset);
    let copied = rustix::fs::copy_file_range(&place.file.1, Some(&mut from), file, Some(&mut to), place.length).ok()?;
    (copied == place.length).then_some(())
}

/// What is not as it was in a file that was read whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Blocks read, holes included.
    pub blocks: u64,
    /// Numbers of the blocks that differ, ascending.
    pub damaged: Vec<u64>,
}

/// Rehashes a file against its map, holes included. Where the file is too short or too long, the blocks from its end on differ.
pub fn compare_file(path: &Path, map: &BlockMap) -> Result<Comparison> {
    let file = File::open(path).map_err(StoreError::io("read", path))?;
    let found = BlockMap::build(io::BufReader::with_capacity(1 << 20, file), |_, _| Ok(())).map_err(StoreError::io("read", path))?;
    let count = |bytes: u64| bytes.div_ceil(BLOCK_SIZE as u64);
    let (expected, there): (BTreeMap<_, _>, BTreeMap<_, _>) = (map.iter().collect(), found.iter().collect());
    let mut damaged: BTreeSet<u64> =
        expected.keys().chain(there.keys()).filter(|index| expected.get(*index) != there.get(*index)).copied().collect();
    if found.size() != map.size() {
        let (short, long) = (found.size().min(map.size()), found.size().max(map.size()));
        damaged.extend(short / BLOCK_SIZE as u64..count(long));
    }
    Ok(Comparison { blocks: count(found.size()), damaged: damaged.into_iter().collect() })
}
