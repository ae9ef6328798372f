//! Both transports, from the client's calls to the router and back.

mod support;

use std::{net::UdpSocket, sync::atomic::Ordering, time::Duration};

use form_api::{
    ApiError, ErrorCode, MAX_BODY,
    client::{Client, ClientError, Timeouts},
    exec::ExecRequest,
    image::{ImportRequest, MissingRequest},
    server::{self, Limits, ServerError},
    vm::LogsQuery,
};
use form_types::{Digest, Name, SecretKey};
use futures_util::{StreamExt, future::join_all, stream};
use support::{CLUSTER, Running, host_key, user_key};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn api(error: ClientError) -> ApiError {
    match error {
        ClientError::Api(error) => error,
        other => panic!("{other:?}"),
    }
}

fn import() -> ImportRequest {
    ImportRequest { manifest: Digest::of(b"manifest") }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_shape_of_exchange_works_on_both() {
    let running = Running::start(Limits::default());
    for client in [running.client(), running.local()] {
        assert_eq!(client.host().await.unwrap().cluster, CLUSTER);
        lines(&client).await;
        upload(&client).await;
        tunnels(&client).await;
        // The test's router answers an unknown path with an empty 404, which is no answer of an agent.
        assert!(matches!(client.vms().await, Err(ClientError::Protocol { what, .. }) if what.contains("404")));
        client.close().await;
    }
}

async fn lines(client: &Client) {
    let mut lines = client.logs(&name("web"), &LogsQuery::default()).await.unwrap();
    let mut seen = Vec::new();
    while let Some(line) = lines.next().await {
        seen.push(line.unwrap().line);
    }
    assert_eq!(seen, ["0 of web", "1 of web", "2 of web", "3 of web", "4 of web"]);

    let mut lines = client.logs(&name("broken"), &LogsQuery::default()).await.unwrap();
    for _ in 0..3 {
        lines.next().await.unwrap().unwrap();
    }
    assert_eq!(api(lines.next().await.unwrap().unwrap_err()).message, "the log is gone");
    assert!(lines.next().await.is_none());
}

async fn upload(client: &Client) {
    let pieces = stream::iter((0..300).map(|_| Ok(vec![9; 64 * 1024].into())));
    assert_eq!(client.put_blocks(pieces).await.unwrap().stored, 300 * 64 * 1024);
    let broken = stream::iter([Ok(vec![9; 10].into()), Err(std::io::Error::other("disk"))]).chain(stream::pending());
    assert!(client.put_blocks(broken).await.is_err());
}

async fn tunnels(client: &Client) {
    let request = ExecRequest { command: vec!["sh".to_owned()], env: [].into(), user: None, workdir: None, terminal: None };
    for mut tunnel in [client.exec(&name("web"), &request).await.unwrap(), client.console(&name("web")).await.unwrap()] {
        tunnel.write_all(b"hello").await.unwrap();
        let mut answer = [0; 5];
        tunnel.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"hello");
        // One direction closes, the other goes on.
        tunnel.write_all(b" bye").await.unwrap();
        tunnel.shutdown().await.unwrap();
        let mut rest = String::new();
        tunnel.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, " bye<end>");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mutations_carry_who_asks() {
    let running = Running::start(Limits::default());
    assert_eq!(api(running.client().doctor_fix().await.unwrap_err()).message, "owner");
    assert_eq!(api(running.client().import(&import()).await.unwrap_err()).message, "owner");
    let local = api(running.local().destroy(&name("web")).await.unwrap_err());
    assert_eq!(local.message, format!("local:{}", own_uid()));
    let stranger = SecretKey::from_bytes([9; 32]);
    let refused = api(running.client_as(&stranger).destroy(&name("web")).await.unwrap_err());
    assert_eq!((refused.code, refused.message.as_str()), (ErrorCode::NotAllowed, "not the owner"));
}

fn own_uid() -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").unwrap().uid()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_refused() {
    let running = Running::start(Limits::default());
    for client in [running.client(), running.local()] {
        let blocks = vec![Digest::of(b"block"); MAX_BODY / 67 + 1];
        let error = client.missing(&MissingRequest { blocks }).await.unwrap_err();
        assert_eq!(error.to_api().code, ErrorCode::TooLarge, "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_host_key_is_named() {
    let running = Running::start(Limits::default());
    let other = SecretKey::from_bytes([8; 32]).public();
    let client = Client::quic(&running.quic.to_string(), other, &user_key(), Timeouts::default());
    match client.host().await {
        Err(ClientError::HostKeyChanged { expected, found, .. }) => assert_eq!((expected, found), (other, host_key().public())),
        answer => panic!("{answer:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_said_quickly() {
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // Quickly is before any answer is given up: on a busy machine that alone can be told apart.
    let patient = Timeouts { connect: Duration::from_secs(3600), ..Timeouts::default() };
    let begun = std::time::Instant::now();
    let client = Client::quic(&closed.to_string(), host_key().public(), &user_key(), patient);
    assert!(client.host().await.unwrap_err().is_unreachable());
    // QUIC itself gives up after half a minute.
    assert!(begun.elapsed() < Duration::from_secs(25));
    let client = Client::unix("/nowhere/agent.sock", Timeouts::default());
    assert!(client.host().await.unwrap_err().is_unreachable());

    // A port that swallows everything.
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let timeouts = Timeouts { connect: Duration::from_millis(300), ..Timeouts::default() };
    let client = Client::quic(&silent.local_addr().unwrap().to_string(), host_key().public(), &user_key(), timeouts);
    assert!(client.host().await.unwrap_err().is_unreachable());
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_changes_nothing() {
    let running = Running::start(Limits::default());
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut state = 1u32;
    for length in (0..2000).map(|number| number % 1400) {
        let garbage: Vec<u8> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        socket.send_to(&garbage, running.quic).unwrap();
    }
    assert_eq!(running.client().host().await.unwrap().cluster, CLUSTER);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_at_once_are_served() {
    let running = Running::start(Limits::default());
    let patient = Timeouts { connect: Duration::from_secs(60), ..Timeouts::default() };
    let quic = (0..500).map(|_| Client::quic(&running.quic.to_string(), host_key().public(), &user_key(), patient));
    let unix = (0..500).map(|_| Client::unix(&running.socket, patient));
    for clients in [quic.collect::<Vec<_>>(), unix.collect()] {
        for answer in join_all(clients.iter().map(Client::host)).await {
            answer.unwrap();
        }
    }
    // And as many on one connection, more than it has streams.
    let client = running.client();
    for answer in join_all((0..500).map(|_| client.host())).await {
        answer.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_connections_are_refused_with_a_word() {
    let running = Running::start(Limits { connections: 1, ..Limits::default() });
    for (first, second) in [(running.client(), running.client()), (running.local(), running.local())] {
        let _tunnel = first.console(&name("web")).await.unwrap();
        let error = second.host().await.unwrap_err().to_api();
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
        assert!(error.message.contains("too many connections"), "{error}");
    }
}

/// Serves at an address that was served before, once the former socket is closed: a task that ends holds it for a moment.
async fn served_again(config: &server::QuicConfig<'_>, agent: &support::Agent) -> server::Serving {
    let begun = std::time::Instant::now();
    loop {
        match server::quic(config, support::router(agent.clone()), server::CancellationToken::new()) {
            Err(ServerError::Bind { source, .. })
                if source.kind() == std::io::ErrorKind::AddrInUse && begun.elapsed() < Duration::from_secs(60) =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            serving => return serving.unwrap(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_is_found_again() {
    let mut running = Running::start(Limits::default());
    let client = running.client();
    client.doctor().await.unwrap();
    running.shutdown.cancel();
    for serving in running.serving.drain(..) {
        serving.finished().await;
    }
    assert!(!running.socket.exists());
    assert!(client.doctor().await.is_err());
    let key = host_key();
    let config = server::QuicConfig { bind: running.quic, key: &key, limits: Limits::default() };
    let _again = served_again(&config, &running.agent).await;
    client.doctor().await.unwrap();
    assert_eq!(running.agent.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_is_taken_over_only_when_nobody_answers() {
    let running = Running::start(Limits::default());
    let bind =
        |path: &std::path::Path| server::unix(path, support::router(running.agent.clone()), Limits::default(), running.shutdown.clone());
    assert!(matches!(bind(&running.socket), Err(ServerError::InUse(_))));
    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let _serving = bind(&stale).unwrap();
    Client::unix(&stale, Timeouts::default()).host().await.unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&stale).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o660);
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(bind(&file), Err(ServerError::NoSocket(_))));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn a_killed_agent_is_found_again_at_once() {
    let life = |bind: std::net::SocketAddr, agent: support::Agent| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let key = host_key();
        let serving = runtime.block_on(async move {
            let config = server::QuicConfig { bind, key: &key, limits: Limits::default() };
            served_again(&config, &agent).await
        });
        (runtime, serving.address().unwrap())
    };
    let clients = tokio::runtime::Runtime::new().unwrap();
    let agent = support::agent();
    let (first, address) = life("127.0.0.1:0".parse().unwrap(), agent.clone());
    let client = Client::quic(&address.to_string(), host_key().public(), &user_key(), Timeouts::default());
    clients.block_on(client.doctor()).unwrap();
    // No task says goodbye: as under SIGKILL.
    first.shutdown_background();
    let (_second, _) = life(address, agent.clone());
    let begun = std::time::Instant::now();
    clients.block_on(client.doctor()).unwrap();
    // A connection that nobody answers on is given up after half a minute.
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    assert_eq!(agent.asked.load(Ordering::SeqCst), 2);
}

/// Says when it is dropped.
struct Ends(Option<tokio::sync::oneshot::Sender<()>>);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.take().map(|ended| ended.send(()));
    }
}

#[tokio::test]
async fn a_follower_that_has_left_is_noticed_although_nothing_happens() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let (sender, ended) = tokio::sync::oneshot::channel();
    let ends = std::sync::Arc::new(std::sync::Mutex::new(Some(Ends(Some(sender)))));
    let follow = move || {
        let ends = ends.lock().unwrap().take();
        let body = futures_util::stream::unfold(ends, |ends| async move {
            let _kept = ends;
            std::future::pending::<Option<(Result<axum::body::Bytes, std::convert::Infallible>, Option<Ends>)>>().await
        });
        std::future::ready(axum::body::Body::from_stream(body))
    };
    let stop = server::CancellationToken::new();
    let router = axum::Router::new().route("/follow", axum::routing::get(follow));
    let _serving = server::unix(&socket, router, Limits::default(), stop.clone()).unwrap();
    let mut client = tokio::net::UnixStream::connect(&socket).await.unwrap();
    client.write_all(b"GET /follow HTTP/1.1\r\nHost: agent\r\n\r\n").await.unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    drop(client);
    tokio::time::timeout(std::time::Duration::from_secs(60), ended).await.expect("the connection is let go").unwrap();
    stop.cancel();
}

#[tokio::test]
async fn who_has_said_all_still_gets_an_answer() {
    let running = Running::start(Limits::default());
    let mut client = tokio::net::UnixStream::connect(&running.socket).await.unwrap();
    client.write_all(b"GET /v1/doctor HTTP/1.1\r\nHost: agent\r\n\r\n").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("]}"), "{answer}");
}
