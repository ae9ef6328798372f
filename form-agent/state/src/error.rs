//! What can go wrong with this host's own state. What can be wrong with a change from elsewhere is [`crate::Refused`].

use std::path::{Path, PathBuf};

use form_types::{ClusterId, PublicKey};

use crate::{rules::Refusal, write::WriteError};

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path} is in use: another form-agent runs with the same --root; stop it first")]
    InUse { path: PathBuf },
    #[error(
        "the state database {path} is damaged ({detail}): stop form-agent, keep a copy of the file, put a backup in its place or, in a cluster of several hosts, remove it and set this host up with a new key"
    )]
    Corrupt { path: PathBuf, detail: String },
    #[error(
        "the state database {path} was written by another version (format {found}, this one reads {expected}): use the form-agent that wrote it, or a newer one"
    )]
    Format { path: PathBuf, found: u64, expected: u64 },
    #[error("{path} belongs to cluster {found}, this host is of cluster {expected}: give the right --root, or remove the file")]
    OtherCluster { path: PathBuf, found: ClusterId, expected: ClusterId },
    #[error("{path} belongs to host {found}, this host's key is {expected}: put the old key back, or remove the file")]
    OtherHost { path: PathBuf, found: PublicKey, expected: PublicKey },
    #[error("cannot use the state database {path}: is the disk full, or the directory not writable?")]
    Storage { path: PathBuf, source: Box<redb::Error> },
    #[error("an earlier write to {path} failed and may or may not be on the disk: restart form-agent, which reads it again")]
    Broken { path: PathBuf },
    #[error(
        "this host's key has signed two different changes number {seq} of the {document} document, perhaps because an old backup was put back: this host writes no more; set it up with a new key"
    )]
    SelfEquivocation { document: String, seq: u64 },
    #[error(transparent)]
    Writes(#[from] WriteError),
    #[error("not allowed: {0}")]
    Refused(#[from] Refusal),
    #[error("the writes are not those that the request allows, perhaps because the state has changed meanwhile: derive them again")]
    NotDerived,
    #[error("the change has {size} bytes, more than {limit}: write less at once")]
    TooLarge { size: usize, limit: usize },
    #[error("the state document refused the change: {0}")]
    Document(String),
}

impl StateError {
    /// Sorts an error of the database into damage (what to restore) and trouble (what to mend).
    pub(crate) fn storage(path: &Path, error: impl Into<redb::Error>) -> Self {
        let path = path.to_owned();
        match error.into() {
            redb::Error::DatabaseAlreadyOpen => Self::InUse { path },
            redb::Error::Corrupted(detail) => Self::Corrupt { path, detail },
            redb::Error::RepairAborted => Self::Corrupt { path, detail: "its repair was broken off".to_owned() },
            redb::Error::Io(error) if matches!(error.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof) => {
                Self::Corrupt { path, detail: error.to_string() }
            }
            error @ (redb::Error::TableIsMultimap(_)
            | redb::Error::TableIsNotMultimap(_)
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TypeDefinitionChanged { .. }
            | redb::Error::UpgradeRequired(_)) => Self::Corrupt { path, detail: error.to_string() },
            source => Self::Storage { path, source: Box::new(source) },
        }
    }

    pub(crate) fn corrupt(path: &Path, detail: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), detail: detail.into() }
    }
}
