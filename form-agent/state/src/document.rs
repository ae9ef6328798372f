//! One automerge document in memory, its index, and the one way to make a change of it.
//!
//! The root map holds records under `table/id`; a record is a map of scalars. There are no other objects, so there is
//! nothing to create twice but a record, and ids that are digests of the request keep honest hosts from that.
//!
//! Local changes are not made by automerge's transactions but by [`DocumentState::build`], a function of the writes and
//! of the document as it was at the change's dependencies. A replica that receives a change calls the same function and
//! compares bytes. That is the whole precheck in one comparison: `seq`, `start_op`, actor, objects, predecessors, encoding.
//! Bytes from elsewhere never reach automerge's parser.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU64,
    sync::Arc,
};

use automerge::{
    ActorId, Automerge, AutomergeError, Change, ExpandedChange, ObjId, ObjType, ROOT, ReadDoc, ScalarValue, Value,
    legacy::{Key, ObjectId, Op, OpId, OpType},
};
use form_types::PublicKey;

use crate::{
    change::ChangeHash,
    view::{Record, Tables},
    write::{RecordId, Scalar, Table, Write},
};

/// Automerge counts operations in 32 bits.
const MAX_OP: u64 = u32::MAX as u64;

/// A loaded document keeps its values in one buffer, and each later write splits it into two that both keep the whole
/// capacity (hexane 1.0.0-alpha.5, `RawColumn`): a hundred writes to a document of 2 MB took 200 MB. A clone has buffers of
/// the right size and costs less than a write, so a document is cloned over itself after so many changes.
const SHRINK_EVERY: usize = 16;

#[derive(Debug, thiserror::Error)]
pub(crate) enum DocumentError {
    #[error("automerge: {0}")]
    Automerge(#[from] AutomergeError),
    #[error("`{0}` is not a record")]
    NotARecord(String),
    #[error("the document has no room for more operations")]
    Full,
    #[error("the change did not become a head of the document")]
    NotApplied,
}

/// The last change of an author.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Last {
    pub seq: u64,
    pub hash: ChangeHash,
}

/// What stands at the head of a change.
#[derive(Debug)]
pub(crate) struct Draft {
    pub author: PublicKey,
    pub seq: u64,
    pub start_op: u64,
    pub time: i64,
    pub deps: Vec<ChangeHash>,
    pub message: String,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct DocumentState {
    automerge: Automerge,
    pub heads: BTreeSet<ChangeHash>,
    pub clock: BTreeMap<PublicKey, Last>,
    pub tables: Arc<Tables>,
    /// Changes since the last snapshot in the database.
    pub tail: usize,
}

fn root_key(table: Table, id: RecordId) -> String {
    format!("{}/{id}", table.as_str())
}

fn parse_root_key(key: &str) -> Option<(Table, RecordId)> {
    let (table, id) = key.split_once('/')?;
    let mut bytes = [0; 16];
    hex::decode_to_slice(id, &mut bytes).ok()?;
    Some((Table::from_name(table)?, RecordId(bytes)))
}

fn to_automerge(scalar: &Scalar) -> ScalarValue {
    match scalar {
        Scalar::Bool(value) => ScalarValue::Boolean(*value),
        Scalar::Int(number) => ScalarValue::Int(*number),
        Scalar::Uint(number) => ScalarValue::Uint(*number),
        Scalar::Text(text) => ScalarValue::Str(text.as_str().into()),
        Scalar::Bytes(bytes) => ScalarValue::Bytes(bytes.clone()),
    }
}

fn from_automerge(value: &Value<'_>) -> Option<Scalar> {
    match value.as_scalar()? {
        ScalarValue::Boolean(value) => Some(Scalar::Bool(*value)),
        ScalarValue::Int(number) => Some(Scalar::Int(*number)),
        ScalarValue::Uint(number) => Some(Scalar::Uint(*number)),
        ScalarValue::Str(text) => Some(Scalar::Text(text.to_string())),
        ScalarValue::Bytes(bytes) => Some(Scalar::Bytes(bytes.clone())),
        _ => None,
    }
}

fn op_id(id: &ObjId) -> Option<OpId> {
    match id {
        ObjId::Root => None,
        ObjId::Id(counter, actor, _) => Some(OpId::new(*counter, actor)),
    }
}

/// The document as it was at some heads; `None` is now, which is the fast way.
struct At<'a> {
    automerge: &'a Automerge,
    heads: Option<Vec<automerge::ChangeHash>>,
}

