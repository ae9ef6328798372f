//! The append-only log of signed changes, in redb, with the indexes that automerge answers too slowly.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
};

use borsh::{BorshDeserialize, BorshSerialize};
use form_types::{ClusterId, Failpoint, PublicKey, failpoint::reach};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::{change::ChangeHash, compact::compact, error::StateError, write::Document};

const FORMAT: u64 = 1;
/// Reads are rare (the index is in memory), so a small cache does.
const CACHE_BYTES: usize = 2 << 20;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// (document, position) to signed change. Positions ascend over all documents, causes before effects.
const LOG: TableDefinition<(&[u8; 33], u64), &[u8]> = TableDefinition::new("log");
/// Hash to [`Node`].
const NODES: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("nodes");
type AuthorKey = (&'static [u8; 33], &'static [u8; 32], u64);
/// (document, author, seq) to hash.
const AUTHORS: TableDefinition<AuthorKey, &[u8; 32]> = TableDefinition::new("authors");
/// Document to the position it stands for (exclusive) and automerge's saved bytes.
const SNAPSHOTS: TableDefinition<&[u8; 33], (u64, &[u8])> = TableDefinition::new("snapshots");
/// (document, author) to [`Proof`].
const PROOFS: TableDefinition<(&[u8; 33], &[u8; 32]), &[u8]> = TableDefinition::new("proofs");

/// A change's place in the graph.
#[derive(Clone, Debug, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(crate) struct Node {
    document: [u8; 33],
    author: [u8; 32],
    pub seq: u64,
    pub position: u64,
    /// The counter of its last operation.
    pub max_op: u64,
    pub deps: Vec<ChangeHash>,
}

impl Node {
    pub fn new(document: Document, author: PublicKey, seq: u64, position: u64, max_op: u64, deps: Vec<ChangeHash>) -> Self {
        Self { document: document.to_bytes(), author: *author.as_bytes(), seq, position, max_op, deps }
    }

    pub fn is_of(&self, document: Document) -> bool {
        self.document == document.to_bytes()
    }

    pub fn is_by(&self, document: Document, author: PublicKey, seq: u64) -> bool {
        self.is_of(document) && self.author == *author.as_bytes() && self.seq == seq
    }

    pub const fn document_bytes(&self) -> &[u8; 33] {
        &self.document
    }
}

/// Two different changes that one author signed under one number.
#[derive(Clone, Debug, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub struct Proof {
    pub seq: u64,
    /// Signed changes as bytes: [`crate::SignedChange::decode`] verifies each.
    pub held: Vec<u8>,
    pub other: Vec<u8>,
}

/// A change that is to be appended.
#[derive(Debug)]
pub(crate) struct Entry {
    pub hash: ChangeHash,
    pub node: Node,
    pub signed: Vec<u8>,
}

/// What becomes durable together.
#[derive(Debug, Default)]
pub(crate) struct Append {
    pub entries: Vec<Entry>,
    /// Document, position (exclusive), saved bytes.
    pub snapshots: Vec<(Document, u64, Vec<u8>)>,
    pub proofs: Vec<(Document, PublicKey, Proof)>,
}

#[derive(Debug)]
pub(crate) struct Log {
    /// None while it could not be opened again.
    database: RwLock<Option<Database>>,
    path: PathBuf,
}

fn open(path: &Path) -> Result<Database, StateError> {
    // A damaged file may trip an assertion in the database instead of an error.
    let opened = catch_unwind(|| Database::builder().set_cache_size(CACHE_BYTES).create(path))
        .map_err(|_| StateError::corrupt(path, "the database cannot be read"))?;
    opened.map_err(|error| StateError::storage(path, error))
}

/// The database trusts its pages: in a damaged one keys are out of order, and whoever goes on from the key that it found would go in circles.
fn in_order(ordered: bool) -> Result<(), redb::Error> {
    if ordered { Ok(()) } else { Err(redb::Error::Corrupted("its keys are out of order".to_owned())) }
}

impl Log {
    /// Opens or makes the database at `path` for this host of this cluster.
    pub fn open(path: &Path, host: &PublicKey, cluster: &ClusterId) -> Result<Self, StateError> {
        let mut database = open(path)?;
        let compacted = catch_unwind(AssertUnwindSafe(|| compact(&mut database, path)))
            .map_err(|_| StateError::corrupt(path, "the database cannot be made smaller"))?;
        match compacted {
            Ok(Some((before, after))) => tracing::info!(path = %path.display(), before, after, "the state's file was made smaller"),
            Ok(None) => {}
            // It costs room, nothing else.
            Err(error) => tracing::warn!(path = %path.display(), %error, "the state's file cannot be made smaller"),
        }
        let log = Self { database: RwLock::new(Some(database)), path: path.to_owned() };
        log.claim(host, cluster)?;
        Ok(log)
    }

