//! NFS exports that the agent mounts for its pools.
//!
//! A server may stop answering at any moment, and whoever asks it then stands still. So exports are mounted `softerr`: the kernel gives up after
//! a while, and the request fails. That is still long (twelve seconds, unless other options were asked for). So one thread a mount, the
//! watcher, asks the server every few seconds; everybody else asks [`NfsMount::check`] before each access, which waits three seconds at most.
//! Nobody but the watcher waits for mount(2).

mod mounting;
mod parse;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use form_types::Name;

use self::mounting::{force, is_mounted, look, unmount_all};
pub use self::parse::{NfsError, NfsExport};
use crate::{
    durable::make_dir,
    error::{Result, StoreError},
};

/// So often the watcher looks by itself.
const INTERVAL: Duration = Duration::from_secs(4);
/// What it found is good for so long.
const FRESH: Duration = Duration::from_secs(2);
/// A server that takes longer does not answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// A first mount may take so long: a name is looked up, a version agreed upon.
const FIRST: Duration = Duration::from_secs(60);
/// For the watcher to see that it is to end.
const LAST: Duration = Duration::from_secs(15);

/// Why an export cannot be used now.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    /// Its server does not answer.
    Silent(String),
    /// The server, or this host's kernel, refuses.
    Refused(String),
}

impl Fault {
    fn into_error(self, name: &Name) -> StoreError {
        match self {
            Self::Silent(reason) => StoreError::PoolSilent { name: name.clone(), reason },
            Self::Refused(reason) => StoreError::PoolMount { name: name.clone(), reason },
        }
    }
}

/// What the watcher and those who ask it tell each other.
#[derive(Default)]
struct State {
    /// The watcher is to end.
    stop: bool,
    /// And nothing is to stay mounted.
    unmount: bool,
    ended: bool,
    /// Somebody waits for a look.
    asked: bool,
    /// Since when a look is under way.
    begun: Option<Instant>,
    /// When the last one ended, and what it found.
    last: Option<(Instant, Result<(), Fault>)>,
}

struct Shared {
    pool: Name,
    export: NfsExport,
    directory: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

/// An export that is mounted, or is to be. Dropped, it stays mounted and is no longer watched: VMs that have files of it open go on, and the
/// next agent finds it.
pub(crate) struct NfsMount {
    shared: Arc<Shared>,
}

impl Drop for NfsMount {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl NfsMount {
    /// Mounts `export` at `directory`, and again whenever it is not mounted. `first` is done once, as soon as it is there. Does not wait.
    ///
    /// # Errors
    /// When the directory cannot be made, or no thread begun.
    pub(crate) fn start(pool: &Name, export: NfsExport, directory: &Path, first: impl FnOnce(&Path) + Send + 'static) -> Result<Self> {
        // Where it is mounted already, a look at the directory would be one at the server.
        if !is_mounted(directory) {
            make_dir(directory)?;
        }
        let (pool, directory) = (pool.clone(), directory.to_owned());
        let shared = Arc::new(Shared { pool, export, directory, state: Mutex::default(), changed: Condvar::new() });
        shared.lock().begun = Some(Instant::now());
        let watched = Arc::clone(&shared);
        let watcher = std::thread::Builder::new().name("nfs".to_owned()).spawn(move || watched.watch(first));
        watcher.map_err(StoreError::io("watch", &shared.directory))?;
        Ok(Self { shared })
    }

    pub(crate) fn export(&self) -> &NfsExport {
        &self.shared.export
    }

    /// Waits until it is mounted for the first time, or cannot be: a minute at most.
    ///
    /// # Errors
    /// [`StoreError::PoolSilent`], [`StoreError::PoolMount`].
    pub(crate) fn wait_until_mounted(&self) -> Result<()> {
        self.shared.check(FIRST).map_err(|fault| fault.into_error(&self.shared.pool))
    }

    /// Whether the export is mounted and its server answers. Takes three seconds at most.
    ///
    /// # Errors
    /// [`StoreError::PoolSilent`], [`StoreError::PoolMount`].
    pub(crate) fn check(&self) -> Result<()> {
        self.shared.check(PATIENCE).map_err(|fault| fault.into_error(&self.shared.pool))
    }

    /// Unmounts it for good, whether its server answers or not.
    ///
    /// # Errors
    /// Those of umount(2).
    pub(crate) fn end(&self) -> Result<()> {
        let shared = &self.shared;
        shared.lock().unmount = true;
        shared.stop();
        force(&shared.directory);
        let (state, waited) = (shared.lock(), Instant::now());
        // A watcher that is still in mount(2) then unmounts by itself what it comes to mount.
        let ended = shared.changed.wait_timeout_while(state, LAST, |state| !state.ended);
        drop(ended);
        tracing::debug!(pool = %shared.pool, "the watcher of a mount ended after {:?}", waited.elapsed());
        release(&shared.directory)
    }
}

/// Unmounts what is mounted at `directory`, and removes that; that there is none is fine. Does not wait for a server.
///
/// # Errors
/// Those of umount(2).
pub(crate) fn release(directory: &Path) -> Result<()> {
    unmount_all(directory).map_err(StoreError::io("unmount", directory))?;
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", directory)(error)),
        _ => Ok(()),
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    fn check(&self, patience: Duration) -> Result<(), Fault> {
        let asked = Instant::now();
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let waited = now.duration_since(state.begun.unwrap_or(asked).min(asked));
            match &state.last {
                _ if state.stop => return Err(Fault::Refused(format!("{} is being unmounted", self.export))),
                // In time, whenever this thread comes to see it on a busy host.
                Some((at, found)) if *at >= asked => return found.clone(),
                _ if waited >= patience => {
                    return Err(Fault::Silent(format!("the server of {} has not answered for {} s", self.export, waited.as_secs())));
                }
                // The watcher goes on asking, for all.
                Some((_, Err(fault))) => return Err(fault.clone()),
                Some((at, Ok(()))) if now.duration_since(*at) < FRESH => return Ok(()),
                _ => {}
            }
            state.asked = true;
            self.changed.notify_all();
            state = self.changed.wait_timeout(state, patience.saturating_sub(waited)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn end_watching(&self, state: MutexGuard<'_, State>) {
        let unmount = state.unmount;
        drop(state);
        if unmount && let Err(error) = unmount_all(&self.directory) {
            tracing::warn!("{} stays mounted: {error}", self.directory.display());
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn watch(&self, first: impl FnOnce(&Path)) {
        let mut first = Some(first);
        let (mut was_there, mut mounted) = (true, false);
        loop {
            let found = look(&self.export, &self.directory, &mut mounted);
            if found.is_ok()
                && let Some(first) = first.take()
            {
                first(&self.directory);
            }
            match &found {
                Ok(()) if !was_there => tracing::info!("pool/{} answers again", self.pool),
                Err(Fault::Silent(reason) | Fault::Refused(reason)) if was_there && !self.lock().stop => {
                    tracing::warn!("pool/{}: {reason}", self.pool)
                }
                _ => {}
            }
            was_there = found.is_ok();
            let mut state = self.lock();
            (state.begun, state.last, state.asked) = (None, Some((Instant::now(), found)), false);
            self.changed.notify_all();
            let waited = self.changed.wait_timeout_while(state, INTERVAL, |state| !state.stop && !state.asked);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.stop {
                return self.end_watching(state);
            }
            state.begun = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests;
