//! The state as plain maps: what every read sees. Cheap to share: records are reference-counted.

use std::{collections::BTreeMap, sync::Arc};

use form_types::PublicKey;

use crate::write::{Document, RecordId, Scalar, Table};

/// A record: its fields by name.
pub type Record = BTreeMap<String, Scalar>;

/// The tables of one document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    tables: BTreeMap<Table, BTreeMap<RecordId, Arc<Record>>>,
}

impl Tables {
    /// The records of `table` by id.
    pub fn table(&self, table: Table) -> impl Iterator<Item = (&RecordId, &Record)> {
        self.tables.get(&table).into_iter().flatten().map(|(id, record)| (id, record.as_ref()))
    }

    pub fn record(&self, table: Table, id: impl Into<RecordId>) -> Option<&Record> {
        self.tables.get(&table)?.get(&id.into()).map(AsRef::as_ref)
    }

    pub fn field(&self, table: Table, id: impl Into<RecordId>, field: &str) -> Option<&Scalar> {
        self.record(table, id)?.get(field)
    }

    /// How many records `table` has.
    pub fn count(&self, table: Table) -> usize {
        self.tables.get(&table).map_or(0, BTreeMap::len)
    }

    pub(crate) fn set(&mut self, table: Table, id: RecordId, record: Option<Record>) {
        match record {
            Some(record) => {
                self.tables.entry(table).or_default().insert(id, Arc::new(record));
            }
            None => {
                if let Some(records) = self.tables.get_mut(&table) {
                    records.remove(&id);
                    if records.is_empty() {
                        self.tables.remove(&table);
                    }
                }
            }
        }
    }
}

/// The whole state at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    cluster: Arc<Tables>,
    hosts: BTreeMap<PublicKey, Arc<Tables>>,
}

impl View {
    /// A view that shows only the cluster's document.
    pub fn of_cluster(cluster: Arc<Tables>) -> Self {
        Self { cluster, hosts: BTreeMap::new() }
    }

    /// What should be.
    pub fn cluster(&self) -> &Tables {
        &self.cluster
    }

    /// What `host` says it sees; `None` when it has never said anything.
    pub fn host(&self, host: &PublicKey) -> Option<&Tables> {
        self.hosts.get(host).map(AsRef::as_ref)
    }

    /// What each host says it sees.
    pub fn hosts(&self) -> impl Iterator<Item = (&PublicKey, &Tables)> {
        self.hosts.iter().map(|(host, tables)| (host, tables.as_ref()))
    }

    pub(crate) fn set(&mut self, document: Document, tables: Arc<Tables>) {
        match document {
            Document::Cluster => self.cluster = tables,
            Document::Host(host) => {
                self.hosts.insert(host, tables);
            }
        }
    }
}
