//! Snapshots of VMs: `<root>/snapshots/<vm>/<name>/{snapshot.json,disk.raw or disk.qcow2}`, and `state` and `memory` of a VM that ran, or
//! `memory.compressed` ([`crate::compressed`]).
//!
//! One that is being made or removed is called `<name>.part`, which is no name that anybody could give.
//!
//! `snapshot.json` is as [`crate::described`] says. Its version covers what is in the directory; `state` and `memory` have versions and checksums of their own.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use form_types::{Digest, Failpoint, Name, VmId, failpoint::reach};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Store,
    blocks::read_dir,
    compressed::Unfolded,
    copy::{share, share_or_copy},
    described::{Fault, Kind},
    disks::{self, DISK, DiskFiles, DiskFormat, create, file_name},
    durable::{Draft, Seal, make_dir, remove_tree, retire, sync_dir, to_json, write_file},
    error::{Result, StoreError},
};

mod memory;

/// The version is raised with every change of what is in the directory.
const KIND: Kind = Kind { format: "formation-snapshot", version: 1 };
/// Of one whose memory is compressed; earlier releases read the other kind alone.
const COMPRESSED: Kind = Kind { format: "formation-snapshot", version: 2 };
const RECORD: &str = "snapshot.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const COMPRESSED_MEMORY: &str = "memory.compressed";
const PART: &str = ".part";

#[derive(Serialize, Deserialize)]
struct Record {
    /// None of a VM without a root disk.
    disk: Option<disks::Record>,
    /// Of the disk's file, in bytes.
    disk_length: u64,
    /// Of the files of state and memory, in bytes; none when the VM did not run.
    saved: Option<(u64, u64)>,
    /// Of the file of memory; none of a snapshot that an earlier release made.
    #[serde(default)]
    memory_seal: Option<Seal>,
    /// When the file of memory is compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    compressed: Option<Unfolded>,
    /// The agent's.
    details: Value,
}

impl Record {
    const fn kind(&self) -> &'static Kind {
        if self.compressed.is_some() { &COMPRESSED } else { &KIND }
    }

    const fn memory(&self) -> &'static str {
        if self.compressed.is_some() { COMPRESSED_MEMORY } else { MEMORY }
    }

    /// Its files beside the record and that of memory.
    fn others(&self) -> impl Iterator<Item = &'static str> {
        self.disk.as_ref().map(|disk| file_name(disk.format)).into_iter().chain(self.saved.map(|_| STATE))
    }
}

/// The snapshots that are being made now, by their directories.
#[derive(Clone, Default)]
pub(crate) struct Drafts(Arc<Mutex<BTreeSet<PathBuf>>>);

impl Drafts {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a VM process wrote, in two files that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedMemory {
    pub state: PathBuf,
    pub memory: PathBuf,
    /// Somebody wrote to the file of memory, or it is a copy: its checksums tell whether it holds the same.
    pub is_touched: bool,
    /// When it is compressed.
    pub compressed: Option<Unfolded>,
}

/// A snapshot that is whole.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotEntry {
    pub name: Name,
    /// How the disk is kept, and the image that it was made from. None of a VM without a root disk.
    pub disk: Option<(DiskFormat, Digest)>,
    /// Of the disk, as the guest sees it.
    pub disk_bytes: u64,
    /// Of a VM that ran.
    pub saved: Option<SavedMemory>,
    /// What all its files take.
    pub allocated_bytes: u64,
    /// What [`SnapshotDraft::publish`] was given.
    pub details: Value,
}

impl SnapshotEntry {
    /// Whether its disk is worth nothing without this image.
    pub(crate) fn overlays(&self, image: &Digest) -> bool {
        self.disk == Some((DiskFormat::Qcow2, *image))
    }
}

/// A snapshot that is being made. Dropped before [`SnapshotDraft::publish`] it is gone.
pub struct SnapshotDraft {
    path: PathBuf,
    target: PathBuf,
    drafts: Drafts,
    disk: Option<(disks::Record, File)>,
    is_without_disk: bool,
    saved: Option<(File, File)>,
}

