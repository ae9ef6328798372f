//! A batch of changes on its way in: everything is tried on copies, so that dropping the batch undoes it.

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
};

use automerge::Change;
use form_types::PublicKey;

use crate::{
    change::{ChangeHash, MAX_CHANGE, MAX_DEPENDENCIES, SignedChange, SignedRequest},
    document::{DocumentError, DocumentState, Draft, Last},
    error::StateError,
    log::{Append, Entry, Node, Proof},
    refused::{Applied, Refused},
    replica::{ChangeSummary, Replica, SNAPSHOT_EVERY, State},
    rules::Claim,
    view::View,
    write::{Document, RecordId, Scope, Table, Write, check_all},
};

/// What a batch leaves to be made durable and visible.
pub(crate) struct Outcome {
    pub append: Append,
    pub documents: BTreeMap<Document, DocumentState>,
    pub summaries: Vec<ChangeSummary>,
    pub end: u64,
}

pub(crate) struct Batch<'a> {
    replica: &'a Replica,
    state: &'a State,
    documents: BTreeMap<Document, DocumentState>,
    append: Append,
    /// Where each change of this batch is among `append.entries`.
    fresh: BTreeMap<ChangeHash, usize>,
    summaries: Vec<ChangeSummary>,
}

/// What is needed to apply a change that has been found good.
struct Ready {
    change: Change,
    touched: BTreeSet<(Table, RecordId)>,
    max_op: u64,
}

impl<'a> Batch<'a> {
    pub fn new(replica: &'a Replica, state: &'a State) -> Self {
        Self { replica, state, documents: BTreeMap::new(), append: Append::default(), fresh: BTreeMap::new(), summaries: Vec::new() }
    }

    /// The batch's copy of a document.
    fn document(&mut self, document: Document) -> &mut DocumentState {
        self.documents.entry(document).or_insert_with(|| self.state.documents.get(&document).cloned().unwrap_or_default())
    }

    /// A document to read.
    fn peek(&self, document: Document) -> Option<&DocumentState> {
        self.documents.get(&document).or_else(|| self.state.documents.get(&document))
    }

    fn end(&self) -> u64 {
        self.state.end + self.append.entries.len() as u64
    }

    fn node(&self, hash: &ChangeHash) -> Result<Option<Node>, StateError> {
        match self.fresh.get(hash) {
            Some(index) => Ok(Some(self.append.entries[*index].node.clone())),
            None => self.replica.log().node(hash),
        }
    }

    /// The state as a host's own document is judged by: everything, with what this batch has added.
    fn present(&self) -> View {
        let mut view = View::clone(&self.replica.view());
        for (document, content) in &self.documents {
            view.set(*document, content.tables.clone());
        }
        view
    }

    /// The view by which a change of `document` with dependencies `deps` is judged.
    fn judged_by(&self, document: Document, deps: &[ChangeHash]) -> Result<View, DocumentError> {
        match (document, self.peek(document)) {
            (Document::Host(_), _) => Ok(self.present()),
            (Document::Cluster, None) => Ok(View::default()),
            (Document::Cluster, Some(content)) => content.tables_at(deps).map(View::of_cluster),
        }
    }

    /// One more than the greatest operation counter among the dependencies, which is what an honest author counts from.
    fn start_op(nodes: &[Node]) -> u64 {
        nodes.iter().map(|node| node.max_op).max().unwrap_or(0) + 1
    }

