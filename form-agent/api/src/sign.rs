//! Signed requests: who asks for what, of which host, until when. Any host can verify it later.
//!
//! A signature over the idempotency key and a time limit makes a repeated request harmless; remembering the keys is the agent's business.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use form_types::{ClusterId, Digest, IdempotencyKey, PublicKey, SecretKey, Signed, SignedError, Verified};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{ApiError, ErrorCode, exec::EXEC_HEADER};

/// Request header with the JSON of `Signed<RequestEnvelope>` as URL-safe base64 without padding.
pub const SIGNATURE_HEADER: &str = "form-signature";

/// Request header with the idempotency key of a mutating request on the Unix socket, where nothing is signed. Over QUIC the key is in
/// the envelope.
pub const IDEMPOTENCY_HEADER: &str = "form-idempotency-key";

/// The context of the signature ([`form_types::Signed::new`]).
pub const CONTEXT: &str = "formation request 1";

/// How far `not_after` may lie ahead, in seconds: what bounds the memory of seen idempotency keys.
pub const MAX_VALIDITY_SECONDS: u64 = 15 * 60;

/// What a client asks for: half of the maximum, so that its clock may be wrong by as much in both directions.
const VALIDITY_SECONDS: u64 = MAX_VALIDITY_SECONDS / 2;

/// The longest header value that is looked at, in bytes. A path may hold 8 KiB.
pub const MAX_HEADER: usize = 16 * 1024;

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
    /// Of the body's bytes; of nothing for a stream of blocks (each is named by its own digest); of the
    /// header [`EXEC_HEADER`] where that takes the body's place ([`signed_bytes`]).
    pub body: Digest,
    pub idempotency_key: IdempotencyKey,
    /// Seconds since the Unix epoch.
    pub not_after: u64,
}

/// What is to be signed, besides the time limit.
#[derive(Clone, Copy, Debug)]
pub struct ToSign<'a> {
    pub cluster: Option<ClusterId>,
    pub host: PublicKey,
    pub method: &'a str,
    pub path: &'a str,
    /// Empty for a stream.
    pub body: &'a [u8],
    pub idempotency_key: IdempotencyKey,
}

/// The value of [`SIGNATURE_HEADER`] for a request made at `now`.
///
/// # Errors
/// Never in practice: the envelope has a JSON form.
pub fn sign_request(request: &ToSign<'_>, key: &SecretKey, now: Timestamp) -> Result<String, SignedError> {
    let envelope = RequestEnvelope {
        cluster: request.cluster,
        host: request.host,
        method: request.method.to_owned(),
        path: request.path.to_owned(),
        body: Digest::of(request.body),
        idempotency_key: request.idempotency_key,
        not_after: seconds(now) + VALIDITY_SECONDS,
    };
    encode(&Signed::new(CONTEXT, envelope, key)?)
}

/// The header's text of a signed envelope.
///
/// # Errors
/// Never in practice: the envelope has a JSON form.
pub fn encode(signed: &Signed<RequestEnvelope>) -> Result<String, SignedError> {
    Ok(URL_SAFE_NO_PAD.encode(serde_json::to_vec(signed)?))
}

/// The signed envelope in a header's text; nothing about it is verified yet.
///
/// # Errors
/// `invalid` when it is longer than [`MAX_HEADER`] or no signed envelope.
pub fn decode(header: &[u8]) -> Result<Signed<RequestEnvelope>, ApiError> {
    let invalid = |what: String| ApiError::new(ErrorCode::Invalid, format!("the header `{SIGNATURE_HEADER}` {what}"));
    if header.len() > MAX_HEADER {
        return Err(invalid(format!("is longer than {} KiB", MAX_HEADER >> 10)));
    }
    let json = URL_SAFE_NO_PAD.decode(header).map_err(|_| invalid("is not URL-safe base64 without padding".to_owned()))?;
    serde_json::from_slice(&json).map_err(|error| invalid(format!("holds no signed request: {error}")))
}

