//! Pools and the volumes in them: `<pool>/<id>/{volume.json, volume.raw or volume.qcow2}`, and what belongs to a volume beside these (`snapshots`).
//!
//! What was made here is also noted beside the store, so that a volume whose file is gone (its pool is not mounted) is never taken for
//! one that was not made yet, and made anew.

mod snapshots;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError},
};

use form_types::{Failpoint, Name, VolumeFormat, VolumeId, failpoint::reach, volume};
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping,
    file::File as ImageFile,
    format::{PreallocateMode, drivers::FormatDriverInstance},
    qcow2::Qcow2,
};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::{
    Space,
    blocks::read_dir,
    contents::Contents,
    copy::{same, share_or_copy},
    disks::create,
    durable::{Draft, bury, clear_temporary, make_dir, read_json, replace_file, retire, sync_dir, to_json, write_file},
    error::{Result, StoreError},
    hold, lock,
    nfs::{NfsExport, NfsMount},
    pools::{Marker, PoolSettings},
    space_of,
};
pub use snapshots::{VolumeSnapshotDraft, VolumeSnapshotEntry};

const RECORD: &str = "volume.json";

/// A directory that volumes live in.
pub struct Pool {
    name: Name,
    directory: PathBuf,
    /// Names of the volumes that were made in it by this store.
    made: PathBuf,
    /// Which the directory has to bear; none in pools that were not made by [`crate::Store::create_pool`].
    marker: Option<Marker>,
    /// What is mounted in the directory; none in pools of directories that the agent finds as they are.
    mount: Option<NfsMount>,
    settings: RwLock<PoolSettings>,
    /// Held while something is made in it or taken from it. True: it was removed.
    retired: RwLock<bool>,
    /// Changes take turns.
    turn: Mutex<()>,
}

/// A volume as it is on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeEntry {
    pub id: VolumeId,
    pub format: VolumeFormat,
    pub path: PathBuf,
    /// What a guest sees.
    pub size_bytes: u64,
    /// What its file takes of the pool.
    pub allocated_bytes: u64,
}

/// A volume that nobody else can write to as long as the file, or a copy of its descriptor, is open.
#[derive(Debug)]
pub struct OpenVolume {
    pub file: File,
    pub format: VolumeFormat,
    pub size_bytes: u64,
    /// Nothing was ever written to it, or all of it was discarded.
    pub is_blank: bool,
}

/// A volume that nobody has open, and that nobody else can open as long as this lives.
#[derive(Debug)]
pub struct Hold {
    id: VolumeId,
    /// None when there is no whole file to lock.
    _locked: Option<File>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    format: VolumeFormat,
    size_bytes: u64,
    /// How often the volume has gone back to a snapshot: each time it gets another file, and this record alone says which one it is.
    #[serde(default, skip_serializing_if = "is_zero")]
    restores: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Record {
    const fn new(format: VolumeFormat, size_bytes: u64) -> Self {
        Self { format, size_bytes, restores: 0 }
    }

    /// The name of the file with the volume's bytes.
    fn file_name(&self) -> String {
        match self.restores {
            0 => file_name(self.format).to_owned(),
            restores => format!("volume-{restores}.{}", self.format.as_str()),
        }
    }
}

impl Pool {
    /// Opens the pool in `directory`, and removes what a killed agent left half made.
    pub(crate) fn open(name: Name, directory: PathBuf, made: PathBuf, marker: Option<Marker>, settings: PoolSettings) -> Result<Self> {
        let pool = Self::of(name, directory, made, marker, settings)?;
        // One that is not there now may be mounted later.
        if pool.is_there().is_ok() {
            clear_temporary(&pool.directory)?;
        }
        Ok(pool)
    }

    /// A pool on what `mount` mounts, which clears up by itself: its server is not waited for.
    pub(crate) fn mounted(
        name: Name,
        directory: PathBuf,
        made: PathBuf,
        marker: Marker,
        settings: PoolSettings,
        mount: NfsMount,
    ) -> Result<Self> {
        Ok(Self { mount: Some(mount), ..Self::of(name, directory, made, Some(marker), settings)? })
    }