impl SnapshotDraft {
    /// Empty files for what a VM process writes: its state and its memory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create_saved(&mut self) -> Result<(&File, &File)> {
        let make = |name: &str| {
            let path = self.path.join(name);
            create(&path).map_err(StoreError::io("write", &path))
        };
        let files = (make(STATE)?, make(MEMORY)?);
        let (state, memory) = self.saved.insert(files);
        Ok((state, memory))
    }

    /// Whether the file system of snapshots can have files share blocks. Call [`SnapshotDraft::create_saved`] before.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn can_share(&self) -> Result<bool> {
        let Some((state, memory)) = &self.saved else { return Ok(false) };
        // Both are empty still.
        Ok(share(state, memory).map_err(StoreError::io("write", self.path.join(MEMORY)))?.is_some())
    }

    /// Makes the file for memory, which is empty, a copy of another snapshot's, with which it shares its blocks until they are written to. False
    /// when the file system cannot.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`].
    pub fn share_memory(&self, earlier: &File) -> Result<bool> {
        let Some((_, memory)) = &self.saved else { return Ok(false) };
        Ok(share(earlier, memory).map_err(StoreError::io("write", self.path.join(MEMORY)))?.is_some())
    }

    /// What [`SnapshotDraft::create_saved`] made.
    pub fn saved(&self) -> Option<(&File, &File)> {
        self.saved.as_ref().map(|(state, memory)| (state, memory))
    }

    /// Copies the root disk of `vm`, which nobody may write to meanwhile, if it has one. It is not flushed yet: [`SnapshotDraft::publish`]
    /// does that.
    ///
    /// # Errors
    /// [`StoreError::NoDisk`], [`StoreError::NoRoom`].
    pub fn copy_disk(&mut self, store: &Store, vm: &VmId) -> Result<()> {
        if self.is_without_disk {
            return Ok(());
        }
        let record = store.disk_record(vm)?;
        let (source, path) = (store.disk_dir(vm).join(file_name(record.format)), self.path.join(file_name(record.format)));
        let file = File::open(&source).map_err(StoreError::io("read", &source))?;
        let copy = create(&path).map_err(StoreError::io("write", &path))?;
        share_or_copy(&file, &copy).map_err(StoreError::io("write", &path))?;
        self.disk = Some((record, copy));
        Ok(())
    }

    /// The VM has no root disk.
    pub const fn has_no_disk(&mut self) {
        self.is_without_disk = true;
    }

    /// Flushes everything, and gives the snapshot its name, durably.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`]; [`StoreError::SnapshotDamaged`] when no disk was copied.
    pub fn publish(self, details: Value) -> Result<()> {
        let length = |file: &File, name: &str| {
            let flushed = file.sync_all().and_then(|()| file.metadata());
            flushed.map(|metadata| metadata.len()).map_err(StoreError::io("flush", self.path.join(name)))
        };
        if self.disk.is_none() && !self.is_without_disk {
            return Err(damaged(&self.target, "it has no disk"));
        }
        let saved = match &self.saved {
            Some((state, memory)) => Some((length(state, STATE)?, length(memory, MEMORY)?)),
            None => None,
        };
        let memory_seal = saved.map(|_| Seal::of(&self.path.join(MEMORY))).transpose()?;
        let disk_length = self.disk.as_ref().map_or(Ok(0), |(disk, file)| length(file, file_name(disk.format)))?;
        let disk = self.disk.as_ref().map(|(disk, _)| disk.clone());
        let record = Record { disk, disk_length, saved, memory_seal, compressed: None, details };
        self.name(&record)
    }

    fn write_record(&self, record: &Record) -> Result<()> {
        let path = self.path.join(RECORD);
        let text = record.kind().write(&path, record)?;
        write_file(&path, &text, 0o600)?;
        sync_dir(&self.path)
    }

    /// Writes the record, and gives the snapshot its name, durably.
    fn name(mut self, record: &Record) -> Result<()> {
        self.write_record(record)?;
        reach(Failpoint::SnapshotDrafted);
        fs::rename(&self.path, &self.target).map_err(StoreError::io("name", &self.target))?;
        self.drafts.lock().remove(&self.path);
        self.path.clear();
        let parent = self.target.parent().unwrap_or(&self.target);
        sync_dir(parent)?;
        // The VM's own directory may be new as well.
        parent.parent().map_or(Ok(()), sync_dir)
    }
}

impl Drop for SnapshotDraft {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        if let Err(error) = remove_tree(&self.path) {
            tracing::warn!(%error, "a half-made snapshot stays until the next start, or `form doctor --fix`");
        }
        // Fails unless it is empty.
        let _ = self.path.parent().map(fs::remove_dir);
        self.drafts.lock().remove(&self.path);
    }
}

/// The disk that a VM goes back to, until it takes the place of the one that it has. Dropped before it is gone.
pub struct RestoredDisk {
    draft: Draft,
    pub files: DiskFiles,
}

impl RestoredDisk {
    /// Puts it in the place of the VM's disk, in one step; that one is removed. Files that are open stay open.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn publish(self, store: &Store, vm: &VmId) -> Result<()> {
        let target = store.disk_dir(vm);
        if !target.exists() {
            return self.draft.publish(&target);
        }
        sync_dir(self.draft.path())?;
        match renameat_with(CWD, self.draft.path(), CWD, &target, RenameFlags::EXCHANGE) {
            Ok(()) => target.parent().map_or(Ok(()), sync_dir),
            // A file system that cannot exchange: for a moment there is none, and whoever is interrupted then begins anew.
            Err(_) => {
                retire(&target, &store.vms)?;
                self.draft.publish(&target)
            }
        }
    }
}