    /// Makes, signs and applies a change of this host's own.
    pub fn make(
        &mut self,
        document: Document,
        request: Option<SignedRequest>,
        writes: Option<Vec<Write>>,
        time: i64,
    ) -> Result<Option<ChangeHash>, StateError> {
        let author = self.replica.host();
        if let Some(proof) = self.state.proofs.get(&(document, author)) {
            return Err(StateError::SelfEquivocation { document: document.to_string(), seq: proof.seq });
        }
        let content = self.document(document);
        let deps: Vec<ChangeHash> = content.heads.iter().copied().collect();
        let seq = content.clock.get(&author).map_or(0, |last| last.seq) + 1;
        let view = self.judged_by(document, &deps).map_err(document_error)?;
        let claim = Claim { document, author, time };
        let writes = match &request {
            Some(request) => {
                let derived = self.replica.rules().derive(request, &claim, &view)?;
                if writes.is_some_and(|writes| writes != derived) {
                    return Err(StateError::NotDerived);
                }
                if check_all(&derived)? == Some(Scope::Host) {
                    return Err(crate::write::WriteError::MixedScopes.into());
                }
                derived
            }
            None => {
                let writes = writes.unwrap_or_default();
                self.replica.rules().permit(&claim, &writes, &view)?;
                writes
            }
        };
        let mut nodes = Vec::with_capacity(deps.len());
        for dep in &deps {
            nodes.push(self.node(dep)?.ok_or_else(|| self.replica.log().corrupt(format!("change {dep} is missing")))?);
        }
        let message = SignedChange::binding(&self.replica.cluster(), &document, request.as_ref());
        let draft = Draft { author, seq, start_op: Self::start_op(&nodes), time, deps: deps.clone(), message };
        let Some(change) = self.document(document).build(draft, &writes).map_err(document_error)? else { return Ok(None) };
        let size = change.raw_bytes().len();
        if size > MAX_CHANGE {
            return Err(StateError::TooLarge { size, limit: MAX_CHANGE });
        }
        if deps.len() > MAX_DEPENDENCIES {
            return Err(StateError::Document(format!("it has {} heads, more than a change may name", deps.len())));
        }
        let hash = ChangeHash::from_automerge(change.hash());
        let own = if request.is_some() { Vec::new() } else { writes.clone() };
        let cluster = self.replica.cluster();
        let bytes = change.raw_bytes().to_vec();
        let signed = SignedChange { cluster, document, author, seq, time, deps, request, writes: own, change: bytes, hash };
        let encoded = signed.sign(self.replica.key()).map_err(|error| match error {
            crate::change::DecodeError::TooLarge(size) => StateError::TooLarge { size, limit: crate::change::MAX_SIGNED_CHANGE },
            other => StateError::Document(other.to_string()),
        })?;
        let ready = Ready { max_op: change.max_op(), change, touched: touched(&writes) };
        self.apply(&signed, encoded, ready).map_err(|refused| StateError::Document(refused.to_string()))?;
        Ok(Some(hash))
    }

    /// Checks and applies a change from elsewhere.
    pub fn admit(&mut self, bytes: &[u8]) -> Result<Applied, Refused> {
        let signed = SignedChange::decode(bytes)?;
        let SignedChange { document, author, seq, .. } = signed;
        if signed.cluster != self.replica.cluster() {
            return Err(Refused::OtherCluster(signed.cluster));
        }
        if let Document::Host(host) = document
            && host != author
        {
            return Err(Refused::ForeignDocument { author, document });
        }
        if self.node(&signed.hash)?.is_some() {
            return Ok(Applied::Held);
        }
        let last = self.peek(document).and_then(|content| content.clock.get(&author).copied());
        let expected = last.map_or(0, |last| last.seq) + 1;
        if seq == 0 {
            return Err(Refused::Sequence { found: seq, expected });
        }
        if seq < expected {
            self.witness(document, author, seq, bytes)?;
            return Err(Refused::Equivocation { document, author, seq });
        }
        let nodes = self.dependencies(&signed)?;
        if seq != expected {
            return Err(Refused::Sequence { found: seq, expected });
        }
        if let Some(last) = last
            && !self.descends(&signed.deps, &nodes, last)?
        {
            return Err(Refused::Fork(last.seq));
        }
        let ready = self.judge(&signed, &nodes)?;
        let hash = signed.hash;
        self.apply(&signed, bytes.to_vec(), ready)?;
        Ok(Applied::New(hash))
    }

    fn dependencies(&self, signed: &SignedChange) -> Result<Vec<Node>, Refused> {
        let mut nodes = Vec::with_capacity(signed.deps.len());
        let mut missing = Vec::new();
        for dep in &signed.deps {
            match self.node(dep)? {
                Some(node) if !node.is_of(signed.document) => return Err(Refused::ForeignDependency),
                Some(node) => nodes.push(node),
                None => missing.push(*dep),
            }
        }
        if missing.is_empty() { Ok(nodes) } else { Err(Refused::Missing(missing)) }
    }

    /// Whether `ancestor` is among `deps` or before them. Positions ascend from causes to effects, so nothing older than the
    /// ancestor need be looked at.
    fn descends(&self, deps: &[ChangeHash], nodes: &[Node], ancestor: Last) -> Result<bool, StateError> {
        let Some(target) = self.node(&ancestor.hash)? else { return Ok(false) };
        let mut seen: BTreeSet<ChangeHash> = deps.iter().copied().collect();
        let mut queue: Vec<Node> = nodes.to_vec();
        if seen.contains(&ancestor.hash) {
            return Ok(true);
        }
        while let Some(node) = queue.pop() {
            for dep in node.deps {
                if dep == ancestor.hash {
                    return Ok(true);
                }
                if seen.insert(dep)
                    && let Some(next) = self.node(&dep)?
                    && next.position > target.position
                {
                    queue.push(next);
                }
            }
        }
        Ok(false)
    }

