//! The pools of a store: where they are, whose they are, and how much may be promised in them.
//!
//! A pool that was made by [`Store::create_pool`] is on record in `pools/NAME.json`, and its directory holds a marker ([`MARKER`]) that names
//! the host and the pool. Without it the directory is not the pool: its file system is not mounted, and nothing is ever made in the empty
//! directory below. The marker also keeps the agent of another host, or another agent of this one, from taking the same directory.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use form_types::{Failpoint, HostId, Name, failpoint::reach};
use serde::{Deserialize, Serialize};

use crate::{
    Pool, Store,
    blocks::read_dir,
    durable::{Draft, make_dir, read_json, remove_tree, replace_file, sync_dir, to_json},
    error::{Result, StoreError},
    lock,
    nfs::{self, NfsExport, NfsMount},
};

/// The file in a pool's directory that says whose it is.
pub const MARKER: &str = "formation-pool.json";

/// A file of this size, nearly all of it a hole, tells what a file system can do.
const TRIAL_BYTES: u64 = 16 << 20;

/// What a pool's owner has set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PoolSettings {
    /// With less free room than this nothing new is begun in it.
    pub reserve_bytes: u64,
    /// The most that its volumes may promise together.
    pub limit_bytes: Option<u64>,
    pub labels: BTreeMap<String, String>,
}

/// Whose a directory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Marker {
    host: HostId,
    pool: Name,
}

impl Marker {
    /// Whether `directory` bears it.
    pub(crate) fn check(&self, directory: &Path) -> Result<()> {
        let away = |reason: String| StoreError::PoolAway { name: self.pool.clone(), directory: directory.to_owned(), reason };
        match Self::read(directory)? {
            Some(found) if found == *self => Ok(()),
            Some(found) => Err(away(format!("the directory is pool/{} of the host {}", found.pool, found.host))),
            None if directory.is_dir() => Err(away(format!("there is no {MARKER} in the directory"))),
            None => Err(away("there is no such directory".to_owned())),
        }
    }

    fn read(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(MARKER);
        match read_json(&path) {
            Ok(marker) => Ok(Some(marker)),
            Err(StoreError::Io { source, .. }) if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// What is on record of a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Of one that was made; the others are the store's own, or configured, and only have settings here.
    made: Option<Made>,
    settings: PoolSettings,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Made {
    directory: PathBuf,
    host: HostId,
    /// What the agent mounts there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nfs: Option<NfsExport>,
}

/// All pools by name, and what is on record of them.
pub(crate) struct Pools {
    records: PathBuf,
    all: RwLock<BTreeMap<Name, Arc<Pool>>>,
    /// Exports that are being mounted for the first time.
    pending: Mutex<BTreeMap<Name, NfsExport>>,
}

/// An export that nobody else mounts meanwhile.
struct Pending<'a>(&'a Pools, &'a Name);

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.pending().remove(self.1);
    }
}

impl Pools {
    /// Those on record below `root`.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let pools = Self { records: root.join("pools"), all: RwLock::default(), pending: Mutex::default() };
        make_dir(&pools.records)?;
        crate::durable::clear_temporary(&pools.records)?;
        for path in read_dir(&pools.records)? {
            let name = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<Name>().ok());
            let Some(name) = name.filter(|_| path.extension().is_some_and(|extension| extension == "json")) else { continue };
            let Record { made: Some(Made { directory, host, nfs }), settings } = read_json(&path)? else { continue };
            let marker = Marker { host, pool: name.clone() };
            let pool = match nfs {
                None => Pool::open(name.clone(), directory, made_in(root, &name), Some(marker), settings)?,
                Some(export) => {
                    let mount = NfsMount::start(&name, export, &directory, clear_up(marker.clone()))?;
                    Pool::mounted(name.clone(), directory, made_in(root, &name), marker, settings, mount)?
                }
            };
            pools.write().insert(name, Arc::new(pool));
        }
        Ok(pools)
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<Name, Arc<Pool>>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<Name, Arc<Pool>>> {
        self.all.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<Name, NfsExport>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reserve<'a>(&'a self, name: &'a Name, export: &NfsExport) -> Result<Pending<'a>> {
        let mut pending = self.pending();
        if pending.iter().any(|(other, mounting)| other == name || mounting.overlaps(export)) {
            return Err(StoreError::PoolInUse { name: name.clone(), reason: "it is being mounted just now".to_owned() });
        }
        pending.insert(name.clone(), export.clone());
        Ok(Pending(self, name))
    }

    fn record(&self, name: &Name) -> PathBuf {
        self.records.join(format!("{name}.json"))
    }

    fn keep(&self, name: &Name, record: &Record) -> Result<()> {
        let path = self.record(name);
        replace_file(&self.records, &path, &to_json(&path, record)?, 0o600)
    }
}

/// Removes what an agent that was killed left half made in a pool, where that is the pool.
fn clear_up(marker: Marker) -> impl FnOnce(&Path) + Send + 'static {
    move |directory| {
        if marker.check(directory).is_ok()
            && let Err(error) = crate::durable::clear_temporary(directory)
        {
            tracing::warn!("what is half made in pool/{} stays: {error}", marker.pool);
        }
    }
}