/// What [`RequestEnvelope::body`] is the digest of: the header that says what to execute where there is one (an Upgrade has no body),
/// otherwise the body. Give an empty `body` for a stream.
pub fn signed_bytes<'a>(headers: &'a http::HeaderMap, body: &'a [u8]) -> &'a [u8] {
    headers.get(EXEC_HEADER).map_or(body, http::HeaderValue::as_bytes)
}

/// What the agent sees of a request, to compare with what was signed.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    pub cluster: ClusterId,
    /// The agent's own key.
    pub host: PublicKey,
    pub method: &'a str,
    /// Path and query, as on the request line.
    pub path: &'a str,
    /// Of [`signed_bytes`].
    pub body: Digest,
    pub now: Timestamp,
    /// Only a claim may leave out the cluster.
    pub is_claim: bool,
}

/// Checks that the header's envelope is signed by the key it names and was made for this very request. Whether that key may do so, and
/// whether the idempotency key was seen before, is for the agent to say.
///
/// # Errors
/// `invalid` for a header that cannot be read, `not-allowed` for each kind of mismatch, with its own message.
pub fn verify_request(header: &[u8], expected: &Expected<'_>) -> Result<Verified<RequestEnvelope>, ApiError> {
    let denied = |message: String| ApiError::new(ErrorCode::NotAllowed, message);
    let verified = decode(header)?.verify(CONTEXT).map_err(|error| denied(format!("the request's signature is wrong: {error}")))?;
    let envelope = verified.value();
    if envelope.host != expected.host {
        return Err(denied(format!("the request was signed for the host {}, this one is {}", envelope.host, expected.host)));
    }
    match envelope.cluster {
        Some(cluster) if cluster == expected.cluster => {}
        None if expected.is_claim => {}
        Some(cluster) => {
            return Err(denied(format!("the request was signed for the cluster {cluster}, this host is in {}", expected.cluster)));
        }
        None => return Err(denied("the request was signed for no cluster: only a claim may be".to_owned())),
    }
    if envelope.method != expected.method {
        return Err(denied(format!("the request was signed for the method {}, not {}", envelope.method, expected.method)));
    }
    if envelope.path != expected.path {
        return Err(denied(format!("the request was signed for {}, not {}", envelope.path, expected.path)));
    }
    if envelope.body != expected.body {
        return Err(denied("the request's body is not the one that was signed".to_owned()));
    }
    check_time(envelope.not_after, expected.now)?;
    Ok(verified)
}

fn check_time(not_after: u64, now: Timestamp) -> Result<(), ApiError> {
    let clock = seconds(now);
    let what = if not_after < clock {
        format!("expired {} seconds ago", clock - not_after)
    } else if not_after > clock.saturating_add(MAX_VALIDITY_SECONDS) {
        format!("is valid for too long ahead ({} seconds)", not_after - clock)
    } else {
        return Ok(());
    };
    Err(ApiError::new(ErrorCode::NotAllowed, format!("the signed request {what}: the host's clock says {now:.0}"))
        .hint("compare it with `date -u` on your machine and set the clock that is wrong, for example with `timedatectl set-ntp true`"))
}

