//! Snapshots of volumes: `<pool>/<volume>/snapshots/<name>/{snapshot.json, volume.raw or volume.qcow2}`. Nobody writes to these files.
//!
//! A volume that goes back to one gets a new file, which is first made beside it (`<pool>/<volume>/restore-<operation>/`) and then takes the
//! place of the old one in one step: when `volume.json` says so. What of that was interrupted is finished, or taken back, by
//! [`Pool::settle_restore`].

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use form_types::{Failpoint, Name, OperationId, VolumeFormat, VolumeId, failpoint::reach};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{OpenVolume, Pool, RECORD as VOLUME, Record as VolumeRecord, VolumeEntry, copy_and_compare, file_name, is_blank};
use crate::{
    blocks::read_dir,
    copy::{share, share_or_copy},
    described::{Fault, Kind},
    disks::create,
    durable::{Draft, bury, make_dir, read_json, retire, sync_dir, to_json, write_file},
    error::{Result, StoreError},
    hold, lock,
};

const SNAPSHOTS: &str = "snapshots";
const RECORD: &str = "snapshot.json";
const RESTORE: &str = "restore-";
/// The version is raised with every change of what is in the directory.
const KIND: Kind = Kind { format: "formation-volume-snapshot", version: 1 };

#[derive(Clone, Serialize, Deserialize)]
struct Record {
    format: VolumeFormat,
    /// Of the volume, as a guest saw it.
    size_bytes: u64,
    /// Of the file.
    length: u64,
    /// The agent's.
    details: Value,
}

/// What a volume held at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeSnapshotEntry {
    pub name: Name,
    pub format: VolumeFormat,
    pub path: PathBuf,
    /// Of the volume, as a guest saw it.
    pub size_bytes: u64,
    /// What its file takes. Blocks that it shares with others are counted.
    pub allocated_bytes: u64,
    /// What [`VolumeSnapshotDraft::publish`] was given.
    pub details: Value,
}

/// A snapshot that is being made. Dropped before [`VolumeSnapshotDraft::publish`] it is gone.
pub struct VolumeSnapshotDraft {
    draft: Draft,
    place: PathBuf,
    target: PathBuf,
    pool: PathBuf,
    name: Name,
    entry: VolumeEntry,
    /// Locked against writers, unless one is known to stand still meanwhile.
    source: File,
    copy: File,
}

impl VolumeSnapshotDraft {
    /// Of the volume, as a guest sees it.
    pub const fn size_bytes(&self) -> u64 {
        self.entry.size_bytes
    }

    /// Copies what the volume holds: blocks are shared where the file system can.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`].
    pub fn copy(&self) -> Result<()> {
        share_or_copy(&self.source, &self.copy).map_err(StoreError::io("write", &self.target))
    }

    /// Copies it at once, whatever its size.
    ///
    /// # Errors
    /// [`StoreError::NoSharing`] where the file system cannot; [`StoreError::NoRoom`].
    pub fn share(&self) -> Result<()> {
        match share(&self.source, &self.copy).map_err(StoreError::io("write", &self.target))? {
            Some(()) => Ok(()),
            None => Err(StoreError::NoSharing(self.pool.clone())),
        }
    }

    /// Flushes it, and gives it its name, durably.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`], those of the file system.
    pub fn publish(self, details: Value) -> Result<()> {
        let VolumeEntry { format, size_bytes, .. } = self.entry;
        let length = seal(&self.copy).map_err(StoreError::io("flush", &self.target))?;
        write_record(self.draft.path(), &Record { format, size_bytes, length, details })?;
        reach(Failpoint::VolumeSnapshotDrafted);
        if self.target.exists() {
            return Err(StoreError::VolumeSnapshotExists(self.name));
        }
        make_dir(&self.place.join(SNAPSHOTS))?;
        self.draft.publish(&self.target)?;
        // The directory of the volume's snapshots may be new as well.
        sync_dir(&self.place)?;
        reach(Failpoint::VolumeSnapshotNamed);
        Ok(())
    }
}

/// Puts a file on the disk, for nobody to write to; gives its length.
fn seal(file: &File) -> io::Result<u64> {
    file.set_permissions(Permissions::from_mode(0o400))?;
    file.sync_all()?;
    Ok(file.metadata()?.len())
}

fn write_record(directory: &Path, record: &Record) -> Result<()> {
    let path = directory.join(RECORD);
    write_file(&path, &KIND.write(&path, record)?, 0o400)
}

