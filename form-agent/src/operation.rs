//! Operations: every change that somebody asked for is recorded before anything is done for it, and ends completed or failed.

mod asked;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use form_api::{
    ApiError, ErrorCode,
    event::EventKind,
    operation::{Operation, OperationKind, OperationStatus},
};
use form_types::{Digest, Failpoint, IdempotencyKey, Name, OperationId, PublicKey, failpoint::reach};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use asked::Asked;

use crate::{
    database::{DatabaseError, Records},
    event::Events,
};

/// What the database keeps of an operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub operation: Operation,
    /// Of method, path and body: the same idempotency key with another request is a conflict.
    pub request: Digest,
    /// What a restarted agent needs to finish it or take it back.
    pub resume: Option<serde_json::Value>,
}

/// As much of a [`Record`] as is counted: all of them are read when the agent starts, and what was asked for may be long.
#[derive(Deserialize)]
struct Counted {
    operation: CountedOperation,
}

#[derive(Deserialize)]
struct CountedOperation {
    status: OperationStatus,
}

/// Who asks for what under which key.
pub struct Opening {
    pub kind: OperationKind,
    pub vm: Option<Name>,
    pub subject: String,
    pub actor: String,
    pub actor_key: PublicKey,
    pub idempotency_key: IdempotencyKey,
    pub request: Asked,
}

/// How [`Operations::begin`] went.
pub enum Begun {
    /// It is new and now `executing`.
    New(OperationId),
    /// The same request was made before under this key: here is what became of it.
    Repeated(Box<Operation>),
}

/// An operation under way.
struct Active {
    kind: OperationKind,
    subject: String,
    vm: Option<Name>,
    actor: String,
    begun: Timestamp,
    steps: Vec<String>,
}

/// So many steps of an operation are kept.
const MAX_STEPS: usize = 32;

impl Active {
    /// Whether `kind` may begin while this one goes on. Who destroys a VM need not wait for what is being made of it; the other
    /// operation notices that its VM is gone and ends.
    fn gives_way_to(&self, kind: OperationKind) -> bool {
        kind == OperationKind::VmDestroy && self.kind != OperationKind::VmDestroy
    }

    fn conflict(&self, id: OperationId) -> ApiError {
        let age = Timestamp::now().duration_since(self.begun).as_secs().max(0);
        let what = format!("{} of {} is under way: {} asked for it {age} s ago", self.kind.as_str(), self.subject, self.actor);
        let wait = format!("wait for it with `form op wait {id}`");
        let hint = match &self.vm {
            Some(name) if self.kind != OperationKind::VmDestroy => format!("{wait}, or give it and the VM up with `form destroy {name}`"),
            _ => wait,
        };
        ApiError::new(ErrorCode::Conflict, what).hint(hint).operation(id)
    }
}

/// How operations went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ever asked for, also those that are no longer on record.
    pub total: u64,
    /// Of those on record when the agent was started, and since.
    pub completed: u64,
    pub failed: u64,
    pub executing: u64,
}

impl Counts {
    /// Of the operations that have ended.
    pub fn error_rate_percent(&self) -> f64 {
        let ended = self.completed + self.failed;
        if ended == 0 { 0.0 } else { self.failed as f64 * 100.0 / ended as f64 }
    }
}

pub struct Operations {
    records: Arc<Records>,
    events: Arc<Events>,
    counts: Mutex<Counts>,
    active: Mutex<HashMap<OperationId, Active>>,
    /// Counts changes, for those who wait.
    changed: watch::Sender<u64>,
}

fn internal(error: &DatabaseError) -> ApiError {
    ApiError::new(ErrorCode::Internal, error.to_string()).hint("look at the agent's log, and at `form doctor` for free space")
}

impl Operations {
    /// # Errors
    /// When the database cannot be read.
    pub fn open(records: Arc<Records>, events: Arc<Events>) -> Result<Self, DatabaseError> {
        let mut counts = Counts { total: records.operations_ever()?, ..Counts::default() };
        for record in records.newest_operations::<Counted>(usize::MAX)? {
            match record.operation.status {
                OperationStatus::Completed => counts.completed += 1,
                OperationStatus::Failed => counts.failed += 1,
                OperationStatus::Pending | OperationStatus::Executing => counts.executing += 1,
            }
        }
        Ok(Self { records, events, counts: Mutex::new(counts), active: Mutex::default(), changed: watch::Sender::new(0) })
    }