    /// Derives what the change may say and builds the one change that says it; the bytes must be the same.
    fn judge(&self, signed: &SignedChange, nodes: &[Node]) -> Result<Ready, Refused> {
        let SignedChange { document, author, seq, time, .. } = *signed;
        let empty = DocumentState::default();
        let content = self.peek(document).unwrap_or(&empty);
        let judged = |error: DocumentError| Refused::Document(error.to_string());
        let view = self.judged_by(document, &signed.deps).map_err(judged)?;
        let claim = Claim { document, author, time };
        let derived;
        let writes = match &signed.request {
            Some(request) => {
                derived = self.replica.rules().derive(request, &claim, &view)?;
                &derived
            }
            None => &signed.writes,
        };
        let scope = if document == Document::Cluster { Scope::Cluster } else { Scope::Host };
        if check_all(writes)? != Some(scope) {
            return Err(Refused::NotTheChange);
        }
        if signed.request.is_none() {
            self.replica.rules().permit(&claim, writes, &view)?;
        }
        let message = SignedChange::binding(&signed.cluster, &document, signed.request.as_ref());
        let draft = Draft { author, seq, start_op: Self::start_op(nodes), time, deps: signed.deps.clone(), message };
        let built = content.build(draft, writes).map_err(judged)?.ok_or(Refused::NotTheChange)?;
        if built.raw_bytes() != signed.change || ChangeHash::from_automerge(built.hash()) != signed.hash {
            return Err(Refused::NotTheChange);
        }
        Ok(Ready { max_op: built.max_op(), change: built, touched: touched(writes) })
    }

    fn apply(&mut self, signed: &SignedChange, bytes: Vec<u8>, ready: Ready) -> Result<(), Refused> {
        let SignedChange { document, author, seq, hash, .. } = *signed;
        let position = self.end();
        let Ready { change, touched, max_op } = ready;
        let content = self.document(document);
        match catch_unwind(AssertUnwindSafe(|| content.apply(change, author, &touched))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(Refused::Panicked(error.to_string())),
            Err(panic) => return Err(Refused::Panicked(panic_text(panic.as_ref()))),
        }
        let node = Node::new(document, author, seq, position, max_op, signed.deps.clone());
        self.fresh.insert(hash, self.append.entries.len());
        self.append.entries.push(Entry { hash, node, signed: bytes });
        let records = touched.into_iter().collect();
        self.summaries.push(ChangeSummary { generation: position + 1, document, author, hash, records });
        Ok(())
    }

    /// Keeps the first proof that `author` signed two changes under one number.
    fn witness(&mut self, document: Document, author: PublicKey, seq: u64, other: &[u8]) -> Result<(), StateError> {
        let known = self.state.proofs.contains_key(&(document, author))
            || self.append.proofs.iter().any(|(of, by, _)| (*of, *by) == (document, author));
        if known {
            return Ok(());
        }
        let fresh = self.append.entries.iter().find(|entry| entry.node.is_by(document, author, seq));
        let held = match fresh {
            Some(entry) => Some(entry.signed.clone()),
            None => match self.replica.log().hash_of(document, &author, seq)? {
                Some(hash) => match self.replica.log().node(&hash)? {
                    Some(node) => self.replica.log().signed(node.document_bytes(), node.position)?,
                    None => None,
                },
                None => None,
            },
        };
        let held = held.ok_or_else(|| self.replica.log().corrupt(format!("change {seq} of {author} is missing")))?;
        self.append.proofs.push((document, author, Proof { seq, held, other: other.to_vec() }));
        Ok(())
    }

    /// What is to be kept; `None` when nothing is. With `reload`, every changed document is first saved and loaded again:
    /// what could not be read back after a restart is not taken.
    pub fn finish(mut self, reload: bool) -> Result<Option<Outcome>, StateError> {
        if self.append.entries.is_empty() && self.append.proofs.is_empty() {
            return Ok(None);
        }
        let end = self.end();
        let changed: BTreeSet<Document> = self.summaries.iter().map(|summary| summary.document).collect();
        self.documents.retain(|document, _| changed.contains(document));
        for (document, content) in &mut self.documents {
            let due = content.tail >= SNAPSHOT_EVERY;
            if !reload && !due {
                continue;
            }
            let saved = catch_unwind(AssertUnwindSafe(|| {
                let saved = content.save();
                content.reload(&saved).map(|()| saved)
            }));
            let saved = match saved {
                Ok(Ok(saved)) => saved,
                Ok(Err(error)) => return Err(StateError::Document(error.to_string())),
                Err(panic) => return Err(StateError::Document(panic_text(panic.as_ref()))),
            };
            if due {
                content.tail = 0;
                self.append.snapshots.push((*document, end, saved));
            }
        }
        Ok(Some(Outcome { append: self.append, documents: self.documents, summaries: self.summaries, end }))
    }
}

fn document_error(error: DocumentError) -> StateError {
    StateError::Document(error.to_string())
}

fn touched(writes: &[Write]) -> BTreeSet<(Table, RecordId)> {
    writes.iter().map(|write| (write.table(), write.id())).collect()
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no reason given".to_owned())
}