    fn of(name: Name, directory: PathBuf, made: PathBuf, marker: Option<Marker>, settings: PoolSettings) -> Result<Self> {
        make_dir(&made)?;
        clear_temporary(&made)?;
        let (settings, retired, turn) = (RwLock::new(settings), RwLock::default(), Mutex::default());
        Ok(Self { name, directory, made, marker, mount: None, settings, retired, turn })
    }

    pub const fn name(&self) -> &Name {
        &self.name
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) const fn marker(&self) -> Option<&Marker> {
        self.marker.as_ref()
    }

    pub(crate) const fn mount(&self) -> Option<&NfsMount> {
        self.mount.as_ref()
    }

    /// The NFS export that it is.
    pub fn export(&self) -> Option<&NfsExport> {
        self.mount.as_ref().map(NfsMount::export)
    }

    /// Whether it was made by [`crate::Store::create_pool`] or [`crate::Store::create_nfs_pool`], and so can be removed.
    pub const fn was_made(&self) -> bool {
        self.marker.is_some()
    }

    pub fn settings(&self) -> PoolSettings {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, settings: PoolSettings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// Keeps the pool from being removed for as long as the guard lives: whoever makes something in it holds one.
    ///
    /// # Errors
    /// [`StoreError::NoPool`] when it was removed just now.
    pub fn enter(&self) -> Result<RwLockReadGuard<'_, bool>> {
        let retired = self.retired.read().unwrap_or_else(PoisonError::into_inner);
        if *retired { Err(StoreError::NoPool(self.name.clone())) } else { Ok(retired) }
    }

    /// To retire it, when nobody makes anything in it.
    pub(crate) fn alone(&self) -> Option<RwLockWriteGuard<'_, bool>> {
        match self.retired.try_write() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// # Errors
    /// When the pool is not there, or cannot be asked.
    pub fn space(&self) -> Result<Space> {
        self.is_there()?;
        space_of(&self.directory)
    }

    fn place(&self, id: &VolumeId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn file(&self, id: &VolumeId, record: &Record) -> PathBuf {
        self.place(id).join(record.file_name())
    }

    fn mark(&self, id: &VolumeId) -> PathBuf {
        self.made.join(id.to_string())
    }

    fn record(&self, id: &VolumeId) -> Result<Record> {
        if self.marker.is_some() {
            self.is_there()?;
        }
        let path = self.place(id).join(RECORD);
        match path.try_exists() {
            Ok(true) => read_json(&path),
            Ok(false) if self.mark(id).exists() => Err(StoreError::VolumeGone { id: *id, path: self.place(id) }),
            Ok(false) => Err(StoreError::NoVolume(*id)),
            Err(source) => Err(StoreError::io("look at", &path)(source)),
        }
    }

    /// Whether the pool's file system has files of this size. A volume never becomes smaller, so that is to be known before one is promised.
    ///
    /// # Errors
    /// [`StoreError::VolumeTooLarge`], and those of the file system.
    pub fn can_hold(&self, format: VolumeFormat, size_bytes: u64) -> Result<()> {
        if format != VolumeFormat::Raw {
            return Ok(());
        }
        self.is_there()?;
        let draft = Draft::new(&self.directory)?;
        let path = draft.path().join("size");
        match create(&path).and_then(|file| file.set_len(size_bytes)) {
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                Err(StoreError::VolumeTooLarge { pool: self.directory.clone(), size_bytes })
            }
            tried => tried.map_err(StoreError::io("try", &path)),
        }
    }

    /// Makes an empty volume.
    ///
    /// # Errors
    /// [`StoreError::VolumeExists`], [`StoreError::VolumeGone`], [`StoreError::VolumeSize`], [`StoreError::NoRoom`]. Nothing is left
    /// behind then.
    pub fn create(&self, id: &VolumeId, format: VolumeFormat, size_bytes: u64) -> Result<VolumeEntry> {
        volume::check_size(size_bytes)?;
        self.make(id, &Record::new(format, size_bytes), |path| create_empty(path, format, size_bytes)?.sync_all())
    }

