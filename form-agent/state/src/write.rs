//! What a change does to the state: puts scalars into records, or removes records.

use std::fmt;

use borsh::{BorshDeserialize, BorshSerialize};
use form_types::{HostId, PublicKey, VmId, VolumeId};

/// The longest field name, in bytes.
pub const MAX_FIELD_NAME: usize = 64;
/// The largest text or byte string, in bytes: room for a deploy request with its files.
pub const MAX_VALUE: usize = 512 << 10;
/// The most writes in one change.
pub const MAX_WRITES: usize = 4096;

/// Which automerge document: one for what the cluster should be, one per host for what that host observes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Document {
    Cluster,
    Host(PublicKey),
}

impl Document {
    /// A fixed-size key for the database: a tag and the host's key (zeros for the cluster).
    pub(crate) fn to_bytes(self) -> [u8; 33] {
        let mut bytes = [0; 33];
        if let Self::Host(key) = self {
            bytes[0] = 1;
            bytes[1..].copy_from_slice(key.as_bytes());
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (tag, key) = bytes.split_first()?;
        let key: [u8; 32] = key.try_into().ok()?;
        match tag {
            0 if key == [0; 32] => Some(Self::Cluster),
            1 => PublicKey::from_bytes(key).ok().map(Self::Host),
            _ => None,
        }
    }
}

impl fmt::Display for Document {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster => formatter.write_str("cluster"),
            Self::Host(key) => write!(formatter, "host {key}"),
        }
    }
}

/// Where a table lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In the cluster's document: any member may write what a signed request allows.
    Cluster,
    /// In the document of the host that writes it, and of no other.
    Host,
}

/// A table of records. New tables are added at the end: the order is part of the encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, BorshSerialize, BorshDeserialize)]
pub enum Table {
    /// Desired virtual machines, by [`VmId`].
    Vms,
    /// Member hosts, by [`HostId`].
    Hosts,
    /// Keys that own the cluster, by the first 16 bytes of the key's BLAKE3 hash.
    Owners,
    /// What other keys may do.
    Grants,
    /// What the writing host sees of the virtual machines it runs.
    ObservedVms,
    /// What the writing host says of itself.
    ObservedHosts,
    /// Desired volumes, by [`VolumeId`].
    Volumes,
}

impl Table {
    pub const ALL: [Self; 7] = [Self::Vms, Self::Hosts, Self::Owners, Self::Grants, Self::ObservedVms, Self::ObservedHosts, Self::Volumes];

    pub const fn scope(self) -> Scope {
        match self {
            Self::Vms | Self::Hosts | Self::Owners | Self::Grants | Self::Volumes => Scope::Cluster,
            Self::ObservedVms | Self::ObservedHosts => Scope::Host,
        }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vms => "vms",
            Self::Hosts => "hosts",
            Self::Owners => "owners",
            Self::Grants => "grants",
            Self::ObservedVms => "observed-vms",
            Self::ObservedHosts => "observed-hosts",
            Self::Volumes => "volumes",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.as_str() == name)
    }
}

/// A record's key: 16 bytes, a digest of who asked for it and that request's idempotency key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, BorshSerialize, BorshDeserialize)]
pub struct RecordId(pub [u8; 16]);

impl From<VmId> for RecordId {
    fn from(id: VmId) -> Self {
        Self(*id.as_bytes())
    }
}

impl From<VolumeId> for RecordId {
    fn from(id: VolumeId) -> Self {
        Self(*id.as_bytes())
    }
}

impl From<HostId> for RecordId {
    fn from(id: HostId) -> Self {
        Self(*id.as_bytes())
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for RecordId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// A field's value. There are no floats (no total order, no canonical form), no lists and no maps.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, BorshSerialize, BorshDeserialize)]
pub enum Scalar {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Text(String),
    Bytes(Vec<u8>),
}

impl Scalar {
    pub fn as_text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub const fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    pub const fn as_uint(&self) -> Option<u64> {
        if let Self::Uint(number) = self { Some(*number) } else { None }
    }

    fn size(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Bytes(bytes) => bytes.len(),
            Self::Bool(_) | Self::Int(_) | Self::Uint(_) => 8,
        }
    }
}

impl From<&str> for Scalar {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Scalar {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for Scalar {
    fn from(number: u64) -> Self {
        Self::Uint(number)
    }
}

impl From<i64> for Scalar {
    fn from(number: i64) -> Self {
        Self::Int(number)
    }
}

impl From<bool> for Scalar {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub enum Write {
    /// Sets one field; makes the record when it is not there.
    Put { table: Table, id: RecordId, field: String, value: Scalar },
    /// Removes a record with all its fields. It wins over concurrent puts.
    Remove { table: Table, id: RecordId },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("a change writes to the cluster's tables or to its host's own, not to both: split it in two")]
    MixedScopes,
    #[error("`{0}` is not a field name: 1 to {MAX_FIELD_NAME} of a-z, 0-9 and `_`")]
    FieldName(String),
    #[error("the value of `{field}` has {size} bytes, more than {MAX_VALUE}")]
    ValueTooLarge { field: String, size: usize },
    #[error("more than {MAX_WRITES} writes in one change: split it")]
    TooMany,
    #[error("{table}/{id} is written twice in one change", table = .0.as_str(), id = .1)]
    Twice(Table, RecordId),
}

impl Write {
    pub fn put(table: Table, id: impl Into<RecordId>, field: impl Into<String>, value: impl Into<Scalar>) -> Self {
        Self::Put { table, id: id.into(), field: field.into(), value: value.into() }
    }

    pub fn remove(table: Table, id: impl Into<RecordId>) -> Self {
        Self::Remove { table, id: id.into() }
    }

    pub const fn table(&self) -> Table {
        match self {
            Self::Put { table, .. } | Self::Remove { table, .. } => *table,
        }
    }

    pub const fn id(&self) -> RecordId {
        match self {
            Self::Put { id, .. } | Self::Remove { id, .. } => *id,
        }
    }

    fn check(&self) -> Result<(), WriteError> {
        let Self::Put { field, value, .. } = self else { return Ok(()) };
        let named = (1..=MAX_FIELD_NAME).contains(&field.len())
            && field.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        if !named {
            return Err(WriteError::FieldName(field.chars().take(80).collect()));
        }
        if value.size() > MAX_VALUE {
            return Err(WriteError::ValueTooLarge { field: field.clone(), size: value.size() });
        }
        Ok(())
    }
}

/// The scope of all `writes`, once each of them is well-formed and no two of them meet: a field is put once, and a record
/// that is removed is not written to, because what such a change means would hang on the order of its writes.
///
/// # Errors
/// [`WriteError`] says which rule is broken.
pub(crate) fn check_all(writes: &[Write]) -> Result<Option<Scope>, WriteError> {
    if writes.len() > MAX_WRITES {
        return Err(WriteError::TooMany);
    }
    let mut put = std::collections::BTreeSet::new();
    let mut removed = std::collections::BTreeSet::new();
    let mut scope = None;
    for write in writes {
        write.check()?;
        let key = (write.table(), write.id());
        let fresh = match write {
            Write::Put { field, .. } => put.insert((key, field)),
            Write::Remove { .. } => removed.insert(key),
        };
        if !fresh {
            return Err(WriteError::Twice(key.0, key.1));
        }
        if *scope.get_or_insert(key.0.scope()) != key.0.scope() {
            return Err(WriteError::MixedScopes);
        }
    }
    match put.iter().find(|(key, _)| removed.contains(key)) {
        Some(((table, id), _)) => Err(WriteError::Twice(*table, *id)),
        None => Ok(scope),
    }
}