/// Where the names of the volumes are that were made in a pool.
fn made_in(root: &Path, name: &Name) -> PathBuf {
    root.join("volumes-made").join(name.as_str())
}

impl Store {
    /// Adds a pool of volumes in a directory that its owner vouches for. That the directory is not there now is no error: it may be mounted
    /// later.
    ///
    /// # Errors
    /// [`StoreError::PoolExists`], and those of the file system.
    pub fn add_pool(&self, name: Name, directory: PathBuf) -> Result<()> {
        let path = self.pools.record(&name);
        let settings = if path.exists() { read_json::<Record>(&path)?.settings } else { PoolSettings::default() };
        let mut all = self.pools.write();
        if let Some(other) = all.get(&name) {
            return Err(StoreError::PoolExists { directory: other.directory().to_owned(), name });
        }
        let pool = Pool::open(name.clone(), directory, made_in(&self.root, &name), None, settings)?;
        all.insert(name, Arc::new(pool));
        Ok(())
    }

    /// # Errors
    /// [`StoreError::NoPool`].
    pub fn pool(&self, name: &Name) -> Result<Arc<Pool>> {
        self.pools.read().get(name).cloned().ok_or_else(|| StoreError::NoPool(name.clone()))
    }

    /// By name.
    pub fn pools(&self) -> Vec<Arc<Pool>> {
        self.pools.read().values().cloned().collect()
    }