    /// Runs `work` on the database; a panic in there means damage.
    fn guard<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, StateError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = database.as_ref().ok_or_else(|| StateError::Broken { path: self.path.clone() })?;
        match catch_unwind(AssertUnwindSafe(|| work(database))) {
            Ok(result) => result.map_err(|error| self.translate(error)),
            Err(_) => Err(self.corrupt("the database broke off")),
        }
    }

    /// Opens the file anew, which is what the database wants after any error of the file system, a full disk included.
    pub fn reopen(&self) -> Result<(), StateError> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // The old one holds the file's lock.
        *database = None;
        *database = Some(open(&self.path)?);
        Ok(())
    }

    fn translate(&self, error: redb::Error) -> StateError {
        StateError::storage(&self.path, error)
    }

    pub fn corrupt(&self, detail: impl Into<String>) -> StateError {
        StateError::corrupt(&self.path, detail)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the tables, and checks that the file is this host's.
    fn claim(&self, host: &PublicKey, cluster: &ClusterId) -> Result<(), StateError> {
        let (format, found_cluster, found_host) = self.guard(|database| {
            let transaction = database.begin_write()?;
            let found = {
                let mut meta = transaction.open_table(META)?;
                if meta.get("format")?.is_none() {
                    meta.insert("format", FORMAT.to_le_bytes().as_slice())?;
                    meta.insert("cluster", cluster.as_bytes().as_slice())?;
                    meta.insert("host", host.as_bytes().as_slice())?;
                }
                let read = |key: &str| meta.get(key).map(|value| value.map(|value| value.value().to_vec()).unwrap_or_default());
                (read("format")?, read("cluster")?, read("host")?)
            };
            transaction.open_table(LOG)?;
            transaction.open_table(NODES)?;
            transaction.open_table(AUTHORS)?;
            transaction.open_table(SNAPSHOTS)?;
            transaction.open_table(PROOFS)?;
            transaction.commit()?;
            Ok(found)
        })?;
        let format = u64::from_le_bytes(format.try_into().map_err(|_| self.corrupt("its format is unreadable"))?);
        if format != FORMAT {
            return Err(StateError::Format { path: self.path.clone(), found: format, expected: FORMAT });
        }
        let found = ClusterId::from_bytes(found_cluster.try_into().map_err(|_| self.corrupt("its cluster is unreadable"))?);
        if found != *cluster {
            return Err(StateError::OtherCluster { path: self.path.clone(), found, expected: *cluster });
        }
        let found = found_host.try_into().ok().and_then(|bytes| PublicKey::from_bytes(bytes).ok());
        let found = found.ok_or_else(|| self.corrupt("its host key is unreadable"))?;
        if found != *host {
            return Err(StateError::OtherHost { path: self.path.clone(), found, expected: *host });
        }
        Ok(())
    }

    fn decode<T: BorshDeserialize>(&self, what: &str, bytes: &[u8]) -> Result<T, StateError> {
        T::try_from_slice(bytes).map_err(|error| self.corrupt(format!("{what}: {error}")))
    }

    /// Appends, durably: when this returns, it is on the disk.
    pub fn append(&self, append: &Append) -> Result<(), StateError> {
        let encode = |value: std::io::Result<Vec<u8>>| value.map_err(redb::Error::Io);
        self.guard(|database| {
            let transaction = database.begin_write()?;
            {
                let mut log = transaction.open_table(LOG)?;
                let mut nodes = transaction.open_table(NODES)?;
                let mut authors = transaction.open_table(AUTHORS)?;
                for Entry { hash, node, signed } in &append.entries {
                    log.insert((&node.document, node.position), signed.as_slice())?;
                    nodes.insert(hash.as_bytes(), encode(borsh::to_vec(node))?.as_slice())?;
                    authors.insert((&node.document, &node.author, node.seq), hash.as_bytes())?;
                }
                let mut snapshots = transaction.open_table(SNAPSHOTS)?;
                for (document, position, bytes) in &append.snapshots {
                    snapshots.insert(&document.to_bytes(), (*position, bytes.as_slice()))?;
                }
                let mut proofs = transaction.open_table(PROOFS)?;
                for (document, author, proof) in &append.proofs {
                    proofs.insert((&document.to_bytes(), author.as_bytes()), encode(borsh::to_vec(proof))?.as_slice())?;
                }
            }
            reach(Failpoint::StateSigned);
            transaction.commit()?;
            reach(Failpoint::StateStored);
            Ok(())
        })
    }

    pub fn node(&self, hash: &ChangeHash) -> Result<Option<Node>, StateError> {
        let bytes = self.guard(|database| {
            let nodes = database.begin_read()?.open_table(NODES)?;
            Ok(nodes.get(hash.as_bytes())?.map(|value| value.value().to_vec()))
        })?;
        bytes.map(|bytes| self.decode("a change's place", &bytes)).transpose()
    }

    /// The signed change at a position of a document.
    pub fn signed(&self, document: &[u8; 33], position: u64) -> Result<Option<Vec<u8>>, StateError> {
        self.guard(|database| {
            let log = database.begin_read()?.open_table(LOG)?;
            Ok(log.get((document, position))?.map(|value| value.value().to_vec()))
        })
    }

    pub fn hash_of(&self, document: Document, author: &PublicKey, seq: u64) -> Result<Option<ChangeHash>, StateError> {
        self.guard(|database| {
            let authors = database.begin_read()?.open_table(AUTHORS)?;
            Ok(authors.get((&document.to_bytes(), author.as_bytes(), seq))?.map(|value| ChangeHash(*value.value())))
        })
    }

    /// The last change of each author of each document.
    pub fn clocks(&self) -> Result<Vec<(Document, PublicKey, u64, ChangeHash)>, StateError> {
        // Per author only the last row counts; a range per author finds it without reading the others.
        let rows = self.guard(|database| {
            let authors = database.begin_read()?.open_table(AUTHORS)?;
            let mut rows = Vec::new();
            let mut upper: Option<([u8; 33], [u8; 32])> = None;
            loop {
                let last = match &upper {
                    None => authors.last()?,
                    Some((document, author)) => authors.range(..(document, author, 0))?.next_back().transpose()?,
                };
                let Some((key, hash)) = last else { return Ok(rows) };
                let (document, author, seq) = key.value();
                in_order(upper.is_none_or(|upper| (*document, *author) < upper))?;
                rows.push((*document, *author, seq, ChangeHash(*hash.value())));
                upper = Some((*document, *author));
            }
        })?;
        rows.into_iter()
            .map(|(document, author, seq, hash)| {
                let document = Document::from_bytes(&document).ok_or_else(|| self.corrupt("a document's name is unreadable"))?;
                let author = PublicKey::from_bytes(author).map_err(|_| self.corrupt("an author's key is unreadable"))?;
                Ok((document, author, seq, hash))
            })
            .collect()
    }

    pub fn snapshot(&self, document: Document) -> Result<Option<(u64, Vec<u8>)>, StateError> {
        self.guard(|database| {
            let snapshots = database.begin_read()?.open_table(SNAPSHOTS)?;
            Ok(snapshots.get(&document.to_bytes())?.map(|value| (value.value().0, value.value().1.to_vec())))
        })
    }

    /// The first signed change of `document` at or after `from`, with its position.
    pub fn next(&self, document: Document, from: u64) -> Result<Option<(u64, Vec<u8>)>, StateError> {
        self.guard(|database| {
            let log = database.begin_read()?.open_table(LOG)?;
            let name = document.to_bytes();
            let Some(row) = log.range((&name, from)..=(&name, u64::MAX))?.next() else { return Ok(None) };
            let (key, value) = row?;
            in_order(*key.value().0 == name && key.value().1 >= from)?;
            Ok(Some((key.value().1, value.value().to_vec())))
        })
    }

    /// The last signed change of `document` before the position `before`.
    pub fn previous(&self, document: Document, before: u64) -> Result<Option<(u64, Vec<u8>)>, StateError> {
        self.guard(|database| {
            let log = database.begin_read()?.open_table(LOG)?;
            let name = document.to_bytes();
            let Some(row) = log.range((&name, 0)..(&name, before))?.next_back() else { return Ok(None) };
            let (key, value) = row?;
            in_order(*key.value().0 == name && key.value().1 < before)?;
            Ok(Some((key.value().1, value.value().to_vec())))
        })
    }

    /// The position after the last change of all documents.
    pub fn end(&self, documents: impl Iterator<Item = Document>) -> Result<u64, StateError> {
        let names: Vec<_> = documents.map(Document::to_bytes).collect();
        self.guard(|database| {
            let log = database.begin_read()?.open_table(LOG)?;
            let mut end = 0;
            for name in names {
                if let Some(row) = log.range((&name, 0)..=(&name, u64::MAX))?.next_back() {
                    end = end.max(row?.0.value().1 + 1);
                }
            }
            Ok(end)
        })
    }

    pub fn proofs(&self) -> Result<Vec<(Document, PublicKey, Proof)>, StateError> {
        let rows = self.guard(|database| {
            let proofs = database.begin_read()?.open_table(PROOFS)?;
            let mut rows: Vec<([u8; 33], [u8; 32], Vec<u8>)> = Vec::new();
            for row in proofs.iter()? {
                let (key, value) = row?;
                let (document, author) = key.value();
                in_order(rows.last().is_none_or(|last| (last.0, last.1) < (*document, *author)))?;
                rows.push((*document, *author, value.value().to_vec()));
            }
            Ok(rows)
        })?;
        rows.into_iter()
            .map(|(document, author, bytes)| {
                let document = Document::from_bytes(&document).ok_or_else(|| self.corrupt("a document's name is unreadable"))?;
                let author = PublicKey::from_bytes(author).map_err(|_| self.corrupt("an author's key is unreadable"))?;
                Ok((document, author, self.decode("a proof", &bytes)?))
            })
            .collect()
    }
}
