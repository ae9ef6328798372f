//! What an agent reads from clients, and a client from agents: signed request headers, JSON bodies, exec frames, block frames.

#![no_main]

use arbitrary::Arbitrary;
use form_api::{
    deploy::{DeployRequest, Plan},
    error::ErrorBody,
    event::Event,
    exec::{self, ExecRequest},
    host::{ClaimRequest, DoctorReport, Host},
    image::{BlockFrame, Image, ImportRequest, MissingRequest},
    operation::Operation,
    sign::{CONTEXT, Expected, MAX_VALIDITY_SECONDS, RequestEnvelope, ToSign, decode, encode, sign_request, verify_request},
    vm::{LogLine, RenameRequest, SetRequest, Vm, VmDetail},
};
use form_fuzz::format::{
    Alteration, Samples,
    samples::{DIGEST, spec},
};
use form_types::{ClusterId, Digest, IdempotencyKey, PublicKey, SecretKey, Signature, Signed};
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    /// A header of any bytes.
    Header(&'a [u8]),
    /// The header of a request that was signed, with another envelope in it.
    Envelope(Vec<Alteration<'a>>),
    /// A request that somebody signed who may say what he likes, seen by a host after `seconds`.
    Signed {
        alterations: Vec<Alteration<'a>>,
        is_claim: bool,
        seconds: i32,
    },
    /// A request that was signed, and what became of it on the way.
    Altered {
        at: u16,
        bit: u8,
        method: bool,
        path: &'a str,
        body: &'a [u8],
        other_body: Option<&'a [u8]>,
        seconds: i32,
    },
    Body {
        kind: u8,
        alterations: Vec<Alteration<'a>>,
    },
    Frames(Vec<Framed<'a>>),
    Blocks {
        frames: Vec<(&'a [u8], Option<u32>)>,
        rest: &'a [u8],
    },
    Text(&'a str),
}

#[derive(Arbitrary, Debug)]
struct Framed<'a> {
    kind: u8,
    /// What the header says, when it lies.
    length: Option<u32>,
    payload: &'a [u8],
}

const CLUSTER: ClusterId = ClusterId::from_bytes([3; 16]);

fn key() -> SecretKey {
    SecretKey::from_bytes([1; 32])
}

fn host() -> PublicKey {
    SecretKey::from_bytes([2; 32]).public()
}

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap_or_default()
}

fn expected<'a>(path: &'a str, body: &[u8], now: Timestamp) -> Expected<'a> {
    Expected { cluster: CLUSTER, host: host(), method: "POST", path, body: Digest::of(body), now, is_claim: false }
}

/// What can be read can be written, and reads as the same.
fn body<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(json: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(json) {
        let text = serde_json::to_vec(&value).expect("it has a JSON form");
        let again: T = serde_json::from_slice(&text).expect("what was written can be read");
        assert_eq!(again, value);
    }
}

type Look = fn(&[Alteration]);

/// A table of what is done with each kind of body; each has a sound one that is altered.
macro_rules! bodies {
    ($($kind:ty => $sound:expr),+ $(,)?) => {
        &[$({
            fn look(alterations: &[Alteration]) {
                static SAMPLES: Samples = Samples::new(|| vec![$sound]);
                body::<$kind>(&SAMPLES.altered::<$kind>(0, alterations));
            }
            look
        }),+]
    };
}

