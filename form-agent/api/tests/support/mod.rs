//! A small agent: the real transports and signatures around handlers that remember what they saw.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    body::Body,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
    routing::{delete, get, post, put},
};
use form_api::{
    ApiError, ErrorCode,
    client::{Client, Timeouts},
    host::{DoctorReport, Host},
    image::BlocksReply,
    server::{self, CancellationToken, Limits, Peer, QuicConfig, Serving},
    sign::{self, Expected, SIGNATURE_HEADER},
    vm::{LogLine, LogStream},
};
use form_types::{ClusterId, Digest, HostId, PublicKey, SecretKey};
use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::io::AsyncWriteExt;

pub const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

pub fn host_key() -> SecretKey {
    SecretKey::from_bytes([1; 32])
}

pub fn user_key() -> SecretKey {
    SecretKey::from_bytes([2; 32])
}

#[derive(Clone)]
pub struct Agent {
    owner: PublicKey,
    /// Requests to `/v1/doctor` so far.
    pub asked: Arc<AtomicUsize>,
}

pub struct Running {
    pub quic: SocketAddr,
    pub socket: PathBuf,
    pub agent: Agent,
    pub shutdown: CancellationToken,
    pub serving: Vec<Serving>,
    _directory: tempfile::TempDir,
}

pub fn agent() -> Agent {
    Agent { owner: user_key().public(), asked: Arc::default() }
}

impl Running {
    pub fn start(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let agent = agent();
        let shutdown = CancellationToken::new();
        let config = QuicConfig { bind: "127.0.0.1:0".parse().unwrap(), key: &host_key(), limits };
        let quic = server::quic(&config, router(agent.clone()), shutdown.clone()).unwrap();
        let unix = server::unix(&socket, router(agent.clone()), limits, shutdown.clone()).unwrap();
        Self { quic: quic.address().unwrap(), socket, agent, shutdown, serving: vec![quic, unix], _directory: directory }
    }

    pub fn client(&self) -> Client {
        self.client_as(&user_key())
    }

    pub fn client_as(&self, key: &SecretKey) -> Client {
        Client::quic(&self.quic.to_string(), host_key().public(), key, Timeouts::default())
    }

    pub fn local(&self) -> Client {
        Client::unix(&self.socket, Timeouts::default())
    }
}

pub fn router(agent: Agent) -> Router {
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/doctor", get(doctor))
        .route("/v1/doctor/fix", post(signed))
        .route("/v1/vms/{name}/logs", get(logs))
        .route("/v1/vms/{name}/exec", get(echo_exec))
        .route("/v1/vms/{name}/console", get(echo))
        .route("/v1/vms/{name}", delete(signed))
        .route("/v1/images", post(signed))
        .route("/v1/images/missing", post(signed))
        .route("/v1/blocks", put(count))
        .with_state(agent)
}

async fn host(State(agent): State<Agent>) -> axum::Json<Host> {
    let now = Timestamp::now();
    axum::Json(Host {
        id: HostId::of(&host_key().public()),
        name: "test".to_owned(),
        public_key: host_key().public(),
        cluster: CLUSTER,
        version: "0".to_owned(),
        kernel: "6".to_owned(),
        owner: Some(agent.owner),
        started_at: now,
        now,
        vcpus_total: 1,
        vcpus_allocated: 0,
        memory_total_mib: 1,
        memory_allocated_mib: 0,
        disk_total_bytes: 1,
        disk_free_bytes: 1,
        vms: 0,
        max_vms: 1,
    })
}

async fn doctor(State(agent): State<Agent>) -> axum::Json<DoctorReport> {
    agent.asked.fetch_add(1, Ordering::SeqCst);
    axum::Json(DoctorReport { checks: Vec::new() })
}

/// Verifies as an agent does, then says who asked, in an error's message: every typed call gets it back.
async fn signed(State(agent): State<Agent>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body = server::read_body(body).await?;
    let who = authenticate(&agent, &parts, &body)?;
    Err(ApiError::new(ErrorCode::Conflict, who))
}

fn authenticate(agent: &Agent, parts: &http::request::Parts, body: &[u8]) -> Result<String, ApiError> {
    match parts.extensions.get::<Peer>() {
        Some(Peer::Local { uid, .. }) => Ok(format!("local:{uid}")),
        Some(Peer::Key(_)) => {
            let header = parts.headers.get(SIGNATURE_HEADER).ok_or_else(|| ApiError::new(ErrorCode::NotAllowed, "not signed"))?;
            let expected = Expected {
                cluster: CLUSTER,
                host: host_key().public(),
                method: parts.method.as_str(),
                path: parts.uri.path_and_query().unwrap().as_str(),
                body: Digest::of(sign::signed_bytes(&parts.headers, body)),
                now: Timestamp::now(),
                is_claim: false,
            };
            let verified = sign::verify_request(header.as_bytes(), &expected)?;
            if *verified.signer() == agent.owner {
                Ok("owner".to_owned())
            } else {
                Err(ApiError::new(ErrorCode::NotAllowed, "not the owner"))
            }
        }
        None => Err(ApiError::new(ErrorCode::Internal, "no peer")),
    }
}

async fn logs(Path(name): Path<String>) -> Response {
    let lines = (0..5).map(move |number| match (number, name.as_str()) {
        (3.., "broken") => Err(ApiError::new(ErrorCode::Failed, "the log is gone")),
        _ => Ok(LogLine { at: Timestamp::UNIX_EPOCH, stream: LogStream::Stdout, line: format!("{number} of {name}"), cursor: None }),
    });
    server::ndjson(futures_util::stream::iter(lines))
}

async fn echo_exec(State(agent): State<Agent>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    authenticate(&agent, &parts, &[])?;
    echo(Request::from_parts(parts, body)).await
}

async fn echo(mut request: Request) -> Result<Response, ApiError> {
    let protocol = if request.uri().path().ends_with("exec") { "form-exec" } else { "form-console" };
    let (response, upgraded) = server::upgrade(&mut request, protocol)?;
    tokio::spawn(async move {
        let Ok(upgraded) = upgraded.await else { return };
        let (mut read, mut write) = tokio::io::split(upgraded);
        // A client that goes away in the middle is its own business.
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = write.write_all(b"<end>").await;
        let _ = write.shutdown().await;
    });
    Ok(response)
}

async fn count(body: Body) -> Result<Response, ApiError> {
    let mut stored = 0;
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        stored += piece.map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))?.len() as u64;
    }
    Ok(axum::Json(BlocksReply { stored }).into_response())
}
