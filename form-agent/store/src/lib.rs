//! What of a host is on disk: images, kernels, the disks of VMs, volumes, and snapshots.
//!
//! Everything here blocks. Whatever has a name is whole: it is made in a directory without one, flushed, and named in one
//! step, so that a crash at any point leaves only what the next [`Store::open`] removes.

mod blocks;
pub mod compressed;
mod contents;
mod copy;
mod described;
mod disks;
mod durable;
mod error;
mod image_settings;
mod images;
mod kernels;
mod lock;
mod manifests;
pub mod nbd;
mod nfs;
mod pools;
mod snapshots;
mod volumes;

use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use form_types::{Digest, Name};

use crate::{
    blocks::{Assembler, Incoming, Stored},
    pools::Pools,
};
pub use crate::{
    blocks::{Comparison, STALE_AFTER},
    contents::{Contents, Extent},
    disks::{DiskFiles, DiskFormat},
    error::{Result, StoreError},
    image_settings::ImageSettings,
    images::ImageEntry,
    kernels::KernelEntry,
    manifests::ManifestWriter,
    nfs::{NfsError, NfsExport},
    pools::{MARKER, PoolSettings},
    snapshots::{RestoredDisk, SavedMemory, SnapshotDraft, SnapshotEntry},
    volumes::{Hold, OpenVolume, Pool, VolumeEntry, VolumeSnapshotDraft, VolumeSnapshotEntry},
};

/// The store of one agent. It can be shared between threads; changes take turns.
pub struct Store {
    root: PathBuf,
    images: PathBuf,
    kernels: PathBuf,
    vms: PathBuf,
    snapshots: PathBuf,
    /// Those that are being made.
    drafts: snapshots::Drafts,
    incoming: Incoming,
    pools: Pools,
    locks: Locks,
    /// Held for the store's life.
    _lock: File,
}

/// Changes of one kind take turns; a long import does not hold up the start of a VM. Taken in the order they are written here.
#[derive(Default)]
struct Locks {
    /// Images, kernels, and where blocks are.
    images: Mutex<()>,
    /// Disks, and whether an image is under one.
    disks: Mutex<()>,
    initramfs: Mutex<()>,
    /// Whether somebody wants a kernel.
    wanted: Mutex<()>,
}

/// A panic in a change leaves nothing half named, so a poisoned lock is sound.
fn hold(lock: &Mutex<()>) -> MutexGuard<'_, ()> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Room in the file system of the store, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub total: u64,
    /// What an ordinary user may still fill; what is reserved for root is not counted.
    pub free: u64,
}

impl Store {
    /// Opens the store below `root`, makes its directories, and removes what an agent that was killed left half made, and
    /// blocks of uploads that were given up. It has one pool, [`LOCAL_POOL`].
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another agent has it; else those of the file system.
    pub fn open(root: &Path) -> Result<Self> {
        let [images, kernels, vms, volumes, snapshots] = ["vm-images", "kernel", "vms", "volumes", "snapshots"].map(|name| root.join(name));
        for directory in [&images.join("versions"), &kernels, &vms, &volumes, &snapshots] {
            durable::make_dir(directory)?;
        }
        let lock = lock_store(&images)?;
        for directory in [&images, &kernels, &vms] {
            durable::clear_temporary(directory)?;
        }
        let incoming = Incoming::open(&images)?;
        incoming.remove_stale(STALE_AFTER)?;
        let store = Self {
            root: root.to_owned(),
            images,
            kernels,
            vms,
            snapshots,
            drafts: snapshots::Drafts::default(),
            incoming,
            pools: Pools::open(root)?,
            locks: Locks::default(),
            _lock: lock,
        };
        store.add_pool(local_pool(), volumes)?;
        store.remove_partial_snapshots()?;
        Ok(store)
    }

