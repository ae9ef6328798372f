//! From the log to the state in memory: the last snapshot of each document and the changes after it.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
};

use automerge::Change;

use crate::{
    change::{ChangeHash, SignedChange},
    document::{DocumentError, DocumentState, Last},
    error::StateError,
    log::Log,
    replica::{SNAPSHOT_EVERY, State},
    write::Document,
};

pub(crate) fn load(log: &Log) -> Result<State, StateError> {
    let mut clocks: BTreeMap<Document, Vec<_>> = BTreeMap::new();
    for (document, author, seq, hash) in log.clocks()? {
        clocks.entry(document).or_default().push((author, Last { seq, hash }));
    }
    let mut documents = BTreeMap::new();
    for (document, clock) in clocks {
        let mut content = load_document(log, document)?;
        content.clock = clock.into_iter().collect();
        documents.insert(document, content);
    }
    let end = log.end(documents.keys().copied())?;
    let proofs = log.proofs()?.into_iter().map(|(document, author, proof)| ((document, author), proof)).collect();
    Ok(State { documents, end, proofs, broken: false })
}

fn load_document(log: &Log, document: Document) -> Result<DocumentState, StateError> {
    if let Some((from, bytes)) = log.snapshot(document)? {
        match guarded(|| DocumentState::load(&bytes)) {
            Ok(content) => return replay(log, document, content, from),
            // The log has everything that the snapshot has.
            Err(reason) => tracing::warn!(%document, reason, "the snapshot cannot be read: replaying the whole log"),
        }
    }
    replay(log, document, DocumentState::default(), 0)
}

fn replay(log: &Log, document: Document, mut content: DocumentState, mut from: u64) -> Result<DocumentState, StateError> {
    let garbled = |reason: String| log.corrupt(format!("the {document} document: {reason}"));
    loop {
        let mut changes = Vec::new();
        while changes.len() < SNAPSHOT_EVERY
            && let Some((position, bytes)) = log.next(document, from)?
        {
            let change = read(&bytes).map_err(|reason| log.corrupt(format!("change {position} of the {document} document: {reason}")))?;
            changes.push(change);
            from = position + 1;
        }
        if changes.is_empty() {
            break;
        }
        guarded(|| content.replay(changes)).map_err(garbled)?;
    }
    for head in &content.heads {
        if !log.node(head)?.is_some_and(|node| node.is_of(document)) {
            return Err(garbled("it has a head that the log lacks".to_owned()));
        }
    }
    guarded(|| content.index()).map_err(garbled)?;
    Ok(content)
}

fn read(bytes: &[u8]) -> Result<Change, String> {
    let signed = SignedChange::decode_trusted(bytes).map_err(|error| error.to_string())?;
    let change = guarded(|| Change::from_bytes(signed.change).map_err(|_| DocumentError::NotApplied))?;
    if ChangeHash::from_automerge(change.hash()) == signed.hash { Ok(change) } else { Err("its hash is another".to_owned()) }
}

/// Runs `work`; automerge may panic on bytes that the disk has garbled.
fn guarded<T>(work: impl FnOnce() -> Result<T, DocumentError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("it is garbled".to_owned()),
    }
}
