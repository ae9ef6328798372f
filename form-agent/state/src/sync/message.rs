//! The messages between two replicas.

use borsh::{BorshDeserialize, BorshSerialize};
use form_types::PublicKey;

use crate::{
    change::{ChangeHash, MAX_SIGNED_CHANGE},
    graph::Clock,
    log::Proof,
    write::Document,
};

/// The largest message, in bytes: two changes of the largest size (a proof) and then some.
pub const MAX_MESSAGE: usize = 2 * MAX_SIGNED_CHANGE + (64 << 10);

const FORMAT: u8 = 1;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("{0} bytes are more than a message may have ({MAX_MESSAGE})")]
    TooLarge(usize),
    #[error("a message of format {0}, this version speaks {FORMAT}: upgrade form-agent")]
    Format(u8),
    #[error("these bytes are no message: {0}")]
    Malformed(String),
}

#[derive(Clone, Debug, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(super) enum Message {
    Clock {
        entries: Vec<ClockEntry>,
        /// Documents and authors of whose equivocation the sender has a proof.
        proofs: Vec<([u8; 33], [u8; 32])>,
    },
    /// Signed changes, causes first.
    Changes(Vec<Vec<u8>>),
    Proof(Proof),
}

#[derive(Clone, Debug, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(super) struct ClockEntry {
    document: [u8; 33],
    author: [u8; 32],
    seq: u64,
    hash: ChangeHash,
}

impl Message {
    pub fn clock(clock: &Clock, proofs: impl Iterator<Item = (Document, PublicKey)>) -> Self {
        let entry = |((document, author), (seq, hash)): (&(Document, PublicKey), &(u64, ChangeHash))| ClockEntry {
            document: document.to_bytes(),
            author: *author.as_bytes(),
            seq: *seq,
            hash: *hash,
        };
        let proofs = proofs.map(|(document, author)| (document.to_bytes(), *author.as_bytes())).collect();
        Self::Clock { entries: clock.iter().map(entry).collect(), proofs }
    }

    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let bytes = borsh::to_vec(&(FORMAT, self)).map_err(|error| MessageError::Malformed(error.to_string()))?;
        if bytes.len() > MAX_MESSAGE { Err(MessageError::TooLarge(bytes.len())) } else { Ok(bytes) }
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        if bytes.len() > MAX_MESSAGE {
            return Err(MessageError::TooLarge(bytes.len()));
        }
        match bytes.split_first() {
            None => Err(MessageError::Malformed("it is empty".to_owned())),
            Some((&FORMAT, rest)) => Self::try_from_slice(rest).map_err(|error| MessageError::Malformed(error.to_string())),
            Some((other, _)) => Err(MessageError::Format(*other)),
        }
    }
}

/// A peer's clock, without entries that name no document or no key: nobody here could have those.
pub(super) fn read_clock(entries: Vec<ClockEntry>) -> Clock {
    entries
        .into_iter()
        .filter_map(|entry| {
            let document = Document::from_bytes(&entry.document)?;
            let author = PublicKey::from_bytes(entry.author).ok()?;
            Some(((document, author), (entry.seq, entry.hash)))
        })
        .collect()
}