    /// Makes a volume that holds what `fill` writes to it.
    ///
    /// # Errors
    /// As [`Pool::create`], and what `fill` fails with.
    pub fn create_filled(
        &self,
        id: &VolumeId,
        format: VolumeFormat,
        size_bytes: u64,
        fill: impl FnOnce(&Contents) -> io::Result<()>,
    ) -> Result<VolumeEntry> {
        volume::check_size(size_bytes)?;
        self.make(id, &Record::new(format, size_bytes), |path| {
            let contents = Contents::of_file(create_empty(path, format, size_bytes)?, format, size_bytes, true)?;
            fill(&contents)?;
            contents.finish()
        })
    }

    /// Makes what is not there yet. A volume that was made before and is gone is an error, never made anew.
    ///
    /// # Errors
    /// As [`Pool::create`].
    pub fn ensure(&self, id: &VolumeId, format: VolumeFormat, size_bytes: u64) -> Result<VolumeEntry> {
        match self.volume(id) {
            Ok(entry) => {
                self.note(id)?;
                Ok(entry)
            }
            Err(StoreError::NoVolume(_)) => self.create(id, format, size_bytes),
            Err(error) => Err(error),
        }
    }

    fn is_new(&self, id: &VolumeId) -> Result<()> {
        match self.record(id) {
            Err(StoreError::NoVolume(_)) => Ok(()),
            Ok(_) => Err(StoreError::VolumeExists(*id)),
            Err(error) => Err(error),
        }
    }

    /// Whether the pool is what its directory shows now. Of an NFS pool whose server does not answer that is known after three seconds at most.
    ///
    /// # Errors
    /// [`StoreError::PoolAway`], [`StoreError::PoolSilent`], [`StoreError::PoolMount`], or that its directory cannot be found.
    pub fn is_there(&self) -> Result<()> {
        if let Some(mount) = &self.mount {
            mount.check()?;
        }
        if let Some(marker) = &self.marker {
            return marker.check(&self.directory);
        }
        if self.directory.is_dir() {
            return Ok(());
        }
        Err(StoreError::io("find the pool's directory", &self.directory)(io::ErrorKind::NotFound.into()))
    }

    fn make(&self, id: &VolumeId, record: &Record, write: impl FnOnce(&Path) -> io::Result<()>) -> Result<VolumeEntry> {
        self.make_with(id, record, write, |_| Ok(()))
    }

    /// As `make`, with what else belongs to the volume: `more` is given its directory.
    fn make_with(
        &self,
        id: &VolumeId,
        record: &Record,
        write: impl FnOnce(&Path) -> io::Result<()>,
        more: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<VolumeEntry> {
        self.is_new(id)?;
        self.is_there()?;
        let draft = Draft::new(&self.directory)?;
        let path = draft.path().join(record.file_name());
        write(&path).map_err(StoreError::io("write", &path))?;
        let entry = draft.path().join(RECORD);
        write_file(&entry, &to_json(&entry, record)?, 0o600)?;
        more(draft.path())?;
        reach(Failpoint::VolumeDrafted);
        // What took long is done: the others' turn comes soon.
        let _turn = hold(&self.turn);
        self.is_new(id)?;
        draft.publish(&self.place(id))?;
        reach(Failpoint::VolumeNamed);
        if let Err(error) = self.note(id) {
            // Nobody has it yet, and the caller is told that there is none.
            retire(&self.place(id), &self.directory)?;
            return Err(error);
        }
        self.volume(id)
    }

    /// Notes that it was made.
    fn note(&self, id: &VolumeId) -> Result<()> {
        let mark = self.mark(id);
        if mark.exists() {
            return Ok(());
        }
        write_file(&mark, b"", 0o600)?;
        sync_dir(&self.made)
    }

    /// # Errors
    /// [`StoreError::NoVolume`], [`StoreError::VolumeGone`].
    pub fn volume(&self, id: &VolumeId) -> Result<VolumeEntry> {
        let record = self.record(id)?;
        let (path, Record { format, size_bytes, .. }) = (self.file(id, &record), record);
        let meta = match fs::metadata(&path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StoreError::VolumeGone { id: *id, path }),
            Err(error) => return Err(StoreError::io("look at", &path)(error)),
        };
        if format == VolumeFormat::Raw && meta.len() < size_bytes {
            let reason = format!("it has {} of its {size_bytes} bytes", meta.len());
            return Err(StoreError::Damaged { what: path.display().to_string(), reason });
        }
        Ok(VolumeEntry { id: *id, format, path, size_bytes, allocated_bytes: meta.blocks().saturating_mul(512) })
    }