    pub fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Records an operation. Two unfinished ones about the same subject exclude each other, but for a destroy: everything gives way to it.
    ///
    /// # Errors
    /// A conflict with another request under the same key, or with an unfinished operation; or the database's.
    pub fn begin(&self, opening: Opening) -> Result<Begun, ApiError> {
        let id = OperationId::derive(&opening.actor_key, &opening.idempotency_key);
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(record) = self.records.operation::<Record>(id.as_bytes()).map_err(|error| internal(&error))? {
            return if record.request == opening.request.digest {
                Ok(Begun::Repeated(Box::new(record.operation)))
            } else {
                Err(ApiError::new(ErrorCode::Conflict, "this idempotency key was used for another request")
                    .hint("use a new key for a new request"))
            };
        }
        let in_the_way = |other: &Active| other.subject == opening.subject && !other.gives_way_to(opening.kind);
        if let Some((id, other)) = active.iter().find(|(_, other)| in_the_way(other)) {
            return Err(other.conflict(*id));
        }
        let now = Timestamp::now();
        let operation = Operation {
            id,
            kind: opening.kind,
            subject: opening.subject.clone(),
            actor: opening.actor.clone(),
            idempotency_key: opening.idempotency_key,
            request: Some(opening.request.shown),
            status: OperationStatus::Executing,
            steps: Vec::new(),
            error: None,
            created_at: now,
            started_at: Some(now),
            finished_at: None,
        };
        let record = Record { operation, request: opening.request.digest, resume: None };
        self.records.put_operation(id.as_bytes(), &record).map_err(|error| internal(&error))?;
        reach(Failpoint::OperationRecorded);
        let entry = Active {
            kind: opening.kind,
            subject: opening.subject.clone(),
            vm: opening.vm.clone(),
            actor: opening.actor,
            begun: now,
            steps: Vec::new(),
        };
        active.insert(id, entry);
        drop(active);
        self.count(|counts| (counts.total, counts.executing) = (counts.total + 1, counts.executing + 1));
        let message = format!("{} {}", opening.kind.as_str(), opening.subject);
        self.events.emit(EventKind::OperationStarted, opening.vm.as_ref(), Some(id), message);
        self.bump();
        Ok(Begun::New(id))
    }

    /// Keeps what a restarted agent needs to go on.
    ///
    /// # Errors
    /// The database's.
    pub fn remember(&self, id: OperationId, resume: serde_json::Value) -> Result<(), ApiError> {
        let mut record = self.record(id)?;
        record.resume = Some(resume);
        self.records.put_operation(id.as_bytes(), &record).map_err(|error| internal(&error))
    }

    /// Tells followers what is being done now, and keeps it with the operation.
    pub fn step(&self, id: OperationId, message: impl Into<String>) {
        let message = message.into();
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        let vm = active.get_mut(&id).and_then(|active| {
            active.steps.truncate(MAX_STEPS - 1);
            active.steps.push(message.clone());
            active.vm.clone()
        });
        drop(active);
        self.events.emit(EventKind::OperationStep, vm.as_ref(), Some(id), message);
    }

