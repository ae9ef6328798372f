//! One peer's session.

use std::collections::BTreeSet;

use form_types::PublicKey;

use super::message::{Message, MessageError, read_clock};
use crate::{
    change::ChangeHash,
    error::StateError,
    graph::Clock,
    refused::{Applied, Blame, Refused},
    replica::Replica,
    write::Document,
};

/// Milliseconds on any clock that does not go back.
pub type Time = u64;

/// Changes in one message, in bytes (a larger change goes alone).
const MESSAGE_BYTES: usize = 256 << 10;
/// Bytes under way before the peer's clock is heard again.
const WINDOW_BYTES: usize = 1 << 20;
/// An unchanged clock is said again after this long.
const ANNOUNCE_EVERY: Time = 10_000;
/// What was sent and not acknowledged is sent again after this long, then after twice that, and so on.
const RETRY_FIRST: Time = 1_000;
const RETRY_LAST: Time = 60_000;
/// Changes shown because of a dispute, between two announcements.
const MAX_DISPUTES: usize = 64;

/// What a message brought.
#[derive(Clone, Debug)]
pub enum Event {
    Applied(ChangeHash),
    /// A change was refused, but not by the peer's fault alone.
    Refused(Refused),
    /// A host has signed two histories; [`Replica::equivocations`] has the proof.
    Equivocation(Document, PublicKey),
}

/// Why the session is over: the peer sent what no honest peer can send.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("the peer sent a change that it cannot have taken itself: {0}")]
    Lied(Refused),
    #[error("the session is over: the peer sent what no honest peer can send")]
    Over,
}

/// The state of the talk with one peer. [`Session::poll`] until it gives nothing, again at [`Session::wake_at`], after each
/// [`Session::handle`] and when the replica has changed.
#[derive(Debug, Default)]
pub struct Session {
    /// What the peer says it has.
    peer: Option<Clock>,
    /// What it will have when all that was sent arrives.
    sent: Clock,
    in_flight: usize,
    /// The generation and time of the last clock that was sent.
    announced: Option<(u64, Time)>,
    acknowledge: bool,
    retry_at: Option<Time>,
    retry_after: Time,
    /// Proofs that the peer says it has, or was sent since the last announcement.
    proofs: BTreeSet<(Document, PublicKey)>,
    /// Changes that the peer was shown since the last announcement because it holds another under their number.
    disputes: BTreeSet<(Document, PublicKey)>,
    pending: Vec<Vec<u8>>,
    over: bool,
}

impl Session {
    pub fn new() -> Self {
        Self { retry_after: RETRY_FIRST, ..Self::default() }
    }

    /// When to poll again at the latest.
    pub fn wake_at(&self) -> Time {
        let announce = self.announced.map_or(0, |(_, at)| at + ANNOUNCE_EVERY);
        self.retry_at.map_or(announce, |retry| retry.min(announce))
    }

    /// The next message to send, if there is one.
    ///
    /// # Errors
    /// When this replica's database cannot be read.
    pub fn poll(&mut self, replica: &Replica, now: Time) -> Result<Option<Vec<u8>>, StateError> {
        if self.over {
            return Ok(None);
        }
        let generation = replica.generation();
        if self.acknowledge || self.announced.is_none_or(|(said, at)| said != generation || now >= at + ANNOUNCE_EVERY) {
            if self.announced.is_none_or(|(_, at)| now >= at + ANNOUNCE_EVERY) {
                self.proofs.clear();
                self.disputes.clear();
            }
            self.acknowledge = false;
            self.announced = Some((generation, now));
            return encode(&Message::clock(&replica.clock(), replica.equivocations().into_keys())).map(Some);
        }
        if self.peer.is_none() {
            return Ok(None);
        }
        for ((document, author), proof) in replica.equivocations() {
            if self.proofs.insert((document, author)) {
                return encode(&Message::Proof(proof)).map(Some);
            }
        }
        if let Some(change) = self.pending.pop() {
            return encode(&Message::Changes(vec![change])).map(Some);
        }
        self.send_changes(replica, now)
    }