    /// The volumes that are in the pool, known or not; also one of which there are only snapshots.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn volumes(&self) -> Result<Vec<VolumeId>> {
        if self.marker.is_some() {
            self.is_there()?;
        }
        let named = |path: &PathBuf| path.file_name()?.to_str()?.parse().ok();
        let mut found: Vec<VolumeId> = read_dir(&self.directory)?
            .iter()
            .filter(|path| path.join(RECORD).exists() || snapshots::are_in(path))
            .filter_map(named)
            .collect();
        found.sort();
        Ok(found)
    }

    /// Opens a volume for a VM, and locks it: against everybody when it may be written, else against writers.
    ///
    /// # Errors
    /// [`StoreError::VolumeInUse`], [`StoreError::NoVolume`], [`StoreError::VolumeGone`].
    pub fn open_volume(&self, id: &VolumeId, read_only: bool) -> Result<OpenVolume> {
        Self::opened(self.locked(id, !read_only)?)
    }

    /// Opens a volume for this process, locked as by [`Pool::open_volume`]. Also one that is only read can be made larger: see
    /// [`crate::Contents::grow`].
    ///
    /// # Errors
    /// As [`Pool::open_volume`].
    pub fn open_growable(&self, id: &VolumeId, read_only: bool) -> Result<OpenVolume> {
        let to_write = |path: &Path| File::options().read(true).write(true).open(path);
        let open = |path: &Path| match to_write(path) {
            // What can still be read is read.
            Err(error) if read_only && error.kind() == io::ErrorKind::ReadOnlyFilesystem => File::open(path),
            opened => opened,
        };
        Self::opened(self.locked_by(id, !read_only, open)?)
    }

    fn opened((entry, file): (VolumeEntry, File)) -> Result<OpenVolume> {
        let is_blank = is_blank(&file, entry.format).map_err(StoreError::io("read", &entry.path))?;
        Ok(OpenVolume { file, format: entry.format, size_bytes: entry.size_bytes, is_blank })
    }

    /// The volume's file, locked: against everybody when it is opened for writing, else against writers.
    fn locked(&self, id: &VolumeId, write: bool) -> Result<(VolumeEntry, File)> {
        self.locked_by(id, write, |path| File::options().read(true).write(write).open(path))
    }

    fn locked_by(&self, id: &VolumeId, write: bool, open: impl Fn(&Path) -> io::Result<File>) -> Result<(VolumeEntry, File)> {
        loop {
            let entry = self.volume(id)?;
            let file = open(&entry.path).map_err(StoreError::io("open", &entry.path))?;
            lock::take(&file, &entry.path, write)?;
            let same = |there: &fs::Metadata, here: &fs::Metadata| (there.dev(), there.ino()) == (here.dev(), here.ino());
            // It may have gone back to a snapshot before it was locked, and then has another file.
            if self.volume(id).is_ok_and(|now| now.path == entry.path)
                && let (Ok(there), Ok(here)) = (fs::metadata(&entry.path), file.metadata())
                && same(&there, &here)
            {
                return Ok((entry, file));
            }
        }
    }