    fn steps_of(&self, id: OperationId) -> Option<Vec<String>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).get(&id).map(|active| active.steps.clone())
    }

    /// Ends an operation. An error here is logged: the operation is then found unfinished at the next start.
    pub fn finish(&self, id: OperationId, result: Result<(), ApiError>) {
        let (vm, steps) = (self.vm_of(id), self.steps_of(id).unwrap_or_default());
        // Until it is no more under way: who reads that it is over may ask for the next one, which begins after it in the events too.
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = self.record(id).and_then(|mut record| {
            record.operation.finished_at = Some(Timestamp::now());
            record.operation.steps = steps;
            record.operation.status = if result.is_ok() { OperationStatus::Completed } else { OperationStatus::Failed };
            record.operation.error = result.as_ref().err().cloned().map(|error| error.operation(id));
            record.resume = None;
            self.records.put_operation(id.as_bytes(), &record).map_err(|error| internal(&error))?;
            reach(Failpoint::OperationEnded);
            Ok(record)
        });
        match outcome {
            Ok(record) => {
                self.count(|counts| {
                    counts.executing = counts.executing.saturating_sub(1);
                    *(if result.is_ok() { &mut counts.completed } else { &mut counts.failed }) += 1;
                });
                let what = format!("{} {}", record.operation.kind.as_str(), record.operation.subject);
                let (kind, message) = match &result {
                    Ok(()) => (EventKind::OperationCompleted, format!("{what} completed")),
                    Err(error) => (EventKind::OperationFailed, format!("{what} failed: {error}")),
                };
                self.events.emit(kind, vm.as_ref(), Some(id), message);
            }
            Err(error) => tracing::error!("operation {id} could not be finished in the database: {error}"),
        }
        active.remove(&id);
        drop(active);
        self.bump();
    }

    /// Whether something is being done to `volume/data`, say.
    pub fn is_under_way(&self, subject: &str) -> bool {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).values().any(|active| active.subject == subject)
    }

    fn vm_of(&self, id: OperationId) -> Option<Name> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).get(&id).and_then(|active| active.vm.clone())
    }

    fn bump(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn record(&self, id: OperationId) -> Result<Record, ApiError> {
        self.records
            .operation(id.as_bytes())
            .map_err(|error| internal(&error))?
            .ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("there is no operation {id}")).hint("list them with `form op ls`"))
    }

    /// # Errors
    /// Not found, or the database's.
    pub fn get(&self, id: OperationId) -> Result<Operation, ApiError> {
        Ok(self.with_steps(self.record(id)?.operation))
    }

    /// While it goes on they are not in the database.
    fn with_steps(&self, mut operation: Operation) -> Operation {
        if !operation.status.is_final() {
            operation.steps = self.steps_of(operation.id).unwrap_or_default();
        }
        operation
    }

    /// The newest `limit` operations, the newest first.
    ///
    /// # Errors
    /// The database's.
    pub fn list(&self, limit: usize) -> Result<Vec<Operation>, ApiError> {
        let records: Vec<Record> = self.records.newest_operations(limit).map_err(|error| internal(&error))?;
        Ok(records.into_iter().map(|record| self.with_steps(record.operation)).collect())
    }

    /// Those that an earlier run of the agent left unfinished; they are active again.
    ///
    /// # Errors
    /// The database's.
    pub fn unfinished(&self) -> Result<Vec<Record>, ApiError> {
        let records: Vec<Record> = self.records.newest_operations(1000).map_err(|error| internal(&error))?;
        let unfinished: Vec<Record> = records.into_iter().filter(|record| !record.operation.status.is_final()).collect();
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        for record in &unfinished {
            let Operation { id, kind, subject, actor, created_at, .. } = record.operation.clone();
            let vm = subject.strip_prefix("vm/").and_then(|name| name.parse().ok());
            active.insert(id, Active { kind, subject, vm, actor, begun: created_at, steps: Vec::new() });
        }
        drop(active);
        Ok(unfinished)
    }

    /// The operation once it is final, or as it is after `limit`.
    ///
    /// # Errors
    /// Not found, or the database's.
    pub async fn wait(&self, id: OperationId, limit: Duration) -> Result<Operation, ApiError> {
        let mut changed = self.changed.subscribe();
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let operation = self.get(id)?;
            if operation.status.is_final() || tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
                return Ok(operation);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operations(directory: &std::path::Path) -> Operations {
        let records = Arc::new(Records::open(directory).unwrap());
        let events = Arc::new(Events::open(Arc::clone(&records)).unwrap());
        Operations::open(records, events).unwrap()
    }

    fn opening(key: u8, subject: &str, request: &str) -> Opening {
        Opening {
            kind: OperationKind::Deploy,
            vm: None,
            subject: subject.to_owned(),
            actor: "test".to_owned(),
            actor_key: form_types::SecretKey::from_bytes([1; 32]).public(),
            idempotency_key: IdempotencyKey::from_bytes([key; 16]),
            request: Asked::new("POST", "/v1/test", request.as_bytes()),
        }
    }

    #[test]
    fn what_is_over_for_who_asks_is_in_nobodys_way() {
        let directory = tempfile::tempdir().unwrap();
        let operations = &operations(directory.path());
        let begin = |key| match operations.begin(opening(key, "vm/web", "")) {
            Ok(Begun::New(id)) => id,
            Ok(Begun::Repeated(_)) => panic!("{key} is not new"),
            Err(error) => panic!("what is over is in the way of {key}: {error}"),
        };
        let mut id = begin(0);
        for key in 1..100 {
            id = std::thread::scope(|scope| {
                scope.spawn(move || operations.finish(id, Ok(())));
                while !operations.get(id).unwrap().status.is_final() {}
                begin(key)
            });
        }
    }

    #[tokio::test]
    async fn what_was_asked_and_done_is_on_record_while_it_goes_on_and_afterwards() {
        let directory = tempfile::tempdir().unwrap();
        {
            let operations = operations(directory.path());
            let Ok(Begun::New(id)) = operations.begin(opening(1, "vm/web", "{\"token\": 1}")) else { panic!("not new") };
            for number in 0..MAX_STEPS + 5 {
                operations.step(id, format!("step {number}"));
            }
            let now = operations.get(id).unwrap();
            assert_eq!((now.steps.len(), now.steps.last().map(String::as_str)), (MAX_STEPS, Some("step 36")));
            assert_eq!(operations.list(1).unwrap(), [now]);
            operations.finish(id, Ok(()));
        }
        let operations = operations(directory.path());
        let ended = operations.list(1).unwrap().remove(0);
        assert_eq!((ended.steps.len(), ended.steps[0].as_str()), (MAX_STEPS, "step 0"));
        assert_eq!(ended.request.unwrap().body, Some(serde_json::json!({"token": "…"})));
        assert_eq!((operations.counts().completed, operations.counts().failed), (1, 0));
    }

    #[tokio::test]
    async fn one_key_is_one_operation() {
        let directory = tempfile::tempdir().unwrap();
        let operations = operations(directory.path());
        let Ok(Begun::New(id)) = operations.begin(opening(1, "vm/web", "a")) else { panic!("not new") };
        assert!(matches!(operations.begin(opening(1, "vm/web", "a")), Ok(Begun::Repeated(again)) if again.id == id));
        assert_eq!(operations.begin(opening(1, "vm/web", "b")).err().map(|error| error.code), Some(ErrorCode::Conflict));
        let busy = operations.begin(opening(2, "vm/web", "b")).err().unwrap();
        assert_eq!((busy.code, busy.operation), (ErrorCode::Conflict, Some(id)));
        assert!(busy.message.contains("deploy of vm/web") && busy.hint.unwrap().contains(&id.to_string()), "{}", busy.message);
        operations.finish(id, Err(ApiError::new(ErrorCode::Failed, "no")));
        let ended = operations.wait(id, Duration::from_secs(1)).await.unwrap();
        assert_eq!((ended.status, ended.error.unwrap().operation), (OperationStatus::Failed, Some(id)));
        assert_eq!(operations.counts(), Counts { total: 1, completed: 0, failed: 1, executing: 0 });
        assert_eq!(operations.counts().error_rate_percent(), 100.0);
        assert!(matches!(operations.begin(opening(2, "vm/web", "b")), Ok(Begun::New(_))));
    }

    #[tokio::test]
    async fn a_destroy_waits_for_nobody_but_another_destroy() {
        let directory = tempfile::tempdir().unwrap();
        let operations = operations(directory.path());
        let destroy = |key| Opening { kind: OperationKind::VmDestroy, ..opening(key, "vm/web", "destroy") };
        assert!(matches!(operations.begin(opening(1, "vm/web", "a")), Ok(Begun::New(_))));
        assert!(matches!(operations.begin(destroy(2)), Ok(Begun::New(_))));
        assert_eq!(operations.begin(destroy(3)).err().map(|error| error.code), Some(ErrorCode::Conflict));
        assert_eq!(operations.begin(opening(4, "vm/web", "b")).err().map(|error| error.code), Some(ErrorCode::Conflict));
    }

    #[test]
    fn a_restart_finds_what_was_left() {
        let directory = tempfile::tempdir().unwrap();
        {
            let operations = operations(directory.path());
            let Ok(Begun::New(id)) = operations.begin(opening(1, "vm/web", "a")) else { panic!("not new") };
            operations.remember(id, serde_json::json!({"step": 3})).unwrap();
            let Ok(Begun::New(done)) = operations.begin(opening(2, "vm/db", "a")) else { panic!("not new") };
            operations.finish(done, Ok(()));
        }
        let operations = operations(directory.path());
        let counts = operations.counts();
        assert_eq!(counts, Counts { total: 2, completed: 1, failed: 0, executing: 1 });
        assert_eq!(counts.error_rate_percent(), 0.0);
        let unfinished = operations.unfinished().unwrap();
        assert_eq!(unfinished.len(), 1);
        assert_eq!(unfinished[0].resume, Some(serde_json::json!({"step": 3})));
        assert!(operations.begin(opening(3, "vm/web", "b")).is_err());
    }
}