    fn send_changes(&mut self, replica: &Replica, now: Time) -> Result<Option<Vec<u8>>, StateError> {
        let Some(peer) = &self.peer else { return Ok(None) };
        if self.retry_at.is_some_and(|at| now >= at) {
            self.sent.clear();
            self.in_flight = 0;
            self.retry_at = None;
            self.retry_after = (self.retry_after * 2).min(RETRY_LAST);
        }
        if self.in_flight >= WINDOW_BYTES {
            return Ok(None);
        }
        let mut expected = peer.clone();
        for (key, sent) in &self.sent {
            let entry = expected.entry(*key).or_insert(*sent);
            if entry.0 < sent.0 {
                *entry = *sent;
            }
        }
        let (changes, after) = replica.changes_after(&expected, MESSAGE_BYTES)?;
        if changes.is_empty() {
            return Ok(None);
        }
        self.in_flight += changes.iter().map(Vec::len).sum::<usize>();
        self.sent = after;
        self.retry_at.get_or_insert(now + self.retry_after);
        encode(&Message::Changes(changes)).map(Some)
    }

    /// Takes a message from the peer.
    ///
    /// # Errors
    /// A [`Fault`] when the peer lies; the session is over then and the replica as before.
    pub fn handle(&mut self, replica: &Replica, message: &[u8]) -> Result<Vec<Event>, Fault> {
        if self.over {
            return Err(Fault::Over);
        }
        let result = self.take(replica, message);
        self.over = result.is_err();
        result
    }

    fn take(&mut self, replica: &Replica, message: &[u8]) -> Result<Vec<Event>, Fault> {
        match Message::decode(message)? {
            Message::Clock { entries, proofs } => {
                let read = |(document, author): ([u8; 33], [u8; 32])| {
                    Some((Document::from_bytes(&document)?, PublicKey::from_bytes(author).ok()?))
                };
                self.proofs.extend(proofs.into_iter().filter_map(read));
                Ok(self.take_clock(replica, read_clock(entries)))
            }
            Message::Changes(changes) => self.take_changes(replica, &changes),
            Message::Proof(proof) => match replica.receive_proof(&proof) {
                Ok(true) => {
                    Ok(replica.equivocations().into_keys().map(|(document, author)| Event::Equivocation(document, author)).collect())
                }
                Ok(false) => Ok(Vec::new()),
                Err(refused) if refused.blame() == Blame::Sender => Err(Fault::Lied(refused)),
                Err(refused) => Ok(vec![Event::Refused(refused)]),
            },
        }
    }

    fn take_clock(&mut self, replica: &Replica, clock: Clock) -> Vec<Event> {
        let covers = |key: &(Document, PublicKey), seq: u64| clock.get(key).is_some_and(|(theirs, _)| *theirs >= seq);
        let progress =
            self.peer.as_ref().is_none_or(|peer| clock.iter().any(|(key, (seq, _))| peer.get(key).is_none_or(|(old, _)| old < seq)));
        if progress {
            self.retry_after = RETRY_FIRST;
        }
        if self.sent.iter().all(|(key, (seq, _))| covers(key, *seq)) {
            self.sent.clear();
            self.retry_at = None;
        }
        self.in_flight = 0;
        let mut events = Vec::new();
        for ((document, author), (seq, hash)) in &clock {
            if self.proofs.contains(&(*document, *author)) || self.disputes.len() >= MAX_DISPUTES {
                continue;
            }
            match replica.disputed(*document, author, *seq, hash) {
                // The peer holds another change under this number (or makes one up): show it ours, once.
                Ok(Some(change)) if self.disputes.insert((*document, *author)) => self.pending.push(change),
                Ok(_) => {}
                Err(error) => events.push(Event::Refused(error.into())),
            }
        }
        self.peer = Some(clock);
        events
    }

    fn take_changes(&mut self, replica: &Replica, changes: &[Vec<u8>]) -> Result<Vec<Event>, Fault> {
        self.acknowledge = true;
        let mut events = Vec::new();
        let mut lie = None;
        for result in replica.receive_all(changes) {
            match result {
                Ok(Applied::New(hash)) => events.push(Event::Applied(hash)),
                Ok(Applied::Held) => {}
                Err(Refused::Equivocation { document, author, .. }) => events.push(Event::Equivocation(document, author)),
                Err(refused) if refused.blame() == Blame::Sender => lie = Some(refused),
                Err(refused) => events.push(Event::Refused(refused)),
            }
        }
        match lie {
            Some(refused) => Err(Fault::Lied(refused)),
            None => Ok(events),
        }
    }
}

fn encode(message: &Message) -> Result<Vec<u8>, StateError> {
    message.encode().map_err(|error| StateError::Document(error.to_string()))
}
