//! The OpenAPI document of the API: made from the handlers and the words they exchange.

use axum::{
    extract::{Request, State},
    http::{HeaderName, header::CONTENT_TYPE},
};
use form_api::{
    ApiError,
    copy::Direction,
    error::ErrorBody,
    exec::{ExecRequest, Terminal},
};
use form_types::IdempotencyKey;
use serde_json::{Map, Value};
use utoipa::{
    IntoParams, IntoResponses, OpenApi, ToSchema,
    openapi::security::{ApiKey, ApiKeyValue, SecurityScheme},
};

use super::{Shared, example, reading};

const ABOUT: &str = "The API of a Formation host.

It is served over QUIC (ALPN `form/1`, mutual TLS with pinned Ed25519 keys, one HTTP/1.1 exchange a stream), and as plain HTTP/1.1 on the Unix \
socket `/run/formation/agent.sock`, for root and the group `formation`: \
`curl --unix-socket /run/formation/agent.sock http://agent/v1/vms`.

Over QUIC every request that changes something is signed (header `form-signature`); on the socket the agent signs for whoever asks. Every \
refusal has the body of `ErrorBody`. A request line with headers of more than 256 KiB is answered with status 431 and no body. Long answers are \
`application/x-ndjson`: one JSON value a line, as they come; the schema is that of one line.";

#[derive(OpenApi)]
#[openapi(
    info(title = "Formation", description = ABOUT, license(name = "Apache-2.0", identifier = "Apache-2.0")),
    servers((url = "http://agent", description = "Any name: the address is the socket, or the QUIC connection")),
    components(schemas(Direction, ErrorBody, ExecRequest, Terminal)),
    modifiers(&Security),
    tags(
        (name = "hosts", description = "The host itself"),
        (name = "deploy", description = "From a request to a running VM"),
        (name = "vms", description = "Virtual machines"),
        (name = "snapshots", description = "What VMs were at one instant"),
        (name = "volumes", description = "Disks with a life of their own"),
        (name = "pools", description = "Places that volumes live in"),
        (name = "streams", description = "Exchanges that turn into streams of bytes, by HTTP Upgrade"),
        (name = "images", description = "Images and kernel bundles, and the blocks that they are made of"),
        (name = "operations", description = "Changes that somebody asked for"),
        (name = "events", description = "What happened"),
    )
)]
struct Document;

/// How the two transports know who asks.
struct Security;

impl utoipa::Modify for Security {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_with(Default::default);
        let key = SecurityScheme::MutualTls {
            description: Some("QUIC with the owner's Ed25519 key as a raw public key (RFC 7250). Not on the Unix socket.".to_owned()),
            deprecated: None,
            extensions: None,
        };
        let signature = "Over QUIC: URL-safe base64 without padding of the JSON of an envelope, signed by the connection's key: cluster, host \
                         key, method, path with query, BLAKE3 digest of the body, idempotency key, time limit. Not on the Unix socket.";
        let signature = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::with_description("form-signature", signature)));
        components.security_schemes.insert("key".to_owned(), key.into());
        components.security_schemes.insert("signature".to_owned(), signature.into());
    }
}

/// What every request may be refused with.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "they are read by the derive alone")]
pub enum Refused {
    /// The request makes no sense: `invalid`.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// The key may not do that, or the signature does not hold: `not-allowed`.
    #[response(status = 403)]
    NotAllowed(ErrorBody),
    /// Something failed that should not: `internal`.
    #[response(status = 500)]
    Internal(ErrorBody),
    /// Not now: `unavailable`, for example with too many connections. The same request may succeed later.
    #[response(status = 503)]
    Unavailable(ErrorBody),
}

#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub enum Unreadable {
    /// The body is larger than the agent reads (8 MiB; a block 66 KiB): `too-large`.
    #[response(status = 413)]
    TooLarge(ErrorBody),
}

#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub enum Missing {
    /// There is no such thing: `not-found`.
    #[response(status = 404)]
    NotFound(ErrorBody),
}

#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub enum InTheWay {
    /// A name, a port, a state, an unfinished operation or another request under the same idempotency key is in the way: `conflict`.
    #[response(status = 409)]
    Conflict(ErrorBody),
}

#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub enum Impossible {
    /// It was tried and failed, or this version does not do it: `failed`, `unsupported`.
    #[response(status = 422)]
    Failed(ErrorBody),
}

#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub enum NoRoom {
    /// The host has no room for it: memory, disk, `max_vms`: `no-room`.
    #[response(status = 507)]
    NoRoom(ErrorBody),
}

