//! Bad days of an agent that listens to a network: forged requests, huge ones, and too many at once.

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    sync::Arc,
    time::Duration,
};

use form_api::{
    ALPN,
    client::{Client, Timeouts},
    sign::{self, ToSign},
    tls,
};
use form_tests::host::{Host, enter_own_network};
use form_types::{ClusterId, IdempotencyKey, PublicKey, SecretKey};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

/// A host of this test's, and what somebody needs who speaks to it without our client.
struct Victim {
    host: Host,
    key: PublicKey,
    cluster: ClusterId,
    owner: SecretKey,
}

const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), form_api::DEFAULT_PORT);

impl Victim {
    fn new() -> Self {
        let mut host = Host::new();
        host.claim();
        let shown = host.remote(&["host", "show", "-o", "json"]).ok().json();
        let identity = fs::read_to_string(host.path("home/config/form/identity")).unwrap();
        Self {
            key: shown["public_key"].as_str().unwrap().parse().unwrap(),
            cluster: shown["cluster"].as_str().unwrap().parse().unwrap(),
            owner: SecretKey::from_hex(identity.trim()).unwrap(),
            host,
        }
    }

    /// The header of a request to tidy up, which changes nothing on a tidy host, but is an operation.
    fn signed(&self, change: impl FnOnce(&mut ToSign<'_>), by: &SecretKey, at: Timestamp) -> String {
        let mut request = ToSign {
            cluster: Some(self.cluster),
            host: self.key,
            method: "POST",
            path: "/v1/doctor/fix",
            body: b"",
            idempotency_key: IdempotencyKey::random().unwrap(),
        };
        change(&mut request);
        sign::sign_request(&request, by, at).unwrap()
    }

    fn tidied_up(&self) -> usize {
        self.host.operations().iter().filter(|operation| operation["kind"] == "doctor-fix").count()
    }

    /// The agent's memory now and at its highest, in KiB.
    fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.host.agent_pid().unwrap())).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok()).unwrap();
        (field("VmRSS:"), field("VmHWM:"))
    }
}

