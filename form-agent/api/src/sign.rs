//! Signed requests: who asks for what, of which host, until when. Any host can verify it later.

use form_types::{ClusterId, Digest, IdempotencyKey, PublicKey};
use serde::{Deserialize, Serialize};

/// Request header with the JSON of `Signed<RequestEnvelope>` as URL-safe base64 without padding.
pub const SIGNATURE_HEADER: &str = "form-signature";

/// The context of the signature ([`form_types::Signed::new`]).
pub const CONTEXT: &str = "formation request 1";

/// How far `not_after` may lie ahead, in seconds: what bounds the memory of seen idempotency keys.
pub const MAX_VALIDITY_SECONDS: u64 = 15 * 60;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestEnvelope {
    /// `None` only in a claim, made before the client knows the cluster.
    pub cluster: Option<ClusterId>,
    /// The host that is asked.
    pub host: PublicKey,
    pub method: String,
    /// Path and query, as on the request line.
    pub path: String,
    /// Of the body's bytes; of nothing for a stream (blocks, kernel bundles: their content is named by digests of its own).
    pub body: Digest,
    pub idempotency_key: IdempotencyKey,
    /// Seconds since the Unix epoch.
    pub not_after: u64,
}
