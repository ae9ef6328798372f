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
    replica::State,
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
    while let Some((position, bytes)) = log.next(document, from)? {
        let damaged = |reason: String| log.corrupt(format!("change {position} of the {document} document: {reason}"));
        let signed = SignedChange::decode_trusted(&bytes).map_err(|error| damaged(error.to_string()))?;
        guarded(|| {
            let change = Change::from_bytes(signed.change).map_err(|_| DocumentError::NotApplied)?;
            if ChangeHash::from_automerge(change.hash()) != signed.hash {
                return Err(DocumentError::NotApplied);
            }
            content.apply_unindexed(change, signed.author)
        })
        .map_err(damaged)?;
        from = position + 1;
    }
    let heads = content.heads.clone();
    for head in heads {
        if !log.node(&head)?.is_some_and(|node| node.is_of(document)) {
            return Err(log.corrupt(format!("the {document} document has a head that the log lacks")));
        }
    }
    guarded(|| content.index()).map_err(|reason| log.corrupt(format!("the {document} document: {reason}")))?;
    Ok(content)
}

/// Runs `work`; automerge may panic on bytes that the disk has garbled.
fn guarded<T>(work: impl FnOnce() -> Result<T, DocumentError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("it is garbled".to_owned()),
    }
}
