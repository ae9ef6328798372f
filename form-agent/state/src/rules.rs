//! Who may change what: decided by the agent, asked by every replica for every change.

use form_types::PublicKey;

use crate::{
    change::SignedRequest,
    view::View,
    write::{Document, Write},
};

/// Why a change is not allowed, in words for the one who asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

impl Refusal {
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// What is known of a change beside its request and its writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    pub document: Document,
    /// The host that makes the change.
    pub author: PublicKey,
    /// Seconds since the Unix epoch by the author's clock: a claim, good for a creation date, not for a decision.
    pub time: i64,
}

/// The agent's rules.
///
/// **Every replica must come to the same verdict**, whenever it sees the change: the answer may depend on the arguments
/// only, never on the clock, on configuration, on randomness or on anything else of the host. Of the cluster's document
/// `view` shows what the author saw when it wrote, not what is there now, and no host's document.
pub trait Rules: Send + Sync {
    /// The writes that `request` allows in the cluster's document. Writes that say what is already there are dropped.
    ///
    /// # Errors
    /// A [`Refusal`] when the request is not validly signed, not addressed to the author, or not allowed.
    fn derive(&self, request: &SignedRequest, claim: &Claim, view: &View) -> Result<Vec<Write>, Refusal>;

    /// Whether a host may make these writes of its own accord. That the author of a host's document is that host is checked
    /// before; there `view` is the present state with all documents, and "not now" (not a member yet) is a fine answer.
    ///
    /// # Errors
    /// A [`Refusal`] when it may not.
    fn permit(&self, claim: &Claim, writes: &[Write], view: &View) -> Result<(), Refusal>;
}