fn damaged(directory: &Path, reason: impl Into<String>) -> StoreError {
    let text = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match text.parse() {
        Ok(name) => StoreError::SnapshotDamaged { name, reason: reason.into() },
        Err(_) => StoreError::Damaged { what: directory.display().to_string(), reason: reason.into() },
    }
}

fn is_partial(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.ends_with(PART))
}

impl Store {
    fn snapshots_of(&self, vm: &VmId) -> PathBuf {
        self.snapshots.join(vm.to_string())
    }

    /// Begins a snapshot of `vm`.
    ///
    /// # Errors
    /// [`StoreError::SnapshotExists`], also while one of this name is being made.
    pub fn draft_snapshot(&self, vm: &VmId, name: &Name) -> Result<SnapshotDraft> {
        let target = self.snapshots_of(vm).join(name.as_str());
        if target.exists() {
            return Err(StoreError::SnapshotExists(name.clone()));
        }
        self.draft(vm, name, target)
    }

    /// Beside `target`, which may be there.
    fn draft(&self, vm: &VmId, name: &Name, target: PathBuf) -> Result<SnapshotDraft> {
        let path = self.snapshots_of(vm).join(format!("{name}{PART}"));
        if !self.drafts.lock().insert(path.clone()) {
            return Err(StoreError::SnapshotExists(name.clone()));
        }
        let draft = SnapshotDraft { path, target, drafts: self.drafts.clone(), disk: None, is_without_disk: false, saved: None };
        // What an earlier try left.
        remove_tree(&draft.path)?;
        make_dir(&draft.path)?;
        Ok(draft)
    }

    /// The names of the snapshots of `vm`, whole or damaged.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn snapshots(&self, vm: &VmId) -> Result<Vec<Name>> {
        let directory = self.snapshots_of(vm);
        if !directory.exists() {
            return Ok(Vec::new());
        }
        let mut found: Vec<Name> = read_dir(&directory)?.iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok()).collect();
        found.sort();
        Ok(found)
    }

    /// The VMs of which there is something here, half-made snapshots included.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn vms_with_snapshots(&self) -> Result<Vec<VmId>> {
        Ok(read_dir(&self.snapshots)?.iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok()).collect())
    }

    /// One snapshot, after a look that nothing of it is missing or cut.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`], [`StoreError::SnapshotVersion`], [`StoreError::SnapshotDamaged`].
    pub fn snapshot(&self, vm: &VmId, name: &Name) -> Result<SnapshotEntry> {
        let directory = self.snapshots_of(vm).join(name.as_str());
        if !directory.is_dir() {
            return Err(StoreError::NoSnapshot(name.clone()));
        }
        let mut record = read_record(&directory, name)?;
        loop {
            let entry = look(&directory, name, &record);
            // Its memory may have been compressed just now, which is done once.
            match entry.is_err().then(|| read_record(&directory, name)) {
                Some(Ok(now)) if now.compressed != record.compressed => record = now,
                _ => return entry,
            }
        }
    }

    /// Makes a copy of a snapshot's disk, for [`RestoredDisk::publish`]. None when it has none.
    ///
    /// # Errors
    /// Those of [`Store::snapshot`], [`StoreError::NoRoom`], [`StoreError::Damaged`] when the image below the disk is not as it was sealed.
    pub fn restore_disk(&self, vm: &VmId, name: &Name) -> Result<Option<RestoredDisk>> {
        self.snapshot(vm, name)?;
        let directory = self.snapshots_of(vm).join(name.as_str());
        let Some(record) = read_record(&directory, name)?.disk else { return Ok(None) };
        if record.format == DiskFormat::Qcow2 {
            self.check_sealed(&record.image)?;
        }
        let draft = Draft::new(&self.vms)?;
        let (source, path) = (directory.join(file_name(record.format)), draft.path().join(file_name(record.format)));
        let file = File::open(&source).map_err(StoreError::io("read", &source))?;
        let copy = create(&path).map_err(StoreError::io("write", &path))?;
        share_or_copy(&file, &copy).and_then(|()| copy.sync_all()).map_err(StoreError::io("write", &path))?;
        let entry = draft.path().join(DISK);
        write_file(&entry, &to_json(&entry, &record)?, 0o600)?;
        let files = self.disk_files_in(draft.path(), record);
        Ok(Some(RestoredDisk { draft, files }))
    }

    /// Gives `to` the snapshot `name` of `from` under the same name, with details of its own. Its files are one and the same, and are
    /// never written to.
    ///
    /// # Errors
    /// Those of [`Store::snapshot`] and [`Store::draft_snapshot`], those of the file system.
    pub fn share_snapshot(&self, from: &VmId, name: &Name, to: &VmId, details: Value) -> Result<()> {
        self.snapshot(from, name)?;
        let source = self.snapshots_of(from).join(name.as_str());
        let mut record = read_record(&source, name)?;
        loop {
            let draft = self.draft_snapshot(to, name)?;
            let files: Vec<&str> = record.others().chain(record.saved.map(|_| record.memory())).collect();
            let Err(error) = files.into_iter().try_for_each(|file| link(&source, &draft.path, file)) else {
                return draft.name(&Record { details, ..record });
            };
            // The snapshot may be removed just now, or its memory compressed, which is done once.
            match read_record(&source, name) {
                Ok(now) if now.compressed != record.compressed => record = now,
                _ => return Err(error),
            }
        }
    }

    /// Removes a snapshot, also a damaged one. A VM that was restored from it and runs keeps what it has of it.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`], those of the file system.
    pub fn remove_snapshot(&self, vm: &VmId, name: &Name) -> Result<()> {
        let parent = self.snapshots_of(vm);
        let (path, part) = (parent.join(name.as_str()), parent.join(format!("{name}{PART}")));
        if !path.exists() {
            return Err(StoreError::NoSnapshot(name.clone()));
        }
        remove_tree(&part)?;
        fs::rename(&path, &part).map_err(StoreError::io("remove", &path))?;
        sync_dir(&parent)?;
        reach(Failpoint::SnapshotRetired);
        remove_tree(&part)?;
        // Fails unless it is empty.
        let _ = fs::remove_dir(parent);
        Ok(())
    }

    /// Removes everything of a VM; that there is nothing is fine.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_snapshots(&self, vm: &VmId) -> Result<()> {
        remove_tree(&self.snapshots_of(vm))
    }

    /// What is left of snapshots that nobody is making.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn partial_snapshots(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for vm in self.vms_with_snapshots()? {
            let drafts = self.drafts.lock();
            found.extend(read_dir(&self.snapshots_of(&vm))?.into_iter().filter(|path| is_partial(path) && !drafts.contains(path)));
        }
        Ok(found)
    }

    /// Removes it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_partial_snapshots(&self) -> Result<()> {
        for path in self.partial_snapshots()? {
            remove_tree(&path)?;
            // Fails unless it is empty.
            let _ = path.parent().map(fs::remove_dir);
        }
        Ok(())
    }
}