    /// Whether a pool `name` of `host` could be made in `path`; gives the directory without links. `own` are directories that the agent keeps
    /// to itself. A trial file is made and removed.
    ///
    /// # Errors
    /// [`StoreError::PoolExists`], [`StoreError::PoolPlace`], [`StoreError::PoolTaken`].
    pub fn check_pool(&self, name: &Name, path: &Path, host: &HostId, own: &[PathBuf]) -> Result<PathBuf> {
        if let Ok(other) = self.pool(name) {
            return Err(StoreError::PoolExists { name: name.clone(), directory: other.directory().to_owned() });
        }
        let refused = |reason: String| StoreError::PoolPlace { path: path.to_owned(), reason };
        if !path.is_absolute() {
            return Err(refused("it is not absolute".to_owned()));
        }
        let directory = match path.canonicalize() {
            Ok(directory) if directory.is_dir() => directory,
            Ok(_) => return Err(refused("it is no directory".to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(refused("there is no such directory: make it first".to_owned()));
            }
            Err(error) => return Err(StoreError::io("look at", path)(error)),
        };
        let overlaps = |other: &Path| {
            let other = other.canonicalize().unwrap_or_else(|_| other.to_owned());
            directory.starts_with(&other) || other.starts_with(&directory)
        };
        // What the agent mounts by itself is in the store; its server is not asked.
        if let Some(pool) = self.pools().iter().find(|pool| pool.mount().is_none() && overlaps(pool.directory())) {
            return Err(refused(format!("pool/{} is in {}: neither may lie in the other", pool.name(), pool.directory().display())));
        }
        if let Some(own) = own.iter().chain([&self.root]).find(|own| overlaps(own)) {
            return Err(refused(format!("the agent has {} to itself", own.display())));
        }
        not_anothers(&directory, host)?;
        match try_out(&directory) {
            Ok(None) => Ok(directory),
            Ok(Some(lack)) => Err(refused(lack.to_owned())),
            Err(StoreError::Io { source, .. }) => Err(refused(format!("volumes cannot be made there: {source}"))),
            Err(error) => Err(error),
        }
    }

    /// Whether an NFS pool `name` could be made of this export. Its server is not asked yet.
    ///
    /// # Errors
    /// [`StoreError::PoolExists`], [`StoreError::PoolOverlaps`].
    pub fn check_nfs_pool(&self, name: &Name, export: &NfsExport) -> Result<()> {
        if let Ok(other) = self.pool(name) {
            let directory = other.export().map_or_else(|| other.directory().to_owned(), |export| export.source().into());
            return Err(StoreError::PoolExists { name: name.clone(), directory });
        }
        match self
            .pools()
            .iter()
            .find_map(|pool| Some((pool.name().clone(), pool.export().filter(|other| other.overlaps(export))?.source())))
        {
            Some((other, export)) => Err(StoreError::PoolOverlaps { other, export }),
            None => Ok(()),
        }
    }

    /// Where the export of an NFS pool is mounted.
    pub fn mount_point(&self, name: &Name) -> PathBuf {
        self.root.join("mounts").join(name.as_str())
    }

    /// Mounts an NFS export and makes it a pool. Takes as long as the server takes to answer, a minute at most.
    ///
    /// # Errors
    /// As [`Store::check_nfs_pool`]; [`StoreError::PoolSilent`], [`StoreError::PoolMount`], [`StoreError::PoolTaken`], [`StoreError::PoolPlace`].
    /// It is unmounted again then.
    pub fn create_nfs_pool(&self, name: &Name, export: NfsExport, host: &HostId, settings: PoolSettings) -> Result<Arc<Pool>> {
        let _pending = self.pools.reserve(name, &export)?;
        self.check_nfs_pool(name, &export)?;
        let directory = self.mount_point(name);
        let marker = Marker { host: *host, pool: name.clone() };
        let mount = NfsMount::start(name, export.clone(), &directory, |_| ())?;
        let made =
            mount.wait_until_mounted().and_then(|()| can_be_pool(&directory, &export, host)).and_then(|()| mark(&directory, &marker));
        if let Err(error) = made {
            if let Err(stays) = mount.end() {
                tracing::warn!("{} stays mounted: {stays}", directory.display());
            }
            return Err(error);
        }
        let made = Made { directory: directory.clone(), host: *host, nfs: Some(export) };
        let pool = Arc::new(Pool::mounted(name.clone(), directory, made_in(&self.root, name), marker, settings, mount)?);
        self.publish(&pool, made).inspect_err(|_| {
            if let Err(error) = self.let_go(&pool, true) {
                tracing::warn!(%error, "an export stays mounted as a pool that is none");
            }
        })
    }

    /// Puts a pool that is marked on record, unless another one was made of this name meanwhile.
    fn publish(&self, pool: &Arc<Pool>, made: Made) -> Result<Arc<Pool>> {
        let mut all = self.pools.write();
        if let Some(other) = all.get(pool.name()) {
            return Err(StoreError::PoolExists { name: other.name().clone(), directory: other.directory().to_owned() });
        }
        self.pools.keep(pool.name(), &Record { made: Some(made), settings: pool.settings() })?;
        all.insert(pool.name().clone(), Arc::clone(pool));
        drop(all);
        reach(Failpoint::PoolRecorded);
        Ok(Arc::clone(pool))
    }

    /// Takes the marker from a pool that is not on record, when its directory `is_there`, and unmounts it.
    fn let_go(&self, pool: &Pool, is_there: bool) -> Result<()> {
        let unmarked = match pool.marker() {
            Some(marker) if is_there => self.unmark(pool.name(), pool.directory(), &marker.host),
            _ => Ok(()),
        };
        match pool.mount() {
            // A server that has stopped answering meanwhile keeps the marker, which keeps nobody of this host away.
            Some(mount) => mount.end(),
            None => unmarked,
        }
    }

    /// Makes a pool in `path`: see [`Store::check_pool`].
    ///
    /// # Errors
    /// As [`Store::check_pool`], and those of the file system. Nothing is left behind then.
    pub fn create_pool(&self, name: &Name, path: &Path, host: &HostId, own: &[PathBuf], settings: PoolSettings) -> Result<Arc<Pool>> {
        let directory = self.check_pool(name, path, host, own)?;
        let marker = Marker { host: *host, pool: name.clone() };
        mark(&directory, &marker)?;
        let make = || -> Result<Arc<Pool>> {
            let pool = Pool::open(name.clone(), directory.clone(), made_in(&self.root, name), Some(marker), settings)?;
            self.publish(&Arc::new(pool), Made { directory: directory.clone(), host: *host, nfs: None })
        };
        make().inspect_err(|_| {
            if let Err(error) = self.unmark(name, &directory, host) {
                tracing::warn!(%error, "a directory stays marked as a pool that is none");
            }
        })
    }

    /// Changes what is set of a pool.
    ///
    /// # Errors
    /// [`StoreError::NoPool`], and those of the file system.
    pub fn set_pool(&self, name: &Name, settings: PoolSettings) -> Result<()> {
        let pool = self.pool(name)?;
        let made =
            pool.marker().map(|marker| Made { directory: pool.directory().to_owned(), host: marker.host, nfs: pool.export().cloned() });
        self.pools.keep(name, &Record { made, settings: settings.clone() })?;
        pool.set(settings);
        Ok(())
    }

    /// Forgets a pool that was made here and in which there is nothing; its directory stays. One that is not there now is forgotten too.
    ///
    /// # Errors
    /// [`StoreError::PoolFixed`], [`StoreError::PoolInUse`], [`StoreError::NoPool`], and those of the file system.
    pub fn remove_pool(&self, name: &Name) -> Result<()> {
        let pool = self.pool(name)?;
        if !pool.was_made() {
            return Err(StoreError::PoolFixed(name.clone()));
        }
        let in_use = |reason: String| StoreError::PoolInUse { name: name.clone(), reason };
        let mut retired = pool.alone().ok_or_else(|| in_use("something is being made in it".to_owned()))?;
        let is_there = pool.is_there().is_ok();
        if is_there {
            let volumes = pool.volumes()?;
            if !volumes.is_empty() {
                let ids = volumes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                return Err(in_use(format!("{} holds volumes that nobody knows: {ids}", pool.directory().display())));
            }
        }
        let record = self.pools.record(name);
        match fs::remove_file(&record) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(StoreError::io("remove", &record)(error)),
            _ => sync_dir(&self.pools.records)?,
        }
        *retired = true;
        drop(retired);
        self.pools.write().remove(name);
        reach(Failpoint::PoolForgotten);
        remove_tree(&made_in(&self.root, name))?;
        self.let_go(&pool, is_there)
    }

