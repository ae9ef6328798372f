//! The agent's own records in redb: operations and events. (What the cluster should be is in `form-state`.)

use std::{
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
};

use form_api::event::Event;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Serialize, de::DeserializeOwned};

/// Operation id -> JSON of [`crate::operation::Record`].
const OPERATIONS: TableDefinition<&[u8; 16], &[u8]> = TableDefinition::new("operations");
/// Order of creation -> operation id.
const OPERATION_ORDER: TableDefinition<u64, &[u8; 16]> = TableDefinition::new("operation-order");
/// Cursor -> JSON of [`form_api::event::Event`].
const EVENTS: TableDefinition<u64, &[u8]> = TableDefinition::new("events");

/// Operations and events kept; the oldest go first.
const KEPT_OPERATIONS: u64 = 10_000;
const KEPT_EVENTS: u64 = 20_000;

#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error("the database {path}: {source}")]
    Open { path: String, source: redb::DatabaseError },
    #[error("the thread that writes events cannot be started: {0}")]
    Thread(std::io::Error),
    #[error("the database: {0}")]
    Redb(#[from] redb::Error),
    #[error("a record in the database is damaged: {0}")]
    Json(#[from] serde_json::Error),
}

impl DatabaseError {
    const fn is_of_the_file_system(&self) -> bool {
        matches!(self, Self::Redb(redb::Error::Io(_) | redb::Error::PreviousIo))
    }
}

fn open(path: &Path) -> Result<Database, DatabaseError> {
    Database::create(path).map_err(|source| DatabaseError::Open { path: path.display().to_string(), source })
}

macro_rules! from_redb {
    ($($error:ident),*) => { $(impl From<redb::$error> for DatabaseError {
        fn from(error: redb::$error) -> Self {
            Self::Redb(error.into())
        }
    })* };
}
from_redb!(TransactionError, TableError, StorageError, CommitError);

/// The library refuses everything after an error of the file system, a full disk included, until the file is opened anew. That is done here:
/// an agent outlives a full disk.
pub struct Records {
    path: PathBuf,
    /// None while it could not be opened again.
    database: RwLock<Option<Database>>,
}

impl Records {
    /// # Errors
    /// When the file cannot be opened, is damaged, or another agent has it open.
    pub fn open(directory: &Path) -> Result<Self, DatabaseError> {
        let path = directory.join("agent.redb");
        let mut database = open(&path)?;
        match form_state::compact(&mut database, &path) {
            Ok(Some((before, after))) => tracing::info!(path = %path.display(), before, after, "the agent's records were made smaller"),
            Ok(None) => {}
            // It costs room, nothing else.
            Err(error) => tracing::warn!(path = %path.display(), %error, "the agent's records cannot be made smaller"),
        }
        let transaction = database.begin_write()?;
        transaction.open_table(OPERATIONS)?;
        transaction.open_table(OPERATION_ORDER)?;
        transaction.open_table(EVENTS)?;
        transaction.commit()?;
        Ok(Self { path, database: RwLock::new(Some(database)) })
    }

    /// Does `work`, once more on the newly opened file when the file system was in the way. A transaction that failed left nothing.
    fn with<T>(&self, work: impl Fn(&Database) -> Result<T, DatabaseError>) -> Result<T, DatabaseError> {
        if let Some(database) = &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            match work(database) {
                Err(error) if error.is_of_the_file_system() => {}
                other => return other,
            }
        }
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // The old one holds the file's lock.
        *database = None;
        work(database.insert(open(&self.path)?))
    }

    /// # Errors
    /// When the database cannot be read or the record is damaged.
    pub fn operation<T: DeserializeOwned>(&self, id: &[u8; 16]) -> Result<Option<T>, DatabaseError> {
        self.with(|database| {
            let table = database.begin_read()?.open_table(OPERATIONS)?;
            Ok(table.get(id)?.map(|value| serde_json::from_slice(value.value())).transpose()?)
        })
    }

    /// Writes a record durably; a new one is put at the end of the order.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_operation<T: Serialize>(&self, id: &[u8; 16], record: &T) -> Result<(), DatabaseError> {
        let json = serde_json::to_vec(record)?;
        self.with(|database| {
            let transaction = database.begin_write()?;
            {
                let mut operations = transaction.open_table(OPERATIONS)?;
                let mut order = transaction.open_table(OPERATION_ORDER)?;
                if operations.insert(id, json.as_slice())?.is_none() {
                    let next = order.last()?.map_or(0, |(last, _)| last.value() + 1);
                    order.insert(next, id)?;
                    let oldest = order.first()?.map(|(first, oldest)| (first.value(), *oldest.value()));
                    if let Some((first, oldest)) = oldest.filter(|(first, _)| next - first >= KEPT_OPERATIONS) {
                        order.remove(first)?;
                        operations.remove(&oldest)?;
                    }
                }
            }
            Ok(transaction.commit()?)
        })
    }

    /// How many operations were ever recorded.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn operations_ever(&self) -> Result<u64, DatabaseError> {
        self.with(|database| {
            let order = database.begin_read()?.open_table(OPERATION_ORDER)?;
            Ok(order.last()?.map_or(0, |(last, _)| last.value() + 1))
        })
    }

    /// The newest `limit` records, the newest first.
    ///
    /// # Errors
    /// When the database cannot be read or a record is damaged.
    pub fn newest_operations<T: DeserializeOwned>(&self, limit: usize) -> Result<Vec<T>, DatabaseError> {
        self.with(|database| {
            let transaction = database.begin_read()?;
            let (operations, order) = (transaction.open_table(OPERATIONS)?, transaction.open_table(OPERATION_ORDER)?);
            let mut newest = Vec::new();
            for entry in order.iter()?.rev().take(limit) {
                if let Some(value) = operations.get(entry?.1.value())? {
                    newest.push(serde_json::from_slice(value.value())?);
                }
            }
            Ok(newest)
        })
    }

    /// Writes events durably, in one go.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn put_events(&self, batch: &[Event]) -> Result<(), DatabaseError> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            {
                let mut events = transaction.open_table(EVENTS)?;
                for event in batch {
                    events.insert(event.cursor, serde_json::to_vec(event)?.as_slice())?;
                    if let Some(old) = event.cursor.checked_sub(KEPT_EVENTS) {
                        events.remove(old)?;
                    }
                }
            }
            Ok(transaction.commit()?)
        })
    }

    /// Events with a cursor above `after`, at most `limit`, in order.
    ///
    /// # Errors
    /// When the database cannot be read or a record is damaged.
    pub fn events_after(&self, after: u64, limit: usize) -> Result<Vec<Event>, DatabaseError> {
        self.with(|database| {
            let table = database.begin_read()?.open_table(EVENTS)?;
            let mut events = Vec::new();
            for entry in table.range(after.saturating_add(1)..)?.take(limit) {
                events.push(serde_json::from_slice(entry?.1.value())?);
            }
            Ok(events)
        })
    }

    /// # Errors
    /// When the database cannot be read.
    pub fn last_event(&self) -> Result<u64, DatabaseError> {
        self.with(|database| {
            let table = database.begin_read()?.open_table(EVENTS)?;
            Ok(table.last()?.map_or(0, |(cursor, _)| cursor.value()))
        })
    }
}