/// Seconds since the epoch; a time before it counts as the epoch.
fn seconds(at: Timestamp) -> u64 {
    u64::try_from(at.as_second()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SecretKey {
        SecretKey::from_bytes([1; 32])
    }

    fn host() -> PublicKey {
        SecretKey::from_bytes([2; 32]).public()
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    const CLUSTER: ClusterId = ClusterId::from_bytes([3; 16]);

    fn header(cluster: Option<ClusterId>, body: &[u8]) -> String {
        let idempotency_key = IdempotencyKey::from_bytes([4; 16]);
        let request = ToSign { cluster, host: host(), method: "POST", path: "/v1/deploy?x=1", body, idempotency_key };
        sign_request(&request, &key(), now()).unwrap()
    }

    fn expected(body: &[u8]) -> Expected<'static> {
        Expected {
            cluster: CLUSTER,
            host: host(),
            method: "POST",
            path: "/v1/deploy?x=1",
            body: Digest::of(body),
            now: now(),
            is_claim: false,
        }
    }

    fn refusal(header: &str, expected: &Expected<'_>) -> String {
        let error = verify_request(header.as_bytes(), expected).unwrap_err();
        assert_eq!(error.code, ErrorCode::NotAllowed, "{error}");
        error.message
    }

    #[test]
    fn the_very_request_is_verified() {
        let header = header(Some(CLUSTER), b"body");
        let verified = verify_request(header.as_bytes(), &expected(b"body")).unwrap();
        assert_eq!(*verified.signer(), key().public());
        assert_eq!(verified.value().idempotency_key, IdempotencyKey::from_bytes([4; 16]));
    }

    #[test]
    fn each_difference_has_its_own_message() {
        let header = header(Some(CLUSTER), b"body");
        let right = expected(b"body");
        assert!(refusal(&header, &expected(b"bodx")).contains("body"));
        assert!(refusal(&header, &Expected { method: "DELETE", ..right }).contains("method POST, not DELETE"));
        assert!(refusal(&header, &Expected { path: "/v1/deploy?x=2", ..right }).contains("signed for /v1/deploy?x=1, not /v1/deploy?x=2"));
        assert!(refusal(&header, &Expected { host: key().public(), ..right }).contains("host"));
        assert!(refusal(&header, &Expected { cluster: ClusterId::from_bytes([9; 16]), ..right }).contains("cluster"));
    }

    #[test]
    fn only_a_claim_needs_no_cluster() {
        let header = header(None, b"");
        assert!(refusal(&header, &expected(b"")).contains("only a claim"));
        assert!(verify_request(header.as_bytes(), &Expected { is_claim: true, ..expected(b"") }).is_ok());
    }

    #[test]
    fn a_wrong_clock_is_named_with_the_hosts_time() {
        let header = header(Some(CLUSTER), b"");
        for (second, word) in [(1_800_000_451, "expired 1 seconds ago"), (1_799_999_549, "valid for too long ahead")] {
            let at = Expected { now: Timestamp::from_second(second).unwrap(), ..expected(b"") };
            let error = verify_request(header.as_bytes(), &at).unwrap_err();
            assert!(error.message.contains(word) && error.message.contains("2027-01-15T0"), "{error}");
            assert!(error.hint.unwrap().contains("date -u"));
        }
        for second in [1_800_000_450, 1_799_999_550] {
            assert!(verify_request(header.as_bytes(), &Expected { now: Timestamp::from_second(second).unwrap(), ..expected(b"") }).is_ok());
        }
    }

    #[test]
    fn an_altered_envelope_or_signer_is_found() {
        let signed = decode(header(Some(CLUSTER), b"").as_bytes()).unwrap();
        let mut altered = signed.clone();
        altered.value.not_after += 1;
        assert!(refusal(&encode(&altered).unwrap(), &expected(b"")).contains("signature"));
        let stolen = Signed { signer: host(), ..signed };
        assert!(refusal(&encode(&stolen).unwrap(), &expected(b"")).contains("signature"));
    }

    #[test]
    fn no_header_text_makes_trouble() {
        for text in ["", "!", "e30", "bnVsbA", &"A".repeat(MAX_HEADER + 1)] {
            assert_eq!(verify_request(text.as_bytes(), &expected(b"")).unwrap_err().code, ErrorCode::Invalid, "{text}");
        }
        assert_eq!(decode(&[0xff; 9]).unwrap_err().code, ErrorCode::Invalid);
    }

    #[test]
    fn an_exec_is_signed_over_its_header() {
        let mut headers = http::HeaderMap::new();
        assert_eq!(signed_bytes(&headers, b"body"), b"body");
        headers.insert(EXEC_HEADER, http::HeaderValue::from_static("e30"));
        assert_eq!(signed_bytes(&headers, b""), b"e30");
    }
}