impl Pool {
    fn snapshot_place(&self, id: &VolumeId, name: &Name) -> PathBuf {
        self.place(id).join(SNAPSHOTS).join(name.as_str())
    }

    /// Whether a copy takes no time here: files of its file system can share blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn shares_blocks(&self) -> Result<bool> {
        self.is_there()?;
        let draft = Draft::new(&self.directory)?;
        let trial = || -> io::Result<bool> {
            let source = draft.path().join("source");
            fs::write(&source, [1; 4096])?;
            Ok(share(&File::open(&source)?, &create(&draft.path().join("copy"))?)?.is_some())
        };
        trial().map_err(StoreError::io("try", &self.directory))
    }

    /// Begins a snapshot of a volume. `stands`: whoever writes to it is kept from that by the caller; else it is locked against writers.
    ///
    /// # Errors
    /// [`StoreError::VolumeSnapshotExists`], [`StoreError::VolumeInUse`] while somebody may write to it, those of [`Pool::volume`].
    pub fn draft_snapshot(&self, id: &VolumeId, name: &Name, stands: bool) -> Result<VolumeSnapshotDraft> {
        let target = self.snapshot_place(id, name);
        if target.exists() {
            return Err(StoreError::VolumeSnapshotExists(name.clone()));
        }
        let (entry, source) = if stands {
            let entry = self.volume(id)?;
            let file = File::open(&entry.path).map_err(StoreError::io("open", &entry.path))?;
            (entry, file)
        } else {
            self.locked(id, false)?
        };
        let draft = Draft::new(&self.directory)?;
        let path = draft.path().join(file_name(entry.format));
        let copy = create(&path).map_err(StoreError::io("write", &path))?;
        let (place, pool) = (self.place(id), self.directory.clone());
        Ok(VolumeSnapshotDraft { draft, place, target, pool, name: name.clone(), entry, source, copy })
    }

    /// Whether nobody may write to a volume now.
    ///
    /// # Errors
    /// Those of [`Pool::volume`], but for [`StoreError::VolumeInUse`].
    pub fn is_at_rest(&self, id: &VolumeId) -> Result<bool> {
        match self.locked(id, false) {
            Ok(_) => Ok(true),
            Err(StoreError::VolumeInUse { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The names of a volume's snapshots, whole or damaged.
    ///
    /// # Errors
    /// When the pool is not there, or the directory cannot be read.
    pub fn snapshots(&self, id: &VolumeId) -> Result<Vec<Name>> {
        if self.marker.is_some() {
            self.is_there()?;
        }
        let directory = self.place(id).join(SNAPSHOTS);
        if !directory.exists() {
            return Ok(Vec::new());
        }
        let mut found: Vec<Name> = read_dir(&directory)?.iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok()).collect();
        found.sort();
        Ok(found)
    }

    /// One snapshot, after a look that nothing of it is missing or cut.
    ///
    /// # Errors
    /// [`StoreError::NoVolumeSnapshot`], [`StoreError::VolumeSnapshotVersion`], [`StoreError::VolumeSnapshotDamaged`].
    pub fn snapshot(&self, id: &VolumeId, name: &Name) -> Result<VolumeSnapshotEntry> {
        if self.marker.is_some() {
            self.is_there()?;
        }
        let directory = self.snapshot_place(id, name);
        if !directory.is_dir() {
            return Err(StoreError::NoVolumeSnapshot(name.clone()));
        }
        let Record { format, size_bytes, length, details } = read_record(&directory, name)?;
        let damaged = |reason: String| StoreError::VolumeSnapshotDamaged { name: name.clone(), reason };
        let file = file_name(format);
        let path = directory.join(file);
        let metadata = fs::metadata(&path).map_err(|error| damaged(format!("{file}: {error}")))?;
        if metadata.len() != length {
            return Err(damaged(format!("{file} is torn: {} bytes of {length}", metadata.len())));
        }
        let allocated_bytes = metadata.blocks().saturating_mul(512);
        Ok(VolumeSnapshotEntry { name: name.clone(), format, path, size_bytes, allocated_bytes, details })
    }

    /// What the snapshots of a volume take. Blocks that they share with it are counted.
    pub fn snapshot_bytes(&self, id: &VolumeId) -> u64 {
        let names = self.snapshots(id).unwrap_or_default();
        names.iter().filter_map(|name| self.snapshot(id, name).ok()).map(|entry| entry.allocated_bytes).fold(0, u64::saturating_add)
    }

    /// Removes a snapshot, also a damaged one.
    ///
    /// # Errors
    /// [`StoreError::NoVolumeSnapshot`], those of the file system.
    pub fn remove_snapshot(&self, id: &VolumeId, name: &Name) -> Result<()> {
        self.is_there()?;
        let path = self.snapshot_place(id, name);
        if !path.exists() {
            return Err(StoreError::NoVolumeSnapshot(name.clone()));
        }
        let grave = Draft::new(&self.directory)?;
        fs::rename(&path, grave.path().join("snapshot")).map_err(StoreError::io("remove", &path))?;
        let parent = self.place(id).join(SNAPSHOTS);
        sync_dir(&parent)?;
        // Fails unless it is empty.
        let _ = fs::remove_dir(parent);
        reach(Failpoint::VolumeSnapshotRetired);
        Ok(())
    }

    /// Makes a volume `new` with what a snapshot of `id` holds.
    ///
    /// # Errors
    /// Those of [`Pool::snapshot`], [`StoreError::VolumeExists`], [`StoreError::NoRoom`].
    pub fn clone_snapshot(&self, id: &VolumeId, name: &Name, new: &VolumeId) -> Result<VolumeEntry> {
        let entry = self.snapshot(id, name)?;
        let source = File::open(&entry.path).map_err(StoreError::io("open", &entry.path))?;
        self.make(new, &VolumeRecord::new(entry.format, entry.size_bytes), |path| {
            let target = create(path)?;
            share_or_copy(&source, &target)?;
            target.sync_all()
        })
    }

    /// Copies the snapshots of a volume to the directory that it has in another pool, and compares them.
    pub(super) fn copy_snapshots(&self, id: &VolumeId, place: &Path) -> Result<()> {
        let names = self.snapshots(id)?;
        for name in &names {
            let entry = self.snapshot(id, name)?;
            let record = read_record(&self.snapshot_place(id, name), name)?;
            let directory = place.join(SNAPSHOTS).join(name.as_str());
            make_dir(&directory)?;
            let path = directory.join(file_name(entry.format));
            let source = File::open(&entry.path).map_err(StoreError::io("open", &entry.path))?;
            copy_and_compare(&source, &path).map_err(StoreError::io("write", &path))?;
            let copy = File::open(&path).map_err(StoreError::io("open", &path))?;
            seal(&copy).map_err(StoreError::io("flush", &path))?;
            write_record(&directory, &record)?;
            sync_dir(&directory)?;
        }
        if names.is_empty() { Ok(()) } else { sync_dir(&place.join(SNAPSHOTS)) }
    }

    fn restore_place(&self, id: &VolumeId, operation: &OperationId) -> PathBuf {
        self.place(id).join(format!("{RESTORE}{operation}"))
    }

    /// Makes what the volume will be when it has gone back to a snapshot, beside it: [`Pool::settle_restore`] puts it in its place.
    ///
    /// # Errors
    /// Those of [`Pool::snapshot`] and [`Pool::volume`], [`StoreError::NoRoom`]. Nothing is left behind then.
    pub fn draft_restore(&self, id: &VolumeId, name: &Name, operation: &OperationId) -> Result<()> {
        let (now, entry) = (self.record(id)?, self.snapshot(id, name)?);
        let record = VolumeRecord { restores: now.restores + 1, ..VolumeRecord::new(entry.format, entry.size_bytes) };
        let draft = Draft::new(&self.directory)?;
        let path = draft.path().join(record.file_name());
        let copy = || {
            let target = create(&path)?;
            share_or_copy(&File::open(&entry.path)?, &target)?;
            target.sync_all()
        };
        copy().map_err(StoreError::io("write", &path))?;
        let path = draft.path().join(VOLUME);
        write_file(&path, &to_json(&path, &record)?, 0o600)?;
        draft.publish(&self.restore_place(id, operation))?;
        reach(Failpoint::VolumeRestoreDrafted);
        Ok(())
    }

    /// Whether [`Pool::draft_restore`] was done for this operation, and nothing since.
    pub fn has_restore(&self, id: &VolumeId, operation: &OperationId) -> bool {
        self.restore_place(id, operation).join(VOLUME).exists()
    }

    /// Opens what [`Pool::draft_restore`] made, locked as [`Pool::open_volume`] locks a volume that is written to. It stays what is open when
    /// [`Pool::settle_held`] makes the volume of it.
    ///
    /// # Errors
    /// When there is none, those of the file system.
    pub fn open_restore(&self, id: &VolumeId, operation: &OperationId) -> Result<OpenVolume> {
        let place = self.restore_place(id, operation);
        let record: VolumeRecord = read_json(&place.join(VOLUME))?;
        let path = place.join(record.file_name());
        let file = File::options().read(true).write(true).open(&path).map_err(StoreError::io("open", &path))?;
        lock::take(&file, &path, true)?;
        let is_blank = is_blank(&file, record.format).map_err(StoreError::io("read", &path))?;
        Ok(OpenVolume { file, format: record.format, size_bytes: record.size_bytes, is_blank })
    }

    /// When a volume's file was last written to.
    ///
    /// # Errors
    /// Those of [`Pool::volume`].
    pub fn written_at(&self, id: &VolumeId) -> Result<SystemTime> {
        let entry = self.volume(id)?;
        fs::metadata(&entry.path).and_then(|metadata| metadata.modified()).map_err(StoreError::io("read", &entry.path))
    }

    /// Takes a restore back that the state does not know of.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn drop_restore(&self, id: &VolumeId, operation: &OperationId) -> Result<()> {
        retire(&self.restore_place(id, operation), &self.directory)
    }

    /// What of restores is not done with: drafts, and files that were the volume's before.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn unsettled(&self, id: &VolumeId) -> Result<Vec<PathBuf>> {
        if self.mount.is_some() {
            self.is_there()?;
        }
        let place = self.place(id);
        if !place.exists() {
            return Ok(Vec::new());
        }
        let current = self.record(id).ok().map(|record| record.file_name());
        let is_left = |path: &PathBuf| {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
            let of_a_volume = name.starts_with("volume") && (name.ends_with(".raw") || name.ends_with(".qcow2"));
            let replaced = current.as_ref().is_some_and(|current| place.join(current).exists() && name != current);
            name.starts_with(RESTORE) || (of_a_volume && replaced)
        };
        Ok(read_dir(&place)?.into_iter().filter(is_left).collect())
    }

    /// Finishes the restore that the state knows of (`wanted`), and takes every other one back. That there is none is fine. Whoever calls sees
    /// to it that nobody opens the volume meanwhile.
    ///
    /// # Errors
    /// [`StoreError::VolumeInUse`]; those of the file system. Then it can be done again.
    pub fn settle_restore(&self, id: &VolumeId, wanted: Option<&OperationId>) -> Result<()> {
        self.is_there()?;
        if self.unsettled(id)?.is_empty() {
            return Ok(());
        }
        let held = self.hold(id)?;
        self.settle_held(held, wanted)
    }

    /// As [`Pool::settle_restore`], of a volume that is held already.
    ///
    /// # Errors
    /// As [`Pool::settle_restore`].
    pub fn settle_held(&self, held: super::Hold, wanted: Option<&OperationId>) -> Result<()> {
        let _turn = hold(&self.turn);
        let id = &held.id;
        let place = self.place(id);
        if let Some(draft) = wanted.map(|operation| self.restore_place(id, operation)).filter(|draft| draft.join(VOLUME).exists()) {
            let next: VolumeRecord = read_json(&draft.join(VOLUME))?;
            let rename = |file: &str| {
                let target = place.join(file);
                fs::rename(draft.join(file), &target).map_err(StoreError::io("write", &target))?;
                sync_dir(&place)
            };
            // An earlier try may have come so far.
            if draft.join(next.file_name()).exists() {
                rename(&next.file_name())?;
            }
            reach(Failpoint::VolumeRestoreMoved);
            rename(VOLUME)?;
            reach(Failpoint::VolumeRestoreSwitched);
        }
        let graves: Vec<Draft> = self.unsettled(id)?.iter().map(|path| bury(path, &self.directory)).collect::<Result<_>>()?;
        // One of them may be what was locked.
        drop(held);
        drop(graves);
        Ok(())
    }
}

/// Whether there are any in the directory of a volume.
pub(super) fn are_in(place: &Path) -> bool {
    read_dir(&place.join(SNAPSHOTS)).is_ok_and(|found| !found.is_empty())
}

fn read_record(directory: &Path, name: &Name) -> Result<Record> {
    let damaged = |reason: String| StoreError::VolumeSnapshotDamaged { name: name.clone(), reason };
    let text = fs::read(directory.join(RECORD)).map_err(|error| damaged(format!("{RECORD}: {error}")))?;
    KIND.read(RECORD, &text).map_err(|fault| match fault {
        Fault::Version(found) => StoreError::VolumeSnapshotVersion { name: name.clone(), found, known: KIND.version },
        Fault::Damaged(reason) => damaged(reason),
    })
}
