//! What happened, in order: kept in the database, and told to followers as it happens.

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use form_api::event::{Event, EventKind, EventsQuery};
use form_types::{Name, OperationId};
use jiff::Timestamp;
use tokio::sync::watch;

use crate::database::{DatabaseError, Records};

/// Events a follower is handed at a time.
const PAGE: usize = 256;

/// The longest wait for what is on its way to the disk.
const SETTLE: Duration = Duration::from_secs(2);

pub struct Events {
    records: Arc<Records>,
    /// `None` when the agent ends.
    queue: Mutex<Option<Queue>>,
    /// The newest cursor that is on the disk. Followers read the database, so a slow one misses nothing and costs no memory.
    newest: watch::Sender<u64>,
    writer: Option<JoinHandle<()>>,
}

/// Events on their way to the disk.
struct Queue {
    /// Of the last event that was emitted.
    cursor: u64,
    sender: mpsc::Sender<Event>,
}

impl Events {
    /// # Errors
    /// When the database cannot be read, or there is no thread to be had.
    pub fn open(records: Arc<Records>) -> Result<Self, DatabaseError> {
        let cursor = records.last_event()?;
        let newest = watch::Sender::new(cursor);
        let (sender, receiver) = mpsc::channel();
        let (database, told) = (Arc::clone(&records), newest.clone());
        // A thread of its own: who emits an event never waits for the disk.
        let writer = std::thread::Builder::new().name("events".to_owned()).spawn(move || write(&database, &receiver, &told));
        let writer = Some(writer.map_err(DatabaseError::Thread)?);
        Ok(Self { records, queue: Mutex::new(Some(Queue { cursor, sender })), newest, writer })
    }

    /// Followers see the event once it is on the disk. An agent that is killed before forgets it, and gives its cursor to another that
    /// nobody has seen.
    pub fn emit(&self, kind: EventKind, vm: Option<&Name>, operation: Option<OperationId>, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(kind = ?kind, vm = vm.map(Name::as_str), "{message}");
        // Held while the event is queued, so that cursors reach the database in order.
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = &mut *queue else { return };
        queue.cursor += 1;
        let event = Event { cursor: queue.cursor, at: Timestamp::now(), kind, vm: vm.cloned(), operation, message };
        if queue.sender.send(event).is_err() {
            tracing::error!("an event could not be kept: its writer has ended");
        }
    }

    /// Waits until everything that was emitted before can be read: who was told that an operation is done finds its steps. Not for long, since
    /// the disk may hang.
    pub async fn settled(&self) {
        let emitted = self.queue.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, |queue| queue.cursor);
        let mut newest = self.subscribe();
        let _ = tokio::time::timeout(SETTLE, newest.wait_for(|newest| *newest >= emitted)).await;
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// The next page after `cursor` that the query asks for, and the cursor to go on from.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn page(&self, cursor: u64, query: &EventsQuery) -> Result<(Vec<Event>, u64), DatabaseError> {
        let events = self.records.events_after(cursor, PAGE)?;
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

/// Writes what is queued, as much as there is in one go, until the agent ends.
fn write(records: &Records, queue: &mpsc::Receiver<Event>, newest: &watch::Sender<u64>) {
    while let Ok(first) = queue.recv() {
        let mut batch = vec![first];
        batch.extend(queue.try_iter().take(PAGE));
        if let Err(error) = records.put_events(&batch) {
            tracing::error!("{} events could not be kept: {error}", batch.len());
        }
        if let Some(last) = batch.last() {
            newest.send_replace(last.cursor);
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = self.writer.take() {
            // What it had to say about a panic, the runtime has said.
            let _ = writer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_emitted_before_a_question_is_in_the_answer() {
        let directory = tempfile::tempdir().unwrap();
        let events = Events::open(Arc::new(Records::open(directory.path()).unwrap())).unwrap();
        for number in 0..20 {
            let before = events.start(&EventsQuery { tail: Some(0), ..EventsQuery::default() });
            events.emit(EventKind::OperationStep, None, None, format!("event {number}"));
            events.settled().await;
            let (page, _) = events.page(before, &EventsQuery::default()).unwrap();
            assert_eq!(page.last().map(|event| event.message.clone()), Some(format!("event {number}")));
        }
    }

    #[tokio::test]
    async fn a_follower_resumes_after_its_cursor_even_across_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let web: Name = "web".parse().unwrap();
        {
            let events = Events::open(Arc::new(Records::open(directory.path()).unwrap())).unwrap();
            for number in 0..3 {
                events.emit(EventKind::VmStarted, (number != 1).then_some(&web), None, format!("event {number}"));
            }
            assert!(events.subscribe().wait_for(|newest| *newest == 3).await.is_ok());
            let query = EventsQuery { vm: Some(web.clone()), ..EventsQuery::default() };
            let (page, last) = events.page(events.start(&query), &query).unwrap();
            assert_eq!(page.iter().map(|event| event.cursor).collect::<Vec<_>>(), [1, 3]);
            assert_eq!(last, 3);
        }
        let events = Events::open(Arc::new(Records::open(directory.path()).unwrap())).unwrap();
        events.emit(EventKind::VmStarted, None, None, "later");
        assert!(events.subscribe().wait_for(|newest| *newest == 4).await.is_ok());
        let (page, last) = events.page(3, &EventsQuery::default()).unwrap();
        assert_eq!((page.len(), page[0].message.as_str(), last), (1, "later", 4));
    }
}