    /// Which of these blocks have to be sent: neither uploaded nor part of a stored image or kernel. Each is named once, in the
    /// order asked.
    ///
    /// # Errors
    /// When what is stored cannot be read.
    pub fn missing(&self, blocks: &[Digest]) -> Result<Vec<Digest>> {
        let wanted: BTreeSet<Digest> = blocks.iter().copied().collect();
        let _turn = hold(&self.locks.images);
        let missing: BTreeSet<Digest> = self.sources(&wanted)?.missing(&wanted).into_iter().collect();
        let mut named = BTreeSet::new();
        Ok(blocks.iter().filter(|block| missing.contains(block) && named.insert(**block)).copied().collect())
    }

    /// Keeps an uploaded block, compressed as it came, until an import needs it. The same block twice is fine. Blocks survive
    /// a restart of the agent, so that an interrupted upload goes on.
    ///
    /// # Errors
    /// [`StoreError::Block`] when it is no zstd frame of at most 64 KiB with this digest; [`StoreError::NoRoom`].
    pub fn put_block(&self, digest: &Digest, frame: &[u8]) -> Result<()> {
        self.incoming.put(digest, frame)
    }

    /// Removes uploaded blocks that are older than `age` and were never used ([`STALE_AFTER`] is a good age). Gives back how
    /// many. [`Store::open`] does this too.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn remove_stale_blocks(&self, age: Duration) -> Result<u64> {
        let _turn = hold(&self.locks.images);
        self.incoming.remove_stale(age)
    }

    /// The directory that the store is below.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// How much room there is.
    ///
    /// # Errors
    /// Those of statvfs(3).
    pub fn space(&self) -> Result<Space> {
        space_of(&self.root)
    }

    /// Knows where each of these blocks is, as far as it is here.
    fn sources(&self, wanted: &BTreeSet<Digest>) -> Result<Assembler<'_>> {
        let mut stored = Stored::default();
        let rest: BTreeSet<Digest> = wanted.iter().filter(|block| !self.incoming.contains(block)).copied().collect();
        if !rest.is_empty() {
            for image in self.images()? {
                match self.manifest(&image.digest) {
                    Ok(manifest) => stored.note(&image.rootfs, &manifest.rootfs.blocks, &rest)?,
                    Err(error) => tracing::warn!(image = %image.digest.short(), %error, "its blocks are not reused"),
                }
            }
            for kernel in self.kernels()? {
                let Ok(manifest) = self.kernel_manifest(&kernel.digest) else { continue };
                let Some(directory) = kernel.vmlinux.parent() else { continue };
                let before = stored.count();
                for (path, map) in manifest.files() {
                    stored.note(&directory.join(path), map, &rest)?;
                }
                if stored.count() > before {
                    // Who is told that these blocks are here will not send them.
                    self.want_kernel(&kernel.digest)?;
                }
            }
        }
        Ok(Assembler { incoming: &self.incoming, stored })
    }

    /// As [`Store::sources`], when every block is here.
    fn assembler(&self, wanted: &BTreeSet<Digest>) -> Result<Assembler<'_>> {
        let assembler = self.sources(wanted)?;
        let missing = assembler.missing(wanted);
        if missing.is_empty() { Ok(assembler) } else { Err(StoreError::MissingBlocks(missing)) }
    }
}

/// The pool that every store has.
pub const LOCAL_POOL: &str = "local";

/// The name of [`LOCAL_POOL`].
///
/// # Panics
/// Never: it is a name.
pub fn local_pool() -> Name {
    LOCAL_POOL.parse().expect("a constant that is a name")
}

fn space_of(path: &Path) -> Result<Space> {
    let figures = rustix::fs::statvfs(path).map_err(|error| StoreError::io("look at", path)(error.into()))?;
    let bytes = |blocks: u64| blocks.saturating_mul(figures.f_frsize);
    Ok(Space { total: bytes(figures.f_blocks), free: bytes(figures.f_bavail) })
}

fn lock_store(directory: &Path) -> Result<File> {
    let path = directory.join("lock");
    let file = File::create(&path).map_err(StoreError::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::Locked(directory.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(StoreError::io("lock", &path)(source)),
    }
}