#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub struct ChangeHeaders {
    /// On the Unix socket: names the request, so that sent twice it is done once. Without it the agent draws one. Over QUIC the key is in the
    /// signature.
    #[param(rename = "form-idempotency-key", value_type = IdempotencyKey, required = false)]
    idempotency_key: Option<IdempotencyKey>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub struct UpgradeHeaders {
    /// `upgrade`
    #[param(pattern = "^upgrade$")]
    connection: String,
    /// `form-exec`, `form-copy`, `form-console`, `form-forward`, `form-import` or `form-contents`, as the path wants
    #[param(pattern = "^form-(exec|copy|console|forward|import|contents)$")]
    upgrade: String,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub struct ExecHeader {
    /// What to run: the JSON of `ExecRequest`, as URL-safe base64 without padding
    #[param(rename = "form-exec", pattern = "^[A-Za-z0-9_-]+$")]
    exec: String,
}

/// Bytes.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it is read by the derive alone")]
pub struct Binary(Vec<u8>);

/// This document.
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    operation_id = "show_openapi",
    tag = "hosts",
    responses((status = 200, description = "The OpenAPI document of this agent", body = Object), Refused),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, request: Request) -> Result<([(HeaderName, &'static str); 1], &'static str), ApiError> {
    reading(&agent, request).await?;
    Ok(([(CONTENT_TYPE, "application/json")], KEPT))
}

/// The document as it is checked in, which a test keeps true: made anew it would cost megabytes of memory.
const KEPT: &str = include_str!("../../../docs/openapi.json");

/// The whole document, with examples.
pub fn document() -> Value {
    let mut document = Document::openapi();
    document.merge(super::Described::openapi());
    let mut document = serde_json::to_value(document).unwrap_or_default();
    if let Some(schemas) = document.pointer_mut("/components/schemas").and_then(Value::as_object_mut) {
        for (name, value) in example::all() {
            if let Some(schema) = schemas.get_mut(name).and_then(Value::as_object_mut) {
                schema.insert("examples".to_owned(), Value::Array(vec![value]));
            }
        }
    }
    exact(&mut document);
    sorted(document)
}

/// Says what the derive leaves open: that all items of a tuple are there, and that a number which is not negative has all its bits.
fn exact(value: &mut Value) {
    if let Some(object) = value.as_object_mut() {
        if let Some(items) = object.get("prefixItems").and_then(Value::as_array).map(Vec::len) {
            object.insert("minItems".to_owned(), items.into());
        }
        let unsigned = object.get("minimum").is_some_and(Value::is_u64);
        if let Some(format) = object.get("format").and_then(Value::as_str).filter(|format| unsigned && format.starts_with("int")) {
            let format = format!("u{format}");
            object.insert("format".to_owned(), format.into());
        }
    }
    match value {
        Value::Object(object) => object.values_mut().for_each(exact),
        Value::Array(values) => values.iter_mut().for_each(exact),
        _ => {}
    }
}

/// The same with every object's keys in order, so that the file which is checked in changes only where something has changed.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut entries: Vec<(String, Value)> = object.into_iter().collect();
            entries.sort_by(|(one, _), (other, _)| one.cmp(other));
            Value::Object(entries.into_iter().map(|(key, value)| (key, sorted(value))).collect::<Map<_, _>>())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(sorted).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn operations(document: &Value) -> Vec<(String, String, &Value)> {
        let paths = document["paths"].as_object().unwrap();
        let all = paths.iter().flat_map(|(path, item)| item.as_object().unwrap().iter().map(move |(method, what)| (path, method, what)));
        all.map(|(path, method, what)| (path.clone(), method.clone(), what)).collect()
    }

    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(object) => {
                found.extend(object.get("$ref").and_then(Value::as_str));
                object.values().for_each(|value| references(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn what_is_checked_in_is_what_the_code_says() {
        let kept: Value = serde_json::from_str(KEPT).unwrap_or_default();
        assert!(kept == document(), "docs/openapi.json is stale: cargo run -p form-agent -- openapi > docs/openapi.json");
    }

    #[test]
    fn everything_is_described() {
        let document = document();
        let mut named = Vec::new();
        references(&document, &mut named);
        for reference in named {
            assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference} leads nowhere");
        }
        for (name, _) in example::all() {
            assert!(document["components"]["schemas"][name]["examples"][0].is_object(), "{name} has no example");
        }
        assert_eq!(example::all().len(), 51);
        // Two types of one name would be described as one.
        let has = |schema: &str, property: &str| document["components"]["schemas"][schema]["properties"].get(property).is_some();
        assert!(has("Volume", "serial") && has("SpecVolume", "path") && !has("SpecVolume", "serial"));
        let mut ids = BTreeSet::new();
        for (path, method, operation) in operations(&document) {
            let what = format!("{method} {path}: {operation}");
            assert!(ids.insert(operation["operationId"].as_str().unwrap()), "another is called as {what}");
            assert!(operation["summary"].as_str().is_some_and(|text| text.ends_with('.')), "no summary: {what}");
            for status in ["400", "403", "500", "503"] {
                let schema = &operation["responses"][status]["content"]["application/json"]["schema"]["$ref"];
                assert_eq!(schema, "#/components/schemas/ErrorBody", "{status} of {what}");
            }
            let variables = path.matches('{').count();
            let parameters = operation["parameters"].as_array().map_or(0, |all| all.iter().filter(|one| one["in"] == "path").count());
            assert_eq!(variables, parameters, "the variables of {what}");
        }
    }

    #[test]
    fn only_what_changes_something_is_signed() {
        let document = document();
        let unsigned = ["/v1/plan", "/v1/images/missing", "/v1/images/{reference}/blocks", "/v1/blocks", "/v1/manifests/{digest}"];
        let upgrades = [
            "/v1/vms/{name}/exec",
            "/v1/vms/{name}/copy",
            "/v1/vms/{name}/console",
            "/v1/vms/{name}/forward",
            "/v1/volumes/{name}/import",
            "/v1/volumes/{name}/contents",
        ];
        for (path, method, operation) in operations(&document) {
            let signed = operation["security"].as_array().unwrap().iter().any(|one| one.get("signature").is_some());
            let changes = (method != "get" && !unsigned.contains(&path.as_str())) || upgrades.contains(&path.as_str());
            assert_eq!(signed, changes, "{method} {path}");
        }
    }

    /// A handler is served when it is in the list that router and document are made of: nothing may go past that list.
    #[test]
    fn every_handler_is_in_the_document_and_every_route_is_a_described_handler() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/src/serve");
        let (mut described, mut routes) = (0, 0);
        for entry in std::fs::read_dir(directory).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            described += text.lines().filter(|line| line.trim_end() == "#[utoipa::path(").count();
            routes += text.matches(&[".rou", "te("].concat()).count() + text.matches(&[".ne", "st("].concat()).count();
        }
        assert_eq!(operations(&document()).len(), described);
        assert_eq!(routes, 1, "only the list's macro makes routes");
    }
}