fn runtime() -> tokio::runtime::Runtime {
    // One thread: this one, which is in the test's network.
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// One exchange on a connection of its own, byte by byte: the status, and the error's code and message.
async fn exchange(host: PublicKey, identity: &SecretKey, request: Vec<u8>) -> (u16, String) {
    let (crypto, _) = tls::client(identity, host, ALPN).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint.connect_with(quinn::ClientConfig::new(Arc::new(crypto)), ADDRESS, "formation").unwrap();
    let connection = connecting.await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let writing = async {
        // The agent may answer, and close, before it has read everything.
        let _ = send.write_all(&request).await;
        let _ = send.finish();
    };
    let reading = async { receive.read_to_end(1 << 20).await.unwrap_or_default() };
    let answer = tokio::time::timeout(Duration::from_secs(60), async { tokio::join!(writing, reading).1 }).await.expect("an answer");
    connection.close(0_u32.into(), b"");
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no answer: {text:?}"));
    (status, text.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned())
}

fn post(path: &str, signature: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: agent\r\nform-signature: {signature}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_forged_altered_and_repeated_requests_do_nothing() {
    enter_own_network();
    let victim = Victim::new();
    let now = Timestamp::now();
    let stranger = SecretKey::random().unwrap();
    let path = "/v1/doctor/fix";
    let runtime = runtime();
    let ask = |identity: &SecretKey, request: Vec<u8>| runtime.block_on(exchange(victim.key, identity, request));

    let good = victim.signed(|_| {}, &victim.owner, now);
    assert_eq!(ask(&victim.owner, post(path, &good, "")).0, 200);
    assert_eq!(victim.tidied_up(), 1);
    // Recorded and sent again: it is the same request, and is answered without being done again.
    assert_eq!(ask(&victim.owner, post(path, &good, "")).0, 200);
    assert_eq!(victim.tidied_up(), 1);

    let mut altered = good.clone().into_bytes();
    let middle = altered.len() / 2;
    altered[middle] = if altered[middle] == b'A' { b'B' } else { b'A' };
    let altered = String::from_utf8(altered).unwrap();
    let fresh = |change: fn(&mut ToSign<'_>)| victim.signed(change, &victim.owner, now);
    let refused = [
        ("on a stranger's connection", ask(&stranger, post(path, &good, ""))),
        ("signed by a stranger", ask(&stranger, post(path, &victim.signed(|_| {}, &stranger, now), ""))),
        ("a stranger's on the owner's connection", ask(&victim.owner, post(path, &victim.signed(|_| {}, &stranger, now), ""))),
        ("altered", ask(&victim.owner, post(path, &altered, ""))),
        ("with another body", ask(&victim.owner, post(path, &fresh(|_| {}), "{}"))),
        ("for another path", ask(&victim.owner, post(path, &fresh(|request| request.path = "/v1/vms/web"), ""))),
        ("for another method", ask(&victim.owner, post(path, &fresh(|request| request.method = "DELETE"), ""))),
        ("for another host", ask(&victim.owner, post(path, &fresh(|request| request.host = SecretKey::from_bytes([9; 32]).public()), ""))),
        (
            "for another cluster",
            ask(&victim.owner, post(path, &fresh(|request| request.cluster = Some(ClusterId::from_bytes([9; 16]))), "")),
        ),
        ("for no cluster", ask(&victim.owner, post(path, &fresh(|request| request.cluster = None), ""))),
        ("kept for later", {
            let long_ago = now.checked_sub(SignedDuration::from_mins(16)).unwrap();
            ask(&victim.owner, post(path, &victim.signed(|_| {}, &victim.owner, long_ago), ""))
        }),
        ("unsigned", ask(&victim.owner, format!("POST {path} HTTP/1.1\r\nhost: agent\r\ncontent-length: 0\r\n\r\n").into_bytes())),
    ];
    for (what, (status, body)) in refused {
        let error: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("{what}: {status} {body}"));
        assert!(matches!(status, 400 | 403), "{what}: {status} {body}");
        assert!(error["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{what}: {body}");
    }
    assert_eq!(victim.tidied_up(), 1, "one of them was done");
    assert_eq!(ask(&victim.owner, post(path, &fresh(|_| {}), "")).0, 200);
    assert_eq!(victim.tidied_up(), 2, "and the owner is heard as before");
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_only_the_owner_reads_what_the_host_knows() {
    enter_own_network();
    let victim = Victim::new();
    let stranger = SecretKey::random().unwrap();
    let runtime = runtime();
    let get = |identity: &SecretKey, path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n");
        runtime.block_on(exchange(victim.key, identity, request.into_bytes()))
    };
    let document: Value = serde_json::from_str(include_str!("../../docs/openapi.json")).unwrap();
    let paths = document["paths"].as_object().unwrap().iter().filter(|(_, item)| item["get"].is_object());
    let mut asked = 0;
    for (path, _) in paths {
        // Any name: who may ask is looked at before what is there.
        let path: String = path.split('/').map(|part| if part.starts_with('{') { "web" } else { part }).collect::<Vec<_>>().join("/");
        let (status, body) = get(&stranger, &path);
        assert!(status == 403 && body.contains("not-allowed"), "{path}: {status} {body}");
        asked += 1;
    }
    assert!(asked > 15, "{asked}");
    let (status, page) = get(&victim.owner, "/metrics");
    assert!(status == 200 && page.contains("\nform_host_vms 0\n"), "{status} {page}");
    let (status, health) = get(&victim.owner, "/v1/health");
    let health: Value = serde_json::from_str(&health).unwrap();
    let healthy = |name: &str| health["parts"].as_array().unwrap().iter().find(|part| part["name"] == name).unwrap()["healthy"] == true;
    assert!(status == 200 && ["database", "store", "programs", "network", "vms"].into_iter().all(healthy), "{health}");
    assert_eq!(get(&victim.owner, "/v1/stats"), (200, "[]".to_owned()));
    assert_eq!(get(&victim.owner, "/v1/stats?interval_ms=10001").0, 400);
    assert_eq!(get(&victim.owner, "/v1/vms/web/stats").0, 404);
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_request_of_a_gigabyte_is_refused_and_costs_nothing() {
    enter_own_network();
    let victim = Victim::new();
    let (before, _) = victim.memory();
    let gigabyte = 1_u64 << 30;
    let send = |head: &str, piece: &mut dyn FnMut(&mut UnixStream) -> std::io::Result<()>| {
        let mut stream = UnixStream::connect(victim.host.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        let mut pieces = 0_u64;
        // Until all is sent, or the agent has heard enough.
        while pieces < gigabyte >> 20 && piece(&mut stream).is_ok() {
            pieces += 1;
        }
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer).into_owned();
        (text.split(' ').nth(1).and_then(|word| word.parse::<u16>().ok()), pieces, text)
    };
    let megabyte = vec![b'x'; 1 << 20];
    let mut plain = |stream: &mut UnixStream| stream.write_all(&megabyte);
    let mut chunk = |stream: &mut UnixStream| {
        write!(stream, "{:x}\r\n", megabyte.len())?;
        stream.write_all(&megabyte)?;
        stream.write_all(b"\r\n")
    };
    for path in ["/v1/plan", "/v1/deploy", "/v1/images", "/v1/images/missing", "/v1/claim"] {
        let announced = format!("POST {path} HTTP/1.1\r\nhost: agent\r\ncontent-length: {gigabyte}\r\n\r\n");
        let (status, sent, text) = send(&announced, &mut plain);
        assert!(matches!(status, Some(413) | None) && sent < 64, "{path}: {status:?} after {sent} MiB: {text}");
        let unannounced = format!("POST {path} HTTP/1.1\r\nhost: agent\r\ntransfer-encoding: chunked\r\n\r\n");
        let (status, sent, text) = send(&unannounced, &mut chunk);
        assert!(matches!(status, Some(413) | None) && sent < 64, "{path}, in chunks: {status:?} after {sent} MiB: {text}");
    }
    // Blocks come as a stream of any length; this is none of blocks.
    let blocks = "PUT /v1/blocks HTTP/1.1\r\nhost: agent\r\ntransfer-encoding: chunked\r\n\r\n";
    let (status, sent, text) = send(blocks, &mut chunk);
    assert!(matches!(status, Some(400 | 413) | None) && sent < 64, "{status:?} after {sent} MiB: {text}");
    // And over the network, signed by the owner.
    let body = "x".repeat(64 << 20);
    let signature = victim.signed(|request| request.path = "/v1/deploy", &victim.owner, Timestamp::now());
    let mut request =
        format!("POST /v1/deploy HTTP/1.1\r\nhost: agent\r\nform-signature: {signature}\r\ncontent-length: {gigabyte}\r\n\r\n")
            .into_bytes();
    request.extend_from_slice(body.as_bytes());
    let (status, body) = runtime().block_on(exchange(victim.key, &victim.owner, request));
    assert_eq!(status, 413, "{body}");
    assert!(body.contains("8 MiB"), "{body}");

    let (_, highest) = victim.memory();
    assert!(highest < before + (64 << 10), "the agent took {} MiB for it", (highest - before) >> 10);
    let _ = victim.host.remote(&["ps"]).ok();
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_five_hundred_at_once_are_answered() {
    enter_own_network();
    let victim = Victim::new();
    let (before, _) = victim.memory();
    let held = runtime().block_on(async {
        // So many handshakes at once take their time on a busy machine.
        let patient = Timeouts { connect: Duration::from_secs(60), ..Timeouts::default() };
        let clients: Vec<Client> = (0..500).map(|_| Client::quic("127.0.0.1", victim.key, &victim.owner, patient)).collect();
        let mut asking = tokio::task::JoinSet::new();
        for client in &clients {
            let client = client.clone();
            asking.spawn(async move {
                let _ = client.host().await?;
                client.vms().await
            });
        }
        let mut answered = 0;
        while let Some(answer) = asking.join_next().await {
            let _ = answer.unwrap().unwrap();
            answered += 1;
        }
        assert_eq!(answered, 500);
        // All are still connected; one more comes as if nothing were.
        let late = Client::quic("127.0.0.1", victim.key, &victim.owner, Timeouts::default());
        let _ = late.host().await.unwrap();
        let held = victim.memory().0;
        let mut closing = tokio::task::JoinSet::new();
        for client in clients {
            closing.spawn(async move { client.close().await });
        }
        closing.join_all().await;
        held
    });
    assert!(held < before + (128 << 10), "500 connections take {} MiB of the agent", (held - before) >> 10);

    // The same on the machine itself, and all of them say nothing.
    let silent: Vec<UnixStream> = (0..500).map(|_| UnixStream::connect(victim.host.socket()).unwrap()).collect();
    let _ = victim.host.form(&["ps"]).ok();
    let _ = victim.host.remote(&["ps"]).ok();
    drop(silent);
    assert!(victim.memory().1 < before + (160 << 10), "{:?} KiB", victim.memory());
    let _ = victim.host.form(&["host", "show"]).ok();
}
