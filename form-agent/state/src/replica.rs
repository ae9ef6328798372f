//! A replica: this host's copy of the state, the only door to it.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use form_types::{ClusterId, PublicKey, SecretKey};

use crate::{
    admit::{Batch, Outcome},
    change::{ChangeHash, SignedRequest},
    document::DocumentState,
    error::StateError,
    load,
    log::{Append, Log, Proof},
    refused::{Applied, Refused},
    rules::Rules,
    view::View,
    write::{Document, RecordId, Scope, Table, Write, check_all},
};

/// What a change did, for those who wait for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeSummary {
    /// The state's generation after it.
    pub generation: u64,
    pub document: Document,
    pub author: PublicKey,
    pub hash: ChangeHash,
    /// The records it wrote to, made or removed.
    pub records: Vec<(Table, RecordId)>,
}

/// Someone whom every change is told, after it is durable and visible.
pub type Listener = Box<dyn Fn(&ChangeSummary) + Send + Sync>;

/// How many changes of a document lie between two snapshots of it: what a start has to replay at most.
pub(crate) const SNAPSHOT_EVERY: usize = 256;

pub(crate) struct State {
    pub documents: BTreeMap<Document, DocumentState>,
    /// The position of the next change in the log; also the generation.
    pub end: u64,
    pub proofs: BTreeMap<(Document, PublicKey), Proof>,
    /// A write failed: what is on the disk is not known.
    pub broken: bool,
}

/// This host's copy of the state. Share it in an `Arc`; all methods take `&self` and block on the disk for writes only.
///
/// A change is durable before anybody sees it, here or elsewhere: a host that forgot a change which it had told others would
/// sign another one under the same number.
pub struct Replica {
    key: SecretKey,
    host: PublicKey,
    cluster: ClusterId,
    rules: Arc<dyn Rules>,
    log: Log,
    state: Mutex<State>,
    view: RwLock<Arc<View>>,
    generation: Mutex<u64>,
    changed: Condvar,
    listeners: Mutex<Vec<Arc<Listener>>>,
}

/// A change spoilt the batch's copy of its document; nothing of the batch was kept.
struct Spoilt(String);

/// Every update below leaves its lock's value whole, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Replica").field("host", &self.host).field("path", &self.log.path()).finish_non_exhaustive()
    }
}

impl Replica {
    /// Opens the state at `path`, or makes an empty one.
    ///
    /// # Errors
    /// [`StateError::InUse`] when another process has it open, [`StateError::Corrupt`] when the file is damaged, others when
    /// it is of another host, cluster or version, or cannot be read.
    pub fn open(path: &Path, host: &SecretKey, cluster: ClusterId, rules: Arc<dyn Rules>) -> Result<Self, StateError> {
        let public = host.public();
        let log = Log::open(path, &public, &cluster)?;
        let state = load::load(&log)?;
        let mut view = View::default();
        for (document, content) in &state.documents {
            view.set(*document, content.tables.clone());
        }
        let generation = state.end;
        Ok(Self {
            key: host.clone(),
            host: public,
            cluster,
            rules,
            log,
            state: Mutex::new(state),
            view: RwLock::new(Arc::new(view)),
            generation: Mutex::new(generation),
            changed: Condvar::new(),
            listeners: Mutex::new(Vec::new()),
        })
    }

    /// This host's key.
    pub const fn host(&self) -> PublicKey {
        self.host
    }

    pub const fn cluster(&self) -> ClusterId {
        self.cluster
    }

    pub(crate) fn key(&self) -> &SecretKey {
        &self.key
    }

    pub(crate) fn rules(&self) -> &dyn Rules {
        self.rules.as_ref()
    }