    /// Unmounts what an agent that was killed had mounted for a pool that is not on record. That there is nothing is fine.
    ///
    /// # Errors
    /// Those of umount(2).
    pub fn unmount(&self, name: &Name) -> Result<()> {
        if self.pool(name).is_ok() { Ok(()) } else { nfs::release(&self.mount_point(name)) }
    }

    /// Takes the marker of a pool that is not on record from a directory; that there is none, or another's, is fine.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn unmark(&self, name: &Name, directory: &Path, host: &HostId) -> Result<()> {
        let marker = Marker { host: *host, pool: name.clone() };
        let is_known = self.pools().iter().any(|pool| pool.directory() == directory);
        if is_known || Marker::read(directory)? != Some(marker) {
            return Ok(());
        }
        remove_tree(&directory.join(crate::durable::TEMPORARY))?;
        let path = directory.join(MARKER);
        fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
        sync_dir(directory)
    }
}

/// Writes down in a directory whose it is.
fn mark(directory: &Path, marker: &Marker) -> Result<()> {
    let file = directory.join(MARKER);
    replace_file(directory, &file, &to_json(&file, marker)?, 0o644)?;
    reach(Failpoint::PoolMarked);
    Ok(())
}

fn not_anothers(directory: &Path, host: &HostId) -> Result<()> {
    match Marker::read(directory)? {
        Some(Marker { host: other, pool }) if other != *host => {
            Err(StoreError::PoolTaken { path: directory.to_owned(), host: other, pool })
        }
        _ => Ok(()),
    }
}

