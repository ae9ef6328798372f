//! What a replica says to a change from elsewhere.

use std::sync::Arc;

use form_types::{ClusterId, PublicKey};

use crate::{
    change::{ChangeHash, DecodeError},
    error::StateError,
    rules::Refusal,
    write::{Document, WriteError},
};

/// What became of a change that was not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    New(ChangeHash),
    /// It was here already.
    Held,
}

/// Whose fault a refusal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// Nobody's: it may be taken later.
    Nobody,
    /// The author's. Whoever passed it on held another view of its past, or did not look.
    Author,
    /// Whoever sent it: nobody who checks what it has can have this.
    Sender,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Undecodable(#[from] DecodeError),
    #[error("the change belongs to cluster {0}")]
    OtherCluster(ClusterId),
    #[error("{author} writes to the document of {document}")]
    ForeignDocument { author: PublicKey, document: Document },
    #[error("{} changes that it depends on are not here yet", .0.len())]
    Missing(Vec<ChangeHash>),
    #[error("it depends on a change of another document")]
    ForeignDependency,
    #[error("it is number {found} of its author where {expected} is next")]
    Sequence { found: u64, expected: u64 },
    #[error("its author left out its own change number {0}: it writes two histories")]
    Fork(u64),
    #[error("{author} has signed two different changes number {seq} of the {document} document; the first that came is kept")]
    Equivocation { document: Document, author: PublicKey, seq: u64 },
    #[error("not allowed: {0}")]
    NotAllowed(#[from] Refusal),
    #[error("no change may hold these writes: {0}")]
    Writes(#[from] WriteError),
    #[error("it is not the change that its request and its place in the history give")]
    NotTheChange,
    #[error("the document cannot take it: {0}")]
    Document(String),
    #[error("applying it broke off: {0}")]
    Panicked(String),
    #[error("the change could not be kept: {0}")]
    Storage(Arc<StateError>),
}

impl Refused {
    pub fn blame(&self) -> Blame {
        match self {
            Self::Missing(_) | Self::Storage(_) | Self::Undecodable(DecodeError::Format(_)) => Blame::Nobody,
            // Another branch of the same author may be all the sender ever saw; a host's membership may not be known here yet.
            Self::Equivocation { .. } | Self::NotAllowed(_) | Self::Document(_) | Self::Panicked(_) => Blame::Author,
            Self::Undecodable(_)
            | Self::OtherCluster(_)
            | Self::ForeignDocument { .. }
            | Self::ForeignDependency
            | Self::Sequence { .. }
            | Self::Fork(_)
            | Self::Writes(_)
            | Self::NotTheChange => Blame::Sender,
        }
    }
}

impl From<StateError> for Refused {
    fn from(error: StateError) -> Self {
        Self::Storage(Arc::new(error))
    }
}