impl At<'_> {
    fn all(&self, object: &ObjId, key: &str) -> Result<Vec<(Value<'_>, ObjId)>, AutomergeError> {
        match &self.heads {
            None => self.automerge.get_all(object, key),
            Some(heads) => self.automerge.get_all_at(object, key, heads),
        }
    }

    fn winner(&self, object: &ObjId, key: &str) -> Result<Option<(Value<'_>, ObjId)>, AutomergeError> {
        match &self.heads {
            None => self.automerge.get(object, key),
            Some(heads) => self.automerge.get_at(object, key, heads),
        }
    }

    fn keys(&self, object: &ObjId) -> Vec<String> {
        match &self.heads {
            None => self.automerge.keys(object).collect(),
            Some(heads) => self.automerge.keys_at(object, heads).collect(),
        }
    }

    /// The record's object, when there is one.
    fn record(&self, key: &str) -> Result<Option<ObjId>, DocumentError> {
        match self.winner(&ROOT, key)? {
            None => Ok(None),
            Some((Value::Object(ObjType::Map), id)) => Ok(Some(id)),
            Some(_) => Err(DocumentError::NotARecord(key.to_owned())),
        }
    }

    fn read(&self, key: &str) -> Result<Option<Record>, DocumentError> {
        let Some(object) = self.record(key)? else { return Ok(None) };
        let mut record = Record::new();
        for field in self.keys(&object) {
            if let Some(scalar) = self.winner(&object, &field)?.and_then(|(value, _)| from_automerge(&value)) {
                record.insert(field, scalar);
            }
        }
        Ok(Some(record))
    }

    fn tables(&self) -> Result<Tables, DocumentError> {
        let mut tables = Tables::default();
        for key in self.keys(&ROOT) {
            let (table, id) = parse_root_key(&key).ok_or_else(|| DocumentError::NotARecord(key.clone()))?;
            tables.set(table, id, self.read(&key)?);
        }
        Ok(tables)
    }

    /// The ids of all that is visible at a key: what a write there replaces.
    fn visible(&self, object: &ObjId, key: &str) -> Result<Vec<OpId>, AutomergeError> {
        Ok(self.all(object, key)?.iter().filter_map(|(_, id)| op_id(id)).collect())
    }
}

impl DocumentState {
    /// A document from a snapshot. `clock` and the tables are filled by [`DocumentState::index`].
    pub fn load(bytes: &[u8]) -> Result<Self, DocumentError> {
        let automerge = Automerge::load(bytes)?;
        let heads = automerge.get_heads().into_iter().map(ChangeHash::from_automerge).collect();
        Ok(Self { automerge, heads, ..Self::default() })
    }

    pub fn save(&self) -> Vec<u8> {
        self.automerge.save()
    }

    /// Replaces the automerge document by what its own saved bytes give, so that what is kept can surely be loaded.
    pub fn reload(&mut self, saved: &[u8]) -> Result<(), DocumentError> {
        let automerge = Automerge::load(saved)?;
        let heads: BTreeSet<_> = automerge.get_heads().into_iter().map(ChangeHash::from_automerge).collect();
        if heads != self.heads {
            return Err(DocumentError::NotApplied);
        }
        self.automerge = automerge;
        Ok(())
    }

    /// Reads the tables anew.
    pub fn index(&mut self) -> Result<(), DocumentError> {
        self.tables = Arc::new(At { automerge: &self.automerge, heads: None }.tables()?);
        Ok(())
    }