/// What keeps two hosts from writing to one volume of a directory that both can reach.
fn keeps_locks(directory: &Path) -> Result<bool> {
    let draft = Draft::new(directory)?;
    let path = draft.path().join("lock");
    let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(StoreError::io("try", &path));
    let (one, other) = (open()?, open()?);
    lock::take(&one, &path, true)?;
    Ok(matches!(lock::take(&other, &path, true), Err(StoreError::VolumeInUse { .. })))
}

/// Whether volumes can live on an export that is mounted at `directory`.
fn can_be_pool(directory: &Path, export: &NfsExport, host: &HostId) -> Result<()> {
    let path = PathBuf::from(export.source());
    let refused = |reason: String| StoreError::PoolPlace { path: path.clone(), reason };
    let look = || {
        not_anothers(directory, host)?;
        match try_out(directory)? {
            Some(lack) => Ok(Some(lack)),
            None => Ok((!keeps_locks(directory)?).then_some("its server keeps no locks, which keep a second writer from a volume")),
        }
    };
    match look() {
        Ok(None) => Ok(()),
        Ok(Some(lack)) => Err(refused(lack.to_owned())),
        Err(StoreError::PoolTaken { host, pool, .. }) => Err(StoreError::PoolTaken { path, host, pool }),
        Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => Err(refused(
            "this host's root may not write there: export it with `no_root_squash`, or give the directory to the user whom the server takes \
             for root"
                .to_owned(),
        )),
        Err(StoreError::Io { source, .. }) => Err(refused(format!("volumes cannot be made there: {source}"))),
        Err(error) => Err(error),
    }
}

/// What keeps a directory from holding raw volumes; none when nothing does.
fn try_out(directory: &Path) -> Result<Option<&'static str>> {
    let draft = Draft::new(directory)?;
    let path = draft.path().join("trial");
    let written = b"written at the end";
    let at = TRIAL_BYTES - written.len() as u64;
    let trial = || -> io::Result<Option<&'static str>> {
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        file.set_len(TRIAL_BYTES)?;
        file.write_all_at(written, at)?;
        file.sync_all()?;
        let mut there = [0; 18];
        file.read_exact_at(&mut there, at)?;
        if there != *written {
            return Ok(Some("what is written there is not what is read"));
        }
        Ok((file.metadata()?.blocks() * 512 > TRIAL_BYTES / 2).then_some("its file system has no sparse files"))
    };
    let lack = trial().map_err(StoreError::io("try", &path))?;
    // A volume is made in one step by naming the directory that holds it.
    let moved = draft.path().join("moved");
    fs::rename(&path, &moved).map_err(StoreError::io("rename", &path))?;
    Ok(lack)
}