static BODIES: &[Look] = bodies![
    DeployRequest => deploy(),
    Plan => json!({"vms": [{
        "name": "web", "action": "update", "restarts": true, "loses": ["the root disk"],
        "changes": [{"field": "image", "from": null, "to": DIGEST}],
    }]}),
    ErrorBody => json!({"error": failure()}),
    Event => json!({
        "cursor": 7, "at": "2027-01-15T08:00:00Z", "kind": "operation-failed", "vm": "web", "operation": ID, "message": "no room",
    }),
    ExecRequest => json!({
        "command": ["sh", "-c", "ls"], "env": {"A": "b"}, "user": "ada", "workdir": "/srv",
        "terminal": {"rows": 24, "columns": 80, "kind": "xterm"},
    }),
    ClaimRequest => json!({"secret": "0123456789abcdef"}),
    DoctorReport => json!({"checks": [
        {"name": "kvm", "status": "problem", "message": "no /dev/kvm", "hint": "form sandbox up", "fixable": false},
    ]}),
    Host => json!({
        "id": ID, "name": "here", "public_key": host().to_string(), "cluster": CLUSTER.to_string(), "version": "0.1.0",
        "kernel": "6.1", "owner": null, "started_at": "2027-01-15T08:00:00Z", "now": "2027-01-15T08:00:01.5Z",
        "vcpus_total": 2, "vcpus_allocated": 1, "memory_total_mib": 4096, "memory_allocated_mib": 512,
        "disk_total_bytes": 1_000_000, "disk_free_bytes": 1_000, "vms": 1, "max_vms": 100,
    }),
    Image => json!({
        "name": "web", "version": 3, "digest": DIGEST, "size_bytes": 1, "stored_bytes": 1, "created_at": "2027-01-15T08:00:00Z",
        "used_by": ["web"],
    }),
    ImportRequest => json!({"manifest": DIGEST}),
    MissingRequest => json!({"blocks": [DIGEST, DIGEST]}),
    Operation => json!({
        "id": ID, "kind": "vm-start", "subject": "vm/web", "actor": host().to_string(), "idempotency_key": ID, "status": "failed",
        "error": failure(), "created_at": "2027-01-15T08:00:00Z", "started_at": "2027-01-15T08:00:00Z", "finished_at": null,
    }),
    LogLine => json!({"at": "2027-01-15T08:00:00Z", "stream": "stderr", "line": "hello"}),
    Vm => vm(),
    VmDetail => json!({"vm": vm(), "desired": deploy(), "guest": {
        "kernel": "6.1", "hostname": "web", "addresses": ["10.77.0.2/32"], "faults": [],
        "devices": [{"serial": "root", "path": "/dev/vda", "size_bytes": 5}],
    }}),
    SetRequest => json!({
        "labels": {"tier": "front", "old": null}, "restart_policy": {"policy": "always", "max_retries": null},
        "vcpus": 2, "memory_mib": 512, "restart": true,
    }),
    RenameRequest => json!({"name": "web"}),
];

const ID: &str = "00112233445566778899aabbccddeeff";

fn deploy() -> Value {
    json!({"spec": spec(), "passwd_hashes": {"ada": "$6$salt$hash"}, "image": DIGEST, "kernel": DIGEST})
}

fn failure() -> Value {
    json!({"code": "no-room", "message": "no room", "hint": "remove an image", "retryable": false, "operation": ID})
}

fn vm() -> Value {
    json!({
        "id": ID, "name": "web", "host": ID, "host_name": "here", "image": "web:3", "image_digest": DIGEST, "state": "running",
        "ready": true, "health": "healthy", "ipv4": "10.77.0.2", "ipv6": "fd00::2", "dns_name": "web.default.form.internal",
        "ports": [{"port": 80, "protocol": "tcp", "host_port": 8080}], "vcpus": 1, "memory_mib": 512, "disk_gib": 5,
        "labels": {"tier": "front"}, "created_at": "2027-01-15T08:00:00Z", "started_at": null, "restarts": 0, "fault": null,
    })
}

fn frames(made: &[Framed]) {
    let mut bytes = Vec::new();
    for Framed { kind, length, payload } in made.iter().take(64) {
        bytes.push(kind % 10);
        bytes.extend(length.unwrap_or(payload.len() as u32).to_le_bytes());
        bytes.extend(*payload);
    }
    let mut bytes = bytes.as_slice();
    while let Some((header, rest)) = bytes.split_first_chunk::<{ exec::HEADER }>() {
        let Ok((kind, length)) = exec::Frame::parse_header(header) else { return };
        let Some((payload, rest)) = rest.split_at_checked(length) else { return };
        if let Ok(frame) = exec::Frame::decode(kind, payload.to_vec()) {
            let encoded = frame.encode();
            let (header, payload) = encoded.split_first_chunk().expect("a frame has a header");
            // What is no UTF-8 in a message may grow beyond a frame when it is replaced.
            if let Ok((kind, _)) = exec::Frame::parse_header(header) {
                assert_eq!(exec::Frame::decode(kind, payload.to_vec()), Ok(frame));
            }
        }
        bytes = rest;
    }
}

fn blocks(frames: &[(&[u8], Option<u32>)], rest: &[u8]) {
    let mut bytes = Vec::new();
    for (block, length) in frames.iter().take(16) {
        bytes.extend(BlockFrame::header(&Digest::of(block), length.unwrap_or(block.len() as u32)));
        bytes.extend(*block);
    }
    bytes.extend(rest);
    let mut bytes = bytes.as_slice();
    while let Some((header, rest)) = bytes.split_first_chunk::<{ BlockFrame::HEADER }>() {
        let (digest, length) = BlockFrame::parse_header(header);
        assert_eq!(&BlockFrame::header(&digest, length), header);
        let Some((_, rest)) = rest.split_at_checked(length as usize) else { return };
        bytes = rest;
    }
}

/// The envelope of a request to the host, as JSON.
fn envelope() -> Value {
    json!({
        "cluster": CLUSTER.to_string(), "host": host().to_string(), "method": "POST", "path": "/v1/deploy", "body": Digest::of(b"").to_string(),
        "idempotency_key": ID, "not_after": 1_800_000_400_u64,
    })
}

