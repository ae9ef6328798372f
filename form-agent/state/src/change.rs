//! The signed change: what hosts keep and send to each other.

use std::fmt;

use borsh::{BorshDeserialize, BorshSerialize};
use form_types::{ClusterId, PublicKey, SecretKey, Signature};

use crate::write::{Document, Write};

/// The largest signed change, in bytes, on the wire and in the log.
pub const MAX_SIGNED_CHANGE: usize = 2 << 20;
/// The largest automerge chunk inside one, in bytes.
pub const MAX_CHANGE: usize = 1 << 20;
/// The most changes one may depend on: as many as hosts can write at the same time.
pub const MAX_DEPENDENCIES: usize = 1024;

const FORMAT: u8 = 1;
const CONTEXT: &[u8] = b"formation change 1\0";

/// The hash of a change: SHA-256 of its automerge chunk, which covers its dependencies and, through the chunk's message,
/// the cluster, the document and the user's request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, BorshSerialize, BorshDeserialize)]
pub struct ChangeHash(pub [u8; 32]);

impl ChangeHash {
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn from_automerge(hash: automerge::ChangeHash) -> Self {
        Self(hash.0)
    }

    pub(crate) const fn to_automerge(self) -> automerge::ChangeHash {
        automerge::ChangeHash(self.0)
    }
}

impl fmt::Display for ChangeHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ChangeHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex::encode(&self.0[..6]))
    }
}

/// A user's request as it arrived, so that any host can verify later who asked for what.
#[derive(Clone, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub struct SignedRequest {
    /// The text of the signature header: a signed request envelope.
    pub envelope: String,
    /// The request's body, empty when it had none.
    pub body: Vec<u8>,
}

impl fmt::Debug for SignedRequest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "SignedRequest({} bytes, body {} bytes)", self.envelope.len(), self.body.len())
    }
}

/// One change, with what makes it believable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedChange {
    pub cluster: ClusterId,
    pub document: Document,
    /// The host that wrote it; also the change's automerge actor.
    pub author: PublicKey,
    /// The author's how-manieth change of this document, from 1.
    pub seq: u64,
    /// When, by the author's clock, in seconds since the Unix epoch. A claim.
    pub time: i64,
    /// The document's heads that the author saw, ascending.
    pub deps: Vec<ChangeHash>,
    /// The user's request that allows the writes; the writes are then derived from it and `writes` is empty.
    pub request: Option<SignedRequest>,
    /// What the author writes of its own accord.
    pub writes: Vec<Write>,
    /// The automerge change: one uncompressed chunk. Never parsed before it equals what this replica builds from the rest.
    pub change: Vec<u8>,
    pub hash: ChangeHash,
}

/// The encoding (Borsh: one byte string for one value).
#[derive(BorshSerialize, BorshDeserialize)]
struct Body {
    format: u8,
    cluster: [u8; 16],
    document: [u8; 33],
    author: [u8; 32],
    seq: u64,
    time: i64,
    deps: Vec<ChangeHash>,
    request: Option<SignedRequest>,
    writes: Vec<Write>,
    change: Vec<u8>,
    hash: ChangeHash,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("{0} bytes are more than a signed change may have ({MAX_SIGNED_CHANGE})")]
    TooLarge(usize),
    #[error("these bytes are no signed change: {0}")]
    Malformed(String),
    #[error("a signed change of format {0}; this version reads format {FORMAT}: upgrade form-agent")]
    Format(u8),
    #[error("the signature of the change does not hold for {0}")]
    Signature(PublicKey),
}

fn signed_message(body: &[u8]) -> Vec<u8> {
    [CONTEXT, body].concat()
}

impl SignedChange {
    /// The change in bytes, signed with the author's key.
    pub(crate) fn sign(&self, key: &SecretKey) -> Result<Vec<u8>, DecodeError> {
        let body = Body {
            format: FORMAT,
            cluster: *self.cluster.as_bytes(),
            document: self.document.to_bytes(),
            author: *self.author.as_bytes(),
            seq: self.seq,
            time: self.time,
            deps: self.deps.clone(),
            request: self.request.clone(),
            writes: self.writes.clone(),
            change: self.change.clone(),
            hash: self.hash,
        };
        let body = borsh::to_vec(&body).map_err(|error| DecodeError::Malformed(error.to_string()))?;
        let bytes = Self::sign_bytes(body, key);
        if bytes.len() > MAX_SIGNED_CHANGE { Err(DecodeError::TooLarge(bytes.len())) } else { Ok(bytes) }
    }

