//! Who may do what. The owner's key may do everything; so may, on the Unix socket, whoever the kernel lets open it (root, group
//! `formation`), and the agent then signs for them. Nobody else may do anything but claim a host that has no owner.

use axum::body::Bytes;
use form_api::{
    ApiError, ErrorCode,
    server::Peer,
    sign::{self, Expected, IDEMPOTENCY_HEADER, SIGNATURE_HEADER, ToSign},
};
use form_types::{Digest, IdempotencyKey, PublicKey};
use http::request::Parts;
use jiff::Timestamp;

use crate::{agent::Agent, operation::Asked};

/// A change that somebody may make.
#[derive(Clone, Debug)]
pub struct Caller {
    /// A public key, or `local:<uid>`.
    pub actor: String,
    pub key: PublicKey,
    pub idempotency_key: IdempotencyKey,
    pub request: Asked,
    /// The signed envelope's header text and the body it covers: what the state records.
    pub signed: SignedRequest,
}

#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct SignedRequest {
    pub header: String,
    pub body: String,
}

fn denied(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::NotAllowed, message)
}

/// # Errors
/// `not-allowed` when the peer is not the owner.
pub fn read(agent: &Agent, parts: &Parts) -> Result<(), ApiError> {
    match parts.extensions.get::<Peer>() {
        Some(Peer::Local { .. }) => Ok(()),
        Some(Peer::Key(key)) => owner(agent, key),
        None => Err(denied("the connection has no peer")),
    }
}

fn owner(agent: &Agent, key: &PublicKey) -> Result<(), ApiError> {
    match agent.identity().owner() {
        Some(owner) if owner == *key => Ok(()),
        Some(_) => Err(denied(format!("the key {key} may not use this host"))
            .hint("its owner may; see `form key show` on the machine that claimed it")),
        None => Err(denied("this host has no owner yet")
            .hint("claim it: form host add ADDRESS --token TOKEN (the token is printed by `form-agent init`)")),
    }
}

/// # Errors
/// `not-allowed` when the request is not signed by who may make it; `invalid` for what cannot be read.
pub fn change(agent: &Agent, parts: &Parts, body: &Bytes) -> Result<Caller, ApiError> {
    let caller = verify(agent, parts, body, false)?;
    if parts.extensions.get::<Peer>().is_some_and(|peer| matches!(peer, Peer::Key(_))) {
        owner(agent, &caller.key)?;
    }
    Ok(caller)
}

/// As [`change`], for the one request that somebody who is not the owner may make.
///
/// # Errors
/// As [`change`], but for who signed it.
pub fn claim(agent: &Agent, parts: &Parts, body: &Bytes) -> Result<Caller, ApiError> {
    verify(agent, parts, body, true)
}

fn verify(agent: &Agent, parts: &Parts, body: &Bytes, is_claim: bool) -> Result<Caller, ApiError> {
    let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    // An exec has no body: what it signs is the header that says what to run.
    let body = sign::signed_bytes(&parts.headers, body);
    let text = std::str::from_utf8(body).map_err(|_| ApiError::new(ErrorCode::Invalid, "the body is not UTF-8"))?;
    let now = Timestamp::now();
    let (actor, header) = match parts.extensions.get::<Peer>() {
        None => return Err(denied("the connection has no peer")),
        Some(Peer::Local { uid, .. }) => {
            let to_sign = ToSign {
                cluster: Some(agent.cluster()),
                host: agent.key().public(),
                method: parts.method.as_str(),
                path,
                body,
                idempotency_key: local_key(parts)?,
            };
            let header = sign::sign_request(&to_sign, agent.key(), now)
                .map_err(|error| ApiError::new(ErrorCode::Internal, format!("cannot sign: {error}")))?;
            (Some(format!("local:{uid}")), header)
        }
        Some(Peer::Key(_)) => {
            let header = parts.headers.get(SIGNATURE_HEADER).ok_or_else(|| denied("the request is not signed"))?;
            let header = header.to_str().map_err(|_| denied("the signature is not text"))?;
            (None, header.to_owned())
        }
    };
    let expected = Expected {
        cluster: agent.cluster(),
        host: agent.key().public(),
        method: parts.method.as_str(),
        path,
        body: Digest::of(body),
        now,
        is_claim,
    };
    let (envelope, key) = sign::verify_request(header.as_bytes(), &expected)?.into_parts();
    if let Some(Peer::Key(peer)) = parts.extensions.get::<Peer>()
        && *peer != key
    {
        return Err(denied("the request was signed by another key than the connection's"));
    }
    let request = Asked::new(parts.method.as_str(), path, body);
    Ok(Caller {
        actor: actor.unwrap_or_else(|| key.to_string()),
        key,
        idempotency_key: envelope.idempotency_key,
        request,
        signed: SignedRequest { header, body: text.to_owned() },
    })
}

/// A change that the agent makes by itself, signed by its own key.
///
/// # Errors
/// When it cannot be signed.
pub fn own(agent: &Agent, method: &str, path: &str, body: &str) -> Result<SignedRequest, ApiError> {
    let failed = |error: &dyn std::fmt::Display| ApiError::new(ErrorCode::Internal, format!("cannot sign: {error}"));
    let to_sign = ToSign {
        cluster: Some(agent.cluster()),
        host: agent.key().public(),
        method,
        path,
        body: body.as_bytes(),
        idempotency_key: IdempotencyKey::random().map_err(|error| failed(&error))?,
    };
    let header = sign::sign_request(&to_sign, agent.key(), Timestamp::now()).map_err(|error| failed(&error))?;
    Ok(SignedRequest { header, body: body.to_owned() })
}

fn local_key(parts: &Parts) -> Result<IdempotencyKey, ApiError> {
    match parts.headers.get(IDEMPOTENCY_HEADER) {
        Some(value) => value
            .to_str()
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| ApiError::new(ErrorCode::Invalid, format!("{IDEMPOTENCY_HEADER} is not 32 hexadecimal digits"))),
        None => IdempotencyKey::random().map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string())),
    }
}
