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
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use form_types::{Failpoint, HostId, Name, failpoint::reach};
use serde::{Deserialize, Serialize};

use crate::{
    Pool, Store,
    blocks::read_dir,
    durable::{Draft, make_dir, read_json, remove_tree, replace_file, sync_dir, to_json},
    error::{Result, StoreError},
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
}

/// All pools by name, and what is on record of them.
pub(crate) struct Pools {
    records: PathBuf,
    all: RwLock<BTreeMap<Name, Arc<Pool>>>,
}

impl Pools {
    /// Those on record below `root`.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let pools = Self { records: root.join("pools"), all: RwLock::default() };
        make_dir(&pools.records)?;
        crate::durable::clear_temporary(&pools.records)?;
        for path in read_dir(&pools.records)? {
            let name = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<Name>().ok());
            let Some(name) = name.filter(|_| path.extension().is_some_and(|extension| extension == "json")) else { continue };
            let Record { made: Some(Made { directory, host }), settings } = read_json(&path)? else { continue };
            let marker = Marker { host, pool: name.clone() };
            let pool = Pool::open(name.clone(), directory, made_in(root, &name), Some(marker), settings)?;
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

    fn record(&self, name: &Name) -> PathBuf {
        self.records.join(format!("{name}.json"))
    }

    fn keep(&self, name: &Name, record: &Record) -> Result<()> {
        let path = self.record(name);
        replace_file(&self.records, &path, &to_json(&path, record)?, 0o600)
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
        if let Some(pool) = self.pools().iter().find(|pool| overlaps(pool.directory())) {
            return Err(refused(format!("pool/{} is in {}: neither may lie in the other", pool.name(), pool.directory().display())));
        }
        if let Some(own) = own.iter().chain([&self.root]).find(|own| overlaps(own)) {
            return Err(refused(format!("the agent has {} to itself", own.display())));
        }
        match Marker::read(&directory)? {
            Some(marker) if marker.host != *host => {
                return Err(StoreError::PoolTaken { path: directory, host: marker.host, pool: marker.pool });
            }
            _ => {}
        }
        match try_out(&directory) {
            Ok(None) => Ok(directory),
            Ok(Some(lack)) => Err(refused(lack.to_owned())),
            Err(StoreError::Io { source, .. }) => Err(refused(format!("volumes cannot be made there: {source}"))),
            Err(error) => Err(error),
        }
    }

    /// Makes a pool in `path`: see [`Store::check_pool`].
    ///
    /// # Errors
    /// As [`Store::check_pool`], and those of the file system. Nothing is left behind then.
    pub fn create_pool(&self, name: &Name, path: &Path, host: &HostId, own: &[PathBuf], settings: PoolSettings) -> Result<Arc<Pool>> {
        let directory = self.check_pool(name, path, host, own)?;
        let marker = Marker { host: *host, pool: name.clone() };
        let file = directory.join(MARKER);
        replace_file(&directory, &file, &to_json(&file, &marker)?, 0o644)?;
        reach(Failpoint::PoolMarked);
        let make = || -> Result<Arc<Pool>> {
            let pool = Pool::open(name.clone(), directory.clone(), made_in(&self.root, name), Some(marker), settings.clone())?;
            let record = Record { made: Some(Made { directory: directory.clone(), host: *host }), settings };
            self.pools.keep(name, &record)?;
            Ok(Arc::new(pool))
        };
        let pool = make().inspect_err(|_| {
            if let Err(error) = self.unmark(name, &directory, host) {
                tracing::warn!(%error, "a directory stays marked as a pool that is none");
            }
        })?;
        self.pools.write().insert(name.clone(), Arc::clone(&pool));
        reach(Failpoint::PoolRecorded);
        Ok(pool)
    }

    /// Changes what is set of a pool.
    ///
    /// # Errors
    /// [`StoreError::NoPool`], and those of the file system.
    pub fn set_pool(&self, name: &Name, settings: PoolSettings) -> Result<()> {
        let pool = self.pool(name)?;
        let made = pool.marker().map(|marker| Made { directory: pool.directory().to_owned(), host: marker.host });
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
        let Some(marker) = pool.marker() else { return Err(StoreError::PoolFixed(name.clone())) };
        let in_use = |reason: String| StoreError::PoolInUse { name: name.clone(), reason };
        let mut retired = pool.alone().ok_or_else(|| in_use("something is being made in it".to_owned()))?;
        let is_there = marker.check(pool.directory()).is_ok();
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
        if is_there { self.unmark(name, pool.directory(), &marker.host) } else { Ok(()) }
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