    fn at(&self, deps: &[ChangeHash]) -> At<'_> {
        let now = deps.len() == self.heads.len() && deps.iter().all(|dep| self.heads.contains(dep));
        At { automerge: &self.automerge, heads: (!now).then(|| deps.iter().map(|dep| dep.to_automerge()).collect()) }
    }

    /// The tables as they were at `deps`.
    pub fn tables_at(&self, deps: &[ChangeHash]) -> Result<Arc<Tables>, DocumentError> {
        let at = self.at(deps);
        if at.heads.is_none() { Ok(self.tables.clone()) } else { at.tables().map(Arc::new) }
    }

    /// The only change that says `writes` at the draft's place; `None` when they say what is already there.
    ///
    /// Writes must have passed [`crate::write::check_all`].
    pub fn build(&self, draft: Draft, writes: &[Write]) -> Result<Option<Change>, DocumentError> {
        let at = self.at(&draft.deps);
        let actor = ActorId::from(draft.author.as_bytes());
        let mut made: BTreeMap<String, ObjectId> = BTreeMap::new();
        let mut operations: Vec<Op> = Vec::with_capacity(writes.len() + 1);
        for write in writes {
            let key = root_key(write.table(), write.id());
            match write {
                Write::Remove { .. } => {
                    let pred = at.visible(&ROOT, &key)?;
                    if !pred.is_empty() {
                        operations.push(operation(OpType::Delete, ObjectId::Root, &key, pred));
                    }
                }
                Write::Put { field, value, .. } => {
                    if let Some(object) = made.get(&key) {
                        operations.push(operation(OpType::Put(to_automerge(value)), object.clone(), field, Vec::new()));
                    } else if let Some(object) = at.record(&key)? {
                        let there = at.all(&object, field)?;
                        if there.len() == 1 && from_automerge(&there[0].0).as_ref() == Some(value) {
                            continue;
                        }
                        let pred = there.iter().filter_map(|(_, id)| op_id(id)).collect();
                        let id = op_id(&object).ok_or_else(|| DocumentError::NotARecord(key.clone()))?;
                        operations.push(operation(OpType::Put(to_automerge(value)), ObjectId::Id(id), field, pred));
                    } else {
                        let object = ObjectId::Id(OpId::new(draft.start_op + operations.len() as u64, &actor));
                        operations.push(operation(OpType::Make(ObjType::Map), ObjectId::Root, &key, Vec::new()));
                        operations.push(operation(OpType::Put(to_automerge(value)), object.clone(), field, Vec::new()));
                        made.insert(key, object);
                    }
                }
            }
        }
        if operations.is_empty() {
            return Ok(None);
        }
        let last_op = draft.start_op.checked_add(operations.len() as u64).filter(|last| *last <= MAX_OP);
        let start_op = NonZeroU64::new(draft.start_op).filter(|_| last_op.is_some()).ok_or(DocumentError::Full)?;
        Ok(Some(Change::from(ExpandedChange {
            operations,
            actor_id: actor,
            hash: None,
            seq: draft.seq,
            start_op,
            time: draft.time,
            message: Some(draft.message),
            deps: draft.deps.iter().map(|dep| dep.to_automerge()).collect(),
            extra_bytes: Vec::new(),
            author: None,
        })))
    }

    /// Applies a change that [`DocumentState::build`] made, or that the database kept, and brings the index up to date.
    pub fn apply(&mut self, change: Change, author: PublicKey, touched: &BTreeSet<(Table, RecordId)>) -> Result<(), DocumentError> {
        self.apply_unindexed(change, author)?;
        let tables = Arc::make_mut(&mut self.tables);
        let at = At { automerge: &self.automerge, heads: None };
        for (table, id) in touched {
            tables.set(*table, *id, at.read(&root_key(*table, *id))?);
        }
        Ok(())
    }

    fn apply_unindexed(&mut self, change: Change, author: PublicKey) -> Result<(), DocumentError> {
        let last = Last { seq: change.seq(), hash: ChangeHash::from_automerge(change.hash()) };
        self.replay(vec![change])?;
        self.clock.insert(author, last);
        if self.tail.is_multiple_of(SHRINK_EVERY) {
            self.automerge = self.automerge.clone();
        }
        Ok(())
    }

    /// Applies changes that the database kept, causes first. The index and the clock are left to the caller.
    pub fn replay(&mut self, changes: Vec<Change>) -> Result<(), DocumentError> {
        for change in &changes {
            for dep in change.deps() {
                self.heads.remove(&ChangeHash::from_automerge(*dep));
            }
            self.heads.insert(ChangeHash::from_automerge(change.hash()));
        }
        self.tail += changes.len();
        self.automerge.apply_changes(changes)?;
        let heads = self.automerge.get_heads();
        if heads.len() != self.heads.len() || !heads.iter().all(|head| self.heads.contains(&ChangeHash::from_automerge(*head))) {
            return Err(DocumentError::NotApplied);
        }
        Ok(())
    }
}

fn operation(action: OpType, obj: ObjectId, key: &str, pred: Vec<OpId>) -> Op {
    Op { action, obj, key: Key::Map(key.into()), pred: pred.into(), insert: false }
}