/// Gives a file a second name, in the directory `to`.
fn link(from: &Path, to: &Path, file: &str) -> Result<()> {
    fs::hard_link(from.join(file), to.join(file)).map_err(StoreError::io("share", from.join(file)))
}

/// What is in `directory`, of which nothing may be missing or cut.
fn look(directory: &Path, name: &Name, record: &Record) -> Result<SnapshotEntry> {
    let mut allocated_bytes = 0;
    let mut check = |file: &str, expected: u64| {
        let path = directory.join(file);
        let metadata = fs::metadata(&path).map_err(|error| damaged(directory, format!("{file}: {error}")))?;
        if metadata.len() != expected {
            return Err(damaged(directory, format!("{file} is torn: {} bytes of {expected}", metadata.len())));
        }
        allocated_bytes += metadata.blocks().saturating_mul(512);
        Ok(path)
    };
    if let Some(disk) = &record.disk {
        check(file_name(disk.format), record.disk_length)?;
    }
    let saved = match record.saved {
        Some((state, memory)) => {
            let (state, memory) = (check(STATE, state)?, check(record.memory(), memory)?);
            let is_touched = record.memory_seal.map_or(Ok(false), |seal| seal.has_same_bytes(&memory).map(|same| !same))?;
            Some(SavedMemory { state, memory, is_touched, compressed: record.compressed })
        }
        None => None,
    };
    Ok(SnapshotEntry {
        name: name.clone(),
        disk: record.disk.as_ref().map(|disk| (disk.format, disk.image)),
        disk_bytes: record.disk.as_ref().map_or(0, |disk| disk.size_bytes),
        saved,
        allocated_bytes,
        details: record.details.clone(),
    })
}

fn read_record(directory: &Path, name: &Name) -> Result<Record> {
    let path = directory.join(RECORD);
    let text = fs::read(&path).map_err(|error| damaged(directory, format!("{RECORD}: {error}")))?;
    let read = match KIND.read(RECORD, &text) {
        Err(Fault::Version(found)) if found == COMPRESSED.version => COMPRESSED.read(RECORD, &text),
        read => read,
    };
    let record: Record = read.map_err(|fault| match fault {
        Fault::Version(found) => StoreError::SnapshotVersion { name: name.clone(), found, known: COMPRESSED.version },
        Fault::Damaged(reason) => damaged(directory, reason),
    })?;
    Ok(record)
}