fn signed_envelope() -> Value {
    let envelope = serde_json::from_value::<RequestEnvelope>(envelope()).expect("the envelope is one");
    let signed = Signed::new(CONTEXT, envelope, &key()).expect("an envelope has a JSON form");
    serde_json::to_value(signed).expect("an envelope has a JSON form")
}

/// Whoever signs may say what he likes: it is taken if, and only if, it says what is happening.
fn signed(alterations: &[Alteration], is_claim: bool, seconds: i32) {
    static SAMPLES: Samples = Samples::new(|| vec![envelope()]);
    let json = SAMPLES.altered::<RequestEnvelope>(0, alterations);
    let Ok(envelope) = serde_json::from_slice::<RequestEnvelope>(&json) else { return };
    let later = 1_800_000_000 + i64::from(seconds);
    let expected = Expected { is_claim, ..expected("/v1/deploy", b"", Timestamp::from_second(later).unwrap_or_default()) };
    let cluster = envelope.cluster.map_or(is_claim, |cluster| cluster == CLUSTER);
    let same = envelope.host == host() && envelope.method == "POST" && envelope.path == "/v1/deploy" && envelope.body == Digest::of(b"");
    let later = u64::try_from(later).unwrap_or(0);
    let in_time = envelope.not_after >= later && envelope.not_after - later <= MAX_VALIDITY_SECONDS;
    let header = encode(&Signed::new(CONTEXT, envelope, &key()).expect("it was read from JSON")).expect("it was read from JSON");
    let result = verify_request(header.as_bytes(), &expected);
    assert_eq!(result.is_ok(), cluster && same && in_time, "{result:?}");
}

fuzz_target!(|input: Input| match input {
    Input::Header(bytes) => {
        if let Ok(signed) = decode(bytes) {
            let text = encode(&signed).expect("an envelope has a JSON form");
            assert_eq!(decode(text.as_bytes()).ok(), Some(signed));
        }
        assert!(verify_request(bytes, &expected("/v1/deploy", b"", now())).is_err(), "a request that nobody signed was accepted");
    }
    Input::Envelope(alterations) => {
        use base64::Engine;
        static SAMPLES: Samples = Samples::new(|| vec![signed_envelope()]);
        let json = SAMPLES.altered::<Signed<RequestEnvelope>>(0, &alterations);
        let header = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json);
        if let Ok(verified) = verify_request(header.as_bytes(), &expected("/v1/deploy", b"", now())) {
            let honest = serde_json::from_value::<RequestEnvelope>(envelope()).expect("the envelope is one");
            assert_eq!(*verified.value(), honest, "a request that nobody signed was accepted");
        }
    }
    Input::Signed { alterations, is_claim, seconds } => signed(&alterations, is_claim, seconds),
    Input::Altered { at, bit, method, path, body, other_body, seconds } => {
        let method = if method { "POST" } else { "PUT" };
        let request =
            ToSign { cluster: Some(CLUSTER), host: host(), method, path, body, idempotency_key: IdempotencyKey::from_bytes([4; 16]) };
        let Ok(header) = sign_request(&request, &key(), now()) else { return };
        let later = Timestamp::from_second(1_800_000_000 + i64::from(seconds)).unwrap_or_default();
        let seen = other_body.unwrap_or(body);
        let untouched = verify_request(header.as_bytes(), &expected(path, seen, later));
        let in_time = (-450..=450).contains(&seconds);
        // A header longer than an agent reads is refused whatever it says.
        let fits = header.len() <= form_api::sign::MAX_HEADER;
        assert_eq!(untouched.is_ok(), fits && method == "POST" && seen == body && in_time, "{untouched:?} at {seconds}");
        let signed = decode(header.as_bytes());
        let mut bytes = header.into_bytes();
        let place = usize::from(at) % bytes.len();
        bytes[place] ^= 1 << (bit % 8);
        if let Ok(verified) = verify_request(&bytes, &expected(path, seen, later)) {
            // The signature covers what a header says, not how it is written.
            assert_eq!(Some(verified.value()), signed.as_ref().ok().map(|signed| &signed.value), "an altered request was accepted");
        }
    }
    Input::Body { kind, alterations } => BODIES[usize::from(kind) % BODIES.len()](&alterations),
    Input::Frames(made) => frames(&made),
    Input::Blocks { frames, rest } => blocks(&frames, rest),
    Input::Text(text) => {
        // What is parsed is written as something that means the same.
        macro_rules! again {
            ($($kind:ty),*) => { $(if let Ok(value) = text.parse::<$kind>() {
                assert_eq!(value.to_string().parse::<$kind>().ok(), Some(value));
            })* };
        }
        again!(PublicKey, Signature, ClusterId, Digest, IdempotencyKey, form_types::VmId, form_types::OperationId, form_types::Name);
        again!(form_types::ImageReference);
    }
});
