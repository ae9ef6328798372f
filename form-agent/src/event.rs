//! What happened, in order: kept in the database, and told to followers as it happens.

use std::sync::{Arc, Mutex, PoisonError};

use form_api::event::{Event, EventKind, EventsQuery};
use form_types::{Name, OperationId};
use jiff::Timestamp;
use tokio::sync::watch;

use crate::database::{DatabaseError, Records};

/// Events a follower is handed at a time.
const PAGE: usize = 256;

pub struct Events {
    records: Arc<Records>,
    cursor: Mutex<u64>,
    /// The newest cursor. Followers read the database, so a slow one misses nothing and costs no memory.
    newest: watch::Sender<u64>,
}

impl Events {
    /// # Errors
    /// When the database cannot be read.
    pub fn open(records: Arc<Records>) -> Result<Self, DatabaseError> {
        let cursor = records.last_event()?;
        Ok(Self { records, cursor: Mutex::new(cursor), newest: watch::Sender::new(cursor) })
    }

    pub fn emit(&self, kind: EventKind, vm: Option<&Name>, operation: Option<OperationId>, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(kind = ?kind, vm = vm.map(Name::as_str), "{message}");
        // Held while the event is written, so that cursors reach the database in order.
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        *cursor += 1;
        let event = Event { cursor: *cursor, at: Timestamp::now(), kind, vm: vm.cloned(), operation, message };
        if let Err(error) = self.records.put_event(*cursor, &event) {
            tracing::error!("an event could not be kept: {error}");
        }
        self.newest.send_replace(*cursor);
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// The next page after `cursor` that the query asks for, and the cursor to go on from.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn page(&self, cursor: u64, query: &EventsQuery) -> Result<(Vec<Event>, u64), DatabaseError> {
        let events: Vec<Event> = self.records.events_after(cursor, PAGE)?;
        let last = events.last().map_or(cursor, |event| event.cursor);
        let wanted = events.into_iter().filter(|event| {
            query.vm.as_ref().is_none_or(|vm| event.vm.as_ref() == Some(vm)) && query.operation.is_none_or(|id| event.operation == Some(id))
        });
        Ok((wanted.collect(), last))
    }

    /// Where a query begins: after its cursor, or so that about `tail` events are left.
    pub fn start(&self, query: &EventsQuery) -> u64 {
        let newest = *self.newest.borrow();
        match (query.after, query.tail) {
            (Some(after), _) => after,
            (None, Some(tail)) => newest.saturating_sub(tail as u64),
            (None, None) if query.operation.is_some() || query.vm.is_some() => 0,
            (None, None) => newest.saturating_sub(100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_resumes_after_its_cursor_even_across_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let web: Name = "web".parse().unwrap();
        {
            let events = Events::open(Arc::new(Records::open(directory.path()).unwrap())).unwrap();
            for number in 0..3 {
                events.emit(EventKind::VmStarted, (number != 1).then_some(&web), None, format!("event {number}"));
            }
            let query = EventsQuery { vm: Some(web.clone()), ..EventsQuery::default() };
            let (page, last) = events.page(events.start(&query), &query).unwrap();
            assert_eq!(page.iter().map(|event| event.cursor).collect::<Vec<_>>(), [1, 3]);
            assert_eq!(last, 3);
        }
        let events = Events::open(Arc::new(Records::open(directory.path()).unwrap())).unwrap();
        events.emit(EventKind::VmStarted, None, None, "later");
        let (page, last) = events.page(3, &EventsQuery::default()).unwrap();
        assert_eq!((page.len(), page[0].message.as_str(), last), (1, "later", 4));
    }
}