    pub(crate) const fn log(&self) -> &Log {
        &self.log
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The state now. Never blocks on the disk, never touches automerge.
    pub fn view(&self) -> Arc<View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many changes there are. It only grows, also over restarts.
    pub fn generation(&self) -> u64 {
        *lock(&self.generation)
    }

    /// Waits until the generation is greater than `seen`, or until `timeout` has passed; says which it is then.
    pub fn wait(&self, seen: u64, timeout: Duration) -> u64 {
        let guard = lock(&self.generation);
        let (guard, _) =
            self.changed.wait_timeout_while(guard, timeout, |generation| *generation <= seen).unwrap_or_else(PoisonError::into_inner);
        *guard
    }

    /// Has every later change told to `listener`, on the thread that made or received it. It must be quick and must not panic.
    pub fn on_change(&self, listener: Listener) {
        lock(&self.listeners).push(Arc::new(listener));
    }

    /// Records what a user's request allows: derives the writes by the rules and commits them. `None` when all of it is
    /// there already.
    ///
    /// # Errors
    /// [`StateError::Refused`] when the rules refuse it; others as [`Replica::commit`].
    pub fn submit(&self, request: SignedRequest) -> Result<Option<ChangeHash>, StateError> {
        self.make(Some(request), None)
    }

    /// Commits writes: of this host's own accord, or what `request` allows, which must be exactly these. Durable when it
    /// returns. `None` when they say what is already there.
    ///
    /// # Errors
    /// [`StateError::Refused`] and [`StateError::NotDerived`] from the rules, [`StateError::Writes`] and
    /// [`StateError::TooLarge`] for writes that no change can hold, and what the disk says.
    pub fn commit(&self, request: Option<SignedRequest>, writes: Vec<Write>) -> Result<Option<ChangeHash>, StateError> {
        self.make(request, Some(writes))
    }

    fn make(&self, request: Option<SignedRequest>, writes: Option<Vec<Write>>) -> Result<Option<ChangeHash>, StateError> {
        let document = match &writes {
            _ if request.is_some() => Document::Cluster,
            None => return Ok(None),
            Some(writes) => match check_all(writes)? {
                None => return Ok(None),
                Some(Scope::Cluster) => Document::Cluster,
                Some(Scope::Host) => Document::Host(self.host),
            },
        };
        let mut state = self.state();
        let mut batch = Batch::new(self, &state);
        let hash = batch.make(document, request, writes, now())?;
        let outcome = batch.finish(false)?;
        let summaries = self.keep(&mut state, outcome)?;
        drop(state);
        self.tell(&summaries);
        Ok(hash)
    }

    /// Takes a change from elsewhere, after every check there is.
    ///
    /// # Errors
    /// [`Refused`] says what is wrong with it and whose fault that is. The state is then as before.
    pub fn receive(&self, change: &[u8]) -> Result<Applied, Refused> {
        let mut results = self.receive_all(&[change]);
        results.pop().unwrap_or(Ok(Applied::Held))
    }

    /// Takes several changes, causes before effects, in one go: one copy of each document, one write to the disk.
    pub fn receive_all<B: AsRef<[u8]>>(&self, changes: &[B]) -> Vec<Result<Applied, Refused>> {
        match self.receive_together(changes) {
            Ok(results) => results,
            Err(Spoilt(reason)) if changes.len() == 1 => vec![Err(Refused::Panicked(reason))],
            // Nothing was kept: find the culprit by taking them one by one.
            Err(_) => changes.iter().map(|change| self.receive(change.as_ref())).collect(),
        }
    }

    fn receive_together<B: AsRef<[u8]>>(&self, changes: &[B]) -> Result<Vec<Result<Applied, Refused>>, Spoilt> {
        let mut state = self.state();
        let mut batch = Batch::new(self, &state);
        let mut results = Vec::with_capacity(changes.len());
        for change in changes {
            let result = batch.admit(change.as_ref());
            if let Err(Refused::Panicked(reason)) = result {
                return Err(Spoilt(reason));
            }
            results.push(result);
        }
        match batch.finish(true).and_then(|outcome| self.keep(&mut state, outcome)) {
            Ok(summaries) => {
                drop(state);
                self.tell(&summaries);
            }
            Err(StateError::Document(reason)) => return Err(Spoilt(reason)),
            Err(error) => {
                let error = Arc::new(error);
                for result in results.iter_mut().filter(|result| matches!(result, Ok(Applied::New(_)))) {
                    *result = Err(Refused::Storage(error.clone()));
                }
            }
        }
        Ok(results)
    }

    /// Makes a batch durable, then visible.
    fn keep(&self, state: &mut State, outcome: Option<Outcome>) -> Result<Vec<ChangeSummary>, StateError> {
        let Some(outcome) = outcome else { return Ok(Vec::new()) };
        if state.broken {
            self.mend(state)?;
        }
        if let Err(error) = self.log.append(&outcome.append) {
            state.broken = true;
            // Mended at once when it can be: what failed for want of room is not there, and the next change may find some.
            if let Err(again) = self.mend(state) {
                tracing::error!(path = %self.log.path().display(), "the state takes no changes: {again}");
            }
            return Err(error);
        }
        state.end = outcome.end;
        for (document, author, proof) in outcome.append.proofs {
            tracing::warn!(%document, %author, seq = proof.seq, "a host has signed two different changes under one number");
            state.proofs.insert((document, author), proof);
        }
        let mut view = View::clone(&self.view());
        for (document, content) in outcome.documents {
            view.set(document, content.tables.clone());
            state.documents.insert(document, content);
        }
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
        *lock(&self.generation) = outcome.end;
        self.changed.notify_all();
        Ok(outcome.summaries)
    }

    /// Opens the log again after a write that failed, and goes on when it ends where the state in memory does.
    fn mend(&self, state: &mut State) -> Result<(), StateError> {
        self.log.reopen()?;
        let end = self.log.end(state.documents.keys().copied())?;
        // A change that is on the disk after all was reported as lost: only a new start reads it in.
        if end > state.end {
            return Err(StateError::Broken { path: self.log.path().to_owned() });
        }
        state.broken = false;
        Ok(())
    }

    /// Keeps a verified proof against an author; `true` when there was none.
    pub(crate) fn keep_proof(&self, document: Document, author: PublicKey, proof: Proof) -> Result<bool, StateError> {
        let mut state = self.state();
        if state.proofs.contains_key(&(document, author)) {
            return Ok(false);
        }
        let append = Append { proofs: vec![(document, author, proof)], ..Append::default() };
        let outcome = Outcome { append, documents: BTreeMap::new(), summaries: Vec::new(), end: state.end };
        self.keep(&mut state, Some(outcome)).map(|_| true)
    }

    fn tell(&self, summaries: &[ChangeSummary]) {
        let listeners = lock(&self.listeners).clone();
        for summary in summaries {
            for listener in &listeners {
                listener(summary);
            }
        }
    }
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|time| i64::try_from(time.as_secs()).ok()).unwrap_or(0)
}