    /// Makes a volume that nobody uses larger; that it has the size already is fine. Guests grow what they keep on it when they start.
    ///
    /// # Errors
    /// [`StoreError::VolumeShrinks`], [`StoreError::VolumeInUse`], and those of [`Pool::volume`].
    pub fn grow(&self, id: &VolumeId, size_bytes: u64) -> Result<VolumeEntry> {
        volume::check_size(size_bytes)?;
        let _turn = hold(&self.turn);
        let (entry, before) = (self.volume(id)?, self.record(id)?);
        if size_bytes < entry.size_bytes {
            return Err(StoreError::VolumeShrinks { has: entry.size_bytes, wanted: size_bytes });
        }
        if size_bytes == entry.size_bytes {
            return Ok(entry);
        }
        let file = File::options().read(true).write(true).open(&entry.path).map_err(StoreError::io("open", &entry.path))?;
        lock::take(&file, &entry.path, true)?;
        let grow = || {
            match entry.format {
                VolumeFormat::Raw => file.set_len(size_bytes)?,
                VolumeFormat::Qcow2 => {
                    let storage = ImageFile::try_from(file.try_clone()?)?;
                    let image = Qcow2::<ImageFile>::builder(storage).backing(None).write(true).open(DenyImplicitOpenGate::default())?;
                    // A try that was interrupted may have come so far.
                    if image.size() < size_bytes {
                        image.resize_grow(size_bytes, PreallocateMode::None)?;
                    }
                    image.flush()?;
                }
            }
            file.sync_all()
        };
        grow().map_err(StoreError::io("grow", &entry.path))?;
        reach(Failpoint::VolumeGrown);
        let record = self.place(id).join(RECORD);
        replace_file(&self.directory, &record, &to_json(&record, &Record { size_bytes, ..before })?, 0o600)?;
        self.volume(id)
    }

    /// Writes down that a volume is larger: whoever has it open has made it so.
    ///
    /// # Errors
    /// When there is no such volume, or the record cannot be written.
    pub fn note_grown(&self, id: &VolumeId, size_bytes: u64) -> Result<()> {
        volume::check_size(size_bytes)?;
        let _turn = hold(&self.turn);
        let before = self.record(id)?;
        if size_bytes <= self.volume(id)?.size_bytes {
            return Ok(());
        }
        let record = self.place(id).join(RECORD);
        replace_file(&self.directory, &record, &to_json(&record, &Record { size_bytes, ..before })?, 0o600)
    }

    /// Makes a volume `new` with what `id` holds now: blocks are shared where the file system can, else copied.
    ///
    /// # Errors
    /// [`StoreError::VolumeInUse`] while somebody may write to it, [`StoreError::VolumeExists`], [`StoreError::NoRoom`].
    pub fn clone_volume(&self, id: &VolumeId, new: &VolumeId) -> Result<VolumeEntry> {
        let (entry, source) = self.locked(id, false)?;
        self.make(new, &Record::new(entry.format, entry.size_bytes), |path| {
            let target = create(path)?;
            share_or_copy(&source, &target)?;
            target.sync_all()
        })
    }