    /// Puts the signature behind an encoded body.
    pub(crate) fn sign_bytes(mut body: Vec<u8>, key: &SecretKey) -> Vec<u8> {
        let signature = key.sign(&signed_message(&body));
        body.extend_from_slice(signature.as_bytes());
        body
    }

    /// Reads a change without looking at its signature: for bytes from this host's own log.
    pub(crate) fn decode_trusted(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::decode_parts(bytes).map(|(change, _, _)| change)
    }

    /// Reads a change and verifies its author's signature. Whether the author may do what it does is another question.
    ///
    /// # Errors
    /// [`DecodeError`] for bytes that are too many, no signed change, of another format, or not signed by the author.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (change, body, signature) = Self::decode_parts(bytes)?;
        if change.author.verify(&signed_message(body), &signature) { Ok(change) } else { Err(DecodeError::Signature(change.author)) }
    }

    /// Author and number, read off the encoding's fixed part.
    pub(crate) fn peek(bytes: &[u8]) -> Option<(PublicKey, u64)> {
        // format 1, cluster 16, document 33, author 32, seq 8
        let author: [u8; 32] = bytes.get(50..82)?.try_into().ok()?;
        let seq: [u8; 8] = bytes.get(82..90)?.try_into().ok()?;
        Some((PublicKey::from_bytes(author).ok()?, u64::from_le_bytes(seq)))
    }

    fn decode_parts(bytes: &[u8]) -> Result<(Self, &[u8], Signature), DecodeError> {
        if bytes.len() > MAX_SIGNED_CHANGE {
            return Err(DecodeError::TooLarge(bytes.len()));
        }
        let malformed = |what: &str| DecodeError::Malformed(what.to_owned());
        let (encoded, signature) = bytes.split_last_chunk::<64>().ok_or_else(|| malformed("too short"))?;
        match encoded.first() {
            Some(&FORMAT) => {}
            Some(&other) => return Err(DecodeError::Format(other)),
            None => return Err(malformed("too short")),
        }
        let body = Body::try_from_slice(encoded).map_err(|error| DecodeError::Malformed(error.to_string()))?;
        if body.deps.len() > MAX_DEPENDENCIES || !body.deps.is_sorted_by(|left, right| left < right) {
            return Err(malformed("its dependencies are too many or not in order"));
        }
        if body.change.len() > MAX_CHANGE {
            return Err(malformed("its automerge chunk is too large"));
        }
        if body.request.is_some() && !body.writes.is_empty() {
            return Err(malformed("it has both a request and writes of its own"));
        }
        let change = Self {
            cluster: ClusterId::from_bytes(body.cluster),
            document: Document::from_bytes(&body.document).ok_or_else(|| malformed("no such document"))?,
            author: PublicKey::from_bytes(body.author).map_err(|_| malformed("its author is no key"))?,
            seq: body.seq,
            time: body.time,
            deps: body.deps,
            request: body.request,
            writes: body.writes,
            change: body.change,
            hash: body.hash,
        };
        Ok((change, encoded, Signature::from_bytes(*signature)))
    }

    /// The text that ties the automerge chunk, and so the hash, to the cluster, the document and the request: without it
    /// one chunk could be signed into two clusters, or under two requests.
    pub(crate) fn binding(cluster: &ClusterId, document: &Document, request: Option<&SignedRequest>) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("formation 2026 state change binding");
        hasher.update(cluster.as_bytes()).update(&document.to_bytes());
        if let Some(request) = request {
            hasher.update(&(request.envelope.len() as u64).to_le_bytes()).update(request.envelope.as_bytes()).update(&request.body);
        }
        hex::encode(hasher.finalize().as_bytes())
    }
}
