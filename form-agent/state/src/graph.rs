//! Questions about the history: what is here, what another replica lacks.

use std::collections::{BTreeMap, BTreeSet};

use form_types::PublicKey;

use crate::{
    change::{ChangeHash, SignedChange},
    error::StateError,
    log::Proof,
    refused::Refused,
    replica::Replica,
    write::Document,
};

/// How far a replica has come: of each author of each document, the number and the hash of the last change. A replica holds
/// whole histories, so this says all that it has.
pub type Clock = BTreeMap<(Document, PublicKey), (u64, ChangeHash)>;

impl Replica {
    /// The changes of a document that no other builds on.
    pub fn heads(&self, document: Document) -> Vec<ChangeHash> {
        self.state().documents.get(&document).map(|content| content.heads.iter().copied().collect()).unwrap_or_default()
    }

    /// The documents that have changes.
    pub fn documents(&self) -> Vec<Document> {
        self.state().documents.keys().copied().collect()
    }

    /// # Errors
    /// When the database cannot be read.
    pub fn have(&self, hash: &ChangeHash) -> Result<bool, StateError> {
        Ok(self.log().node(hash)?.is_some())
    }

    /// Which of another replica's heads are not here.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn missing(&self, heads: &[ChangeHash]) -> Result<Vec<ChangeHash>, StateError> {
        let mut missing = Vec::new();
        for head in heads {
            if !self.have(head)? {
                missing.push(*head);
            }
        }
        Ok(missing)
    }

    /// The signed change with this hash, as bytes.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn signed_change(&self, hash: &ChangeHash) -> Result<Option<Vec<u8>>, StateError> {
        match self.log().node(hash)? {
            Some(node) => self.log().signed(node.document_bytes(), node.position),
            None => Ok(None),
        }
    }

    /// The signed changes of `document` that are neither among `heads` nor before them, causes first. Heads that are not
    /// here count for nothing. Reads the document's whole log: between replicas [`Replica::changes_after`] is the way.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn changes_since(&self, document: Document, heads: &[ChangeHash]) -> Result<Vec<Vec<u8>>, StateError> {
        let mut known: BTreeSet<ChangeHash> = heads.iter().copied().collect();
        let mut changes = Vec::new();
        let mut before = u64::MAX;
        while let Some((position, bytes)) = self.log().previous(document, before)? {
            let change = self.read(&bytes)?;
            if known.contains(&change.hash) {
                known.extend(change.deps);
            } else {
                changes.push(bytes);
            }
            before = position;
        }
        changes.reverse();
        Ok(changes)
    }

    fn read(&self, bytes: &[u8]) -> Result<SignedChange, StateError> {
        SignedChange::decode_trusted(bytes).map_err(|error| self.log().corrupt(error.to_string()))
    }

    /// Reads the whole log again: signatures, hashes, numbers, causes before effects. Says how many changes there are.
    ///
    /// # Errors
    /// [`StateError::Corrupt`] names the first thing that is wrong.
    pub fn verify(&self) -> Result<u64, StateError> {
        let mut count = 0;
        for document in self.documents() {
            let mut clock: BTreeMap<PublicKey, u64> = BTreeMap::new();
            let mut from = 0;
            while let Some((position, bytes)) = self.log().next(document, from)? {
                let wrong = |what: &str| self.log().corrupt(format!("change {position} of the {document} document: {what}"));
                let change = SignedChange::decode(&bytes).map_err(|error| wrong(&error.to_string()))?;
                let seq = clock.entry(change.author).or_default();
                *seq += 1;
                let node = self.log().node(&change.hash)?.ok_or_else(|| wrong("the index lacks it"))?;
                if change.document != document || change.seq != *seq || node.position != position || node.deps != change.deps {
                    return Err(wrong("it does not agree with the index"));
                }
                for dep in &change.deps {
                    if self.log().node(dep)?.is_none_or(|dep| dep.position >= position) {
                        return Err(wrong("it comes before what it depends on"));
                    }
                }
                count += 1;
                from = position + 1;
            }
        }
        Ok(count)
    }

    pub fn clock(&self) -> Clock {
        let state = self.state();
        let entries = state
            .documents
            .iter()
            .flat_map(|(document, content)| content.clock.iter().map(|(author, last)| ((*document, *author), (last.seq, last.hash))));
        entries.collect()
    }

    /// The signed changes that a replica with `clock` lacks, causes first, until they make `limit` bytes (one at least, when
    /// there is one); and the clock that it has once it has taken them.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn changes_after(&self, clock: &Clock, limit: usize) -> Result<(Vec<Vec<u8>>, Clock), StateError> {
        let mut after = clock.clone();
        let mut changes = Vec::new();
        let mut size = 0;
        let mut lagging: BTreeMap<Document, u64> = BTreeMap::new();
        for ((document, author), (seq, _)) in self.clock() {
            let theirs = clock.get(&(document, author)).map_or(0, |(seq, _)| *seq);
            if theirs < seq
                && let Some(hash) = self.log().hash_of(document, &author, theirs + 1)?
                && let Some(node) = self.log().node(&hash)?
            {
                let from = lagging.entry(document).or_insert(node.position);
                *from = node.position.min(*from);
            }
        }
        for (document, mut from) in lagging {
            while let Some((position, bytes)) = self.log().next(document, from)? {
                from = position + 1;
                let (author, seq) =
                    SignedChange::peek(&bytes).ok_or_else(|| self.log().corrupt(format!("change {position} is unreadable")))?;
                if after.get(&(document, author)).is_some_and(|(theirs, _)| *theirs >= seq) {
                    continue;
                }
                if !changes.is_empty() && size + bytes.len() > limit {
                    return Ok((changes, after));
                }
                size += bytes.len();
                let hash = self.read(&bytes)?.hash;
                changes.push(bytes);
                after.insert((document, author), (seq, hash));
            }
        }
        Ok((changes, after))
    }

    /// This replica's change number `seq` of an author, when it is another than the one with `hash`: one of two that the
    /// author should not have signed.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn disputed(&self, document: Document, author: &PublicKey, seq: u64, hash: &ChangeHash) -> Result<Option<Vec<u8>>, StateError> {
        match self.log().hash_of(document, author, seq)? {
            Some(ours) if ours != *hash => self.signed_change(&ours),
            _ => Ok(None),
        }
    }

    /// Who has signed two different changes under one number, with the two. Its history goes on here from the one that came
    /// first; replicas that hold the other cannot follow, so its host should be put out of the cluster.
    pub fn equivocations(&self) -> BTreeMap<(Document, PublicKey), Proof> {
        self.state().proofs.clone()
    }

    pub fn is_equivocator(&self, author: &PublicKey) -> bool {
        self.state().proofs.keys().any(|(_, who)| who == author)
    }

    /// Takes a proof from elsewhere; `true` when it is news.
    ///
    /// # Errors
    /// [`Refused`] when it proves nothing.
    pub fn receive_proof(&self, proof: &Proof) -> Result<bool, Refused> {
        let (held, other) = (SignedChange::decode(&proof.held)?, SignedChange::decode(&proof.other)?);
        for change in [&held, &other] {
            if change.cluster != self.cluster() {
                return Err(Refused::OtherCluster(change.cluster));
            }
        }
        let place = |change: &SignedChange| (change.document, change.author, change.seq);
        if place(&held) != place(&other) || held.seq != proof.seq || held.hash == other.hash {
            return Err(Refused::NotTheChange);
        }
        Ok(self.keep_proof(held.document, held.author, proof.clone())?)
    }
}