    /// Makes the volume `id` of the pool `from` here too, with what it and its snapshots hold, and compares them. Given back is a lock that keeps
    /// everybody from writing to the other: it has to live until this one has taken the other's place. None when the other was never
    /// made: there is nothing to copy.
    ///
    /// # Errors
    /// [`StoreError::VolumeInUse`] while somebody may write to it, [`StoreError::VolumeExists`], [`StoreError::NoRoom`],
    /// [`StoreError::Damaged`] when the copy is not the same. Nothing is left behind then.
    pub fn copy_from(&self, from: &Self, id: &VolumeId) -> Result<Option<Hold>> {
        let (entry, source) = match from.locked(id, false) {
            Ok(locked) => locked,
            Err(StoreError::NoVolume(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let record = Record::new(entry.format, entry.size_bytes);
        let made = self.make_with(id, &record, |path| copy_and_compare(&source, path), |place| from.copy_snapshots(id, place));
        match made {
            Err(StoreError::Io { source, path, .. }) if source.kind() == io::ErrorKind::InvalidData => {
                let reason = "a copy in the other pool is not the same: look at that disk".to_owned();
                Err(StoreError::Damaged { what: path.display().to_string(), reason })
            }
            made => made.map(|_| Some(Hold { id: *id, _locked: Some(source) })),
        }
    }

    /// Keeps everybody else from a volume, for as long as it takes to change who has it or to remove it. One that is damaged, half gone
    /// or was not made yet is nobody's.
    ///
    /// # Errors
    /// [`StoreError::VolumeInUse`]; the pool's directory is not there.
    pub fn hold(&self, id: &VolumeId) -> Result<Hold> {
        self.is_there()?;
        if self.volume(id).is_err() {
            return Ok(Hold { id: *id, _locked: None });
        }
        let (_, file) = self.locked(id, true)?;
        Ok(Hold { id: *id, _locked: Some(file) })
    }

    /// Removes a volume with all it holds, its snapshots too; that there is none is fine.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, held: Hold) -> Result<()> {
        let _turn = hold(&self.turn);
        let id = &held.id;
        // The note first: a crash in between leaves a whole volume, not one that seems to be lost.
        self.forget(id)?;
        reach(Failpoint::VolumeForgotten);
        let grave = bury(&self.place(id), &self.directory)?;
        // Nobody finds it any more; now nobody has it open either.
        drop(held);
        drop(grave);
        Ok(())
    }

    /// Nobody will look for it any more; what is left of it in a pool that comes back is a volume that nobody knows.
    ///
    /// # Errors
    /// Those of the file system that the notes are on, which is the agent's own.
    pub fn forget(&self, id: &VolumeId) -> Result<()> {
        match fs::remove_file(self.mark(id)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", self.mark(id))(source)),
            _ => sync_dir(&self.made),
        }
    }
}

const fn file_name(format: VolumeFormat) -> &'static str {
    match format {
        VolumeFormat::Raw => "volume.raw",
        VolumeFormat::Qcow2 => "volume.qcow2",
    }
}

/// Makes `path` a copy of `source`, on the disk, and reads both.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] when they are not the same; those of the file system.
fn copy_and_compare(source: &File, path: &Path) -> io::Result<()> {
    let target = create(path)?;
    share_or_copy(source, &target)?;
    target.sync_all()?;
    if same(source, &target)? { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// A new file of an empty volume.
fn create_empty(path: &Path, format: VolumeFormat, size_bytes: u64) -> io::Result<File> {
    let file = create(path)?;
    make_empty(&file, format, size_bytes)?;
    Ok(file)
}

/// Makes an empty file a volume of zeros.
pub(crate) fn make_empty(file: &File, format: VolumeFormat, size_bytes: u64) -> io::Result<()> {
    match format {
        VolumeFormat::Raw => file.set_len(size_bytes)?,
        VolumeFormat::Qcow2 => {
            let storage = ImageFile::try_from(file.try_clone()?)?;
            Qcow2::<ImageFile>::create_builder(storage).size(size_bytes).create()?;
        }
    }
    Ok(())
}

fn is_blank(file: &File, format: VolumeFormat) -> io::Result<bool> {
    match format {
        VolumeFormat::Raw => match seek(file, SeekFrom::Data(0)) {
            Err(Errno::NXIO) => Ok(true),
            // A file system that knows no holes says that all is data.
            Ok(_) => Ok(file.metadata()?.blocks() == 0),
            Err(error) => Err(error.into()),
        },
        VolumeFormat::Qcow2 => {
            let storage = ImageFile::try_from(file.try_clone()?)?;
            let image = Qcow2::<ImageFile>::builder(storage).backing(None).write(false).open(DenyImplicitOpenGate::default())?;
            let image: FormatAccess<ImageFile> = FormatAccess::new(image);
            let (mut at, size) = (0, image.size());
            while at < size {
                let (mapping, length) = image.get_mapping(at, size - at)?;
                if !matches!(mapping, Mapping::Zero { .. }) || length == 0 {
                    return Ok(false);
                }
                at += length;
            }
            Ok(true)
        }
    }
}
