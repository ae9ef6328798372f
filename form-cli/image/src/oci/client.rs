//! The OCI distribution specification 1.1: manifests and blobs over HTTP, with logins by Basic and Bearer. Here is the reading half, in
//! `upload` the writing one.

mod upload;

use std::{
    io::{self, Read},
    sync::Arc,
    thread,
    time::Duration,
};

use serde::Deserialize;
use ureq::{
    Agent, Body,
    http::{HeaderMap, Response, Uri},
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::{
    OciDigest, OciError, OciReference, Registries,
    challenge::{Challenge, Scheme},
    credentials::{self, Login},
    document::{MAX_DOCUMENT, accepted},
    error::is_certificate,
    reference::is_loopback,
};
use crate::Cancel;

const CONNECT: Duration = Duration::from_secs(15);
/// A registry that fetches from another one first takes its time.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a body may stand still.
const STALL: Duration = Duration::from_secs(60);
/// What is done again after a fault on the way: waits before the second, third and fourth try.
const WAITS: [Duration; 3] = [Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(3)];
const MAX_TOKEN: u64 = 1 << 20;

/// A manifest or an index.
pub(crate) struct Answer {
    pub bytes: Vec<u8>,
    pub media_type: Option<String>,
}

/// One repository of a registry.
pub(crate) struct Client<'a> {
    agent: Agent,
    /// What people know it as.
    registry: String,
    /// `https://HOST/v2/REPOSITORY`.
    base: String,
    /// Whether it is spoken to without TLS.
    plain: bool,
    repository: String,
    login: Option<Login>,
    /// Whether a login has to be one that may write.
    writes: bool,
    /// The `Authorization` header that the registry asked for.
    authorization: Option<String>,
    registries: &'a Registries,
    cancel: &'a Cancel,
}

impl<'a> Client<'a> {
    /// # Errors
    /// When the settings are malformed or the machine has no certificates.
    pub fn new(reference: &OciReference, registries: &'a Registries, cancel: &'a Cancel) -> Result<Self, OciError> {
        let host = registries.host_of(&reference.registry)?;
        let plain = registries.is_plain(host) || registries.is_plain(&reference.registry);
        let login = match &registries.credentials {
            Some(path) => credentials::find(path, &reference.registry)?,
            None => None,
        };
        let scheme = if plain { "http" } else { "https" };
        Ok(Self {
            agent: agent(plain, is_loopback(host))?,
            registry: reference.registry.clone(),
            base: format!("{scheme}://{host}/v2/{}", reference.repository),
            plain,
            repository: reference.repository.clone(),
            login,
            writes: false,
            authorization: None,
            registries,
            cancel,
        })
    }

    /// Asks which digest a tag or digest has; `None` when the registry does not say.
    ///
    /// # Errors
    /// When there is no such manifest, or the registry cannot be asked.
    pub fn resolve(&mut self, target: &str) -> Result<Option<OciDigest>, OciError> {
        match self.call(&Request { head: true, path: &format!("manifests/{target}"), accept: &accepted(), from: 0 }) {
            Ok(answer) => digest_header(answer.headers()),
            // Some proxies know no HEAD.
            Err(OciError::Status { status: 405 | 501, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A manifest or an index. The caller compares its digest.
    ///
    /// # Errors
    /// When there is none, it is too long, or the registry cannot be asked.
    pub fn manifest(&mut self, target: &str) -> Result<Answer, OciError> {
        self.tried(|client| {
            let request = Request { head: false, path: &format!("manifests/{target}"), accept: &accepted(), from: 0 };
            let answer = client.call_once(&request)?;
            let media_type = answer.headers().get("content-type").and_then(|value| value.to_str().ok()).map(str::to_owned);
            let bytes = client.read_all(answer, MAX_DOCUMENT, "a manifest")?;
            Ok(Answer { bytes, media_type })
        })
    }

    /// A small blob, whole.
    ///
    /// # Errors
    /// As [`Client::manifest`]; and when its digest is another one.
    pub fn small_blob(&mut self, digest: &OciDigest) -> Result<Vec<u8>, OciError> {
        let bytes = self.tried(|client| {
            let path = format!("blobs/{digest}");
            let answer = client.call_once(&Request { head: false, path: &path, accept: "*/*", from: 0 })?;
            client.read_all(answer, MAX_DOCUMENT, "the configuration")
        })?;
        let found = OciDigest::of(&bytes);
        if found == *digest { Ok(bytes) } else { Err(OciError::Digest { what: "the configuration".to_owned(), expected: *digest, found }) }
    }

    /// Copies a blob to `sink`, which is told each piece and checks what it got. A body that breaks off is taken up where it did.
    ///
    /// # Errors
    /// As [`Client::manifest`], and those of the sink.
    pub fn blob(&mut self, digest: &OciDigest, sink: &mut dyn Sink) -> Result<(), OciError> {
        let path = format!("blobs/{digest}");
        self.tried(|client| {
            if sink.is_complete() {
                return Ok(());
            }
            let answer = client.call_once(&Request { head: false, path: &path, accept: "*/*", from: sink.received() })?;
            if answer.status() != 206 {
                sink.restart()?;
            }
            let mut body = answer.into_body().into_with_config().limit(u64::MAX).reader();
            let mut buffer = vec![0; 128 << 10];
            loop {
                if client.cancel.is_cancelled() {
                    return Err(OciError::Cancelled);
                }
                match body.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(count) => sink.write(&buffer[..count])?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(client.unreachable(error)),
                }
            }
        })
    }

    fn unreachable(&self, error: io::Error) -> OciError {
        OciError::Unreachable { registry: self.registry.clone(), source: Box::new(ureq::Error::from(error)) }
    }

    fn read_all(&self, answer: Response<Body>, limit: u64, what: &str) -> Result<Vec<u8>, OciError> {
        let mut bytes = Vec::new();
        let body = answer.into_body().into_with_config().limit(u64::MAX).reader();
        body.take(limit + 1).read_to_end(&mut bytes).map_err(|error| self.unreachable(error))?;
        let size = bytes.len() as u64;
        if size > limit { Err(OciError::TooLarge { what: what.to_owned(), size, limit }) } else { Ok(bytes) }
    }

    fn call(&mut self, request: &Request<'_>) -> Result<Response<Body>, OciError> {
        self.tried(|client| client.call_once(request))
    }

    /// Tries again what may be better the next time.
    fn tried<T>(&mut self, mut work: impl FnMut(&mut Self) -> Result<T, OciError>) -> Result<T, OciError> {
        for wait in WAITS {
            match work(self) {
                Err(error) if is_passing(&error) => {
                    if self.cancel.is_cancelled() {
                        return Err(OciError::Cancelled);
                    }
                    tracing::debug!(%error, "asking the registry again");
                    thread::sleep(wait);
                }
                done => return done,
            }
        }
        work(self)
    }

    /// One request, with the login that the registry asks for.
    fn call_once(&mut self, request: &Request<'_>) -> Result<Response<Body>, OciError> {
        let answer = self.send(request)?;
        if answer.status() != 401 {
            return self.judge(answer, request);
        }
        let had = self.authorization.take();
        self.log_in(answer.headers())?;
        // A token that has run out is asked for again, what is refused afresh is not.
        let fresh = had != self.authorization;
        let answer = if fresh { self.send(request)? } else { answer };
        self.judge(answer, request)
    }

    fn send(&self, request: &Request<'_>) -> Result<Response<Body>, OciError> {
        let url = format!("{}/{}", self.base, request.path);
        let mut builder = if request.head { self.agent.head(&url) } else { self.agent.get(&url) }.header("accept", request.accept);
        if let Some(authorization) = &self.authorization {
            builder = builder.header("authorization", authorization);
        }
        if request.from > 0 {
            builder = builder.header("range", format!("bytes={}-", request.from));
        }
        builder.call().map_err(|error| OciError::Unreachable { registry: self.registry.clone(), source: Box::new(error) })
    }

    fn judge(&self, answer: Response<Body>, request: &Request<'_>) -> Result<Response<Body>, OciError> {
        let registry = self.registry.clone();
        match answer.status().as_u16() {
            200 | 206 => Ok(answer),
            401 | 403 => Err(OciError::Denied { registry, known: self.login.is_some() }),
            404 => Err(OciError::NotFound { registry, what: format!("{}/{}", self.repository, request.path) }),
            status => Err(OciError::Status { registry, request: format!("{}/{}", self.repository, request.path), status }),
        }
    }

    /// Answers the challenge of a registry (RFC 7235, and the token specification of the Docker registry).
    fn log_in(&mut self, headers: &HeaderMap) -> Result<(), OciError> {
        let values = headers.get_all("www-authenticate").iter().filter_map(|value| value.to_str().ok());
        let challenges: Vec<Challenge> = values.flat_map(Challenge::parse).collect();
        let refuse = |reason: &str| OciError::Login { registry: self.registry.clone(), reason: reason.to_owned() };
        if let Some(bearer) = challenges.iter().find(|challenge| challenge.scheme == Scheme::Bearer) {
            let token = self.token(bearer)?;
            self.authorization = Some(format!("Bearer {token}"));
            return Ok(());
        }
        if !challenges.iter().any(|challenge| challenge.scheme == Scheme::Basic) {
            return Err(refuse("it offers neither Basic nor Bearer"));
        }
        let Some(login) = &self.login else { return Err(OciError::Denied { registry: self.registry.clone(), known: false }) };
        self.authorization = Some(login.header());
        Ok(())
    }

    /// Fetches a token: with the login when there is one, else as anybody.
    fn token(&self, challenge: &Challenge) -> Result<String, OciError> {
        let refuse = |reason: String| OciError::Login { registry: self.registry.clone(), reason };
        let realm = challenge.get("realm").ok_or_else(|| refuse("it does not say where tokens are made".to_owned()))?;
        let uri: Uri = realm.parse().map_err(|_| refuse("its place for tokens is no URL".to_owned()))?;
        let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
        let plain_fits = self.plain && uri.scheme_str() == Some("http") && !authority.contains('@') && self.registries.is_plain(authority);
        if uri.scheme_str() != Some("https") && !plain_fits {
            return Err(refuse(format!("its place for tokens, {authority}, has no TLS")));
        }
        // What is read first would lead to a login for reading alone.
        let scope = match challenge.get("scope") {
            Some(scope) if !self.writes => scope.to_owned(),
            _ => format!("repository:{}:{}", self.repository, if self.writes { "pull,push" } else { "pull" }),
        };
        let agent = if plain_fits { self.agent.clone() } else { agent(false, is_loopback(authority))? };
        let mut builder = agent.get(realm).query("scope", scope);
        if let Some(service) = challenge.get("service") {
            builder = builder.query("service", service);
        }
        if let Some(login) = &self.login {
            builder = builder.header("authorization", login.header());
        }
        let answer = builder.call().map_err(|error| OciError::Unreachable { registry: authority.to_owned(), source: Box::new(error) })?;
        match answer.status().as_u16() {
            200 => {}
            401 | 403 => return Err(OciError::Denied { registry: self.registry.clone(), known: self.login.is_some() }),
            status => return Err(OciError::Status { registry: authority.to_owned(), request: "a request for a token".to_owned(), status }),
        }
        let bytes = self.read_all(answer, MAX_TOKEN, "a token")?;
        // What cannot be understood may hold a token: it is not repeated.
        let token: Token = serde_json::from_slice(&bytes).map_err(|_| refuse("its token cannot be understood".to_owned()))?;
        let token =
            token.token.or(token.access_token).filter(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
        token.ok_or_else(|| refuse("its answer holds no token".to_owned()))
    }
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

struct Request<'a> {
    head: bool,
    /// Behind the repository: `blobs/…`, `manifests/…`.
    path: &'a str,
    accept: &'a str,
    /// The first byte that is wanted.
    from: u64,
}

/// Takes a blob as it comes.
pub(crate) trait Sink {
    /// Bytes so far.
    fn received(&self) -> u64;
    /// Whether these are all.
    fn is_complete(&self) -> bool;
    /// Forgets them: the registry begins anew.
    ///
    /// # Errors
    /// Those of the disk.
    fn restart(&mut self) -> Result<(), OciError>;
    /// # Errors
    /// Those of the disk, and when it is more than announced.
    fn write(&mut self, bytes: &[u8]) -> Result<(), OciError>;
}

/// Whether asking again may help.
fn is_passing(error: &OciError) -> bool {
    match error {
        OciError::Unreachable { source, .. } if is_certificate(source) => false,
        OciError::Unreachable { source, .. } => {
            matches!(**source, ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed | ureq::Error::Protocol(_))
        }
        OciError::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
        _ => false,
    }
}

fn digest_header(headers: &HeaderMap) -> Result<Option<OciDigest>, OciError> {
    let Some(value) = headers.get("docker-content-digest") else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    text.parse().map(Some).map_err(|_| OciError::Unsupported { what: "a registry that names manifests by no SHA-256 digest".to_owned() })
}

/// Connections of one kind: with TLS everywhere on the way, or without.
fn agent(plain: bool, loopback: bool) -> Result<Agent, OciError> {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .https_only(!plain)
        .user_agent(concat!("form/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .max_redirects(5)
        .timeout_resolve(Some(CONNECT))
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(ANSWER))
        .timeout_per_read(Some(STALL));
    if loopback {
        config = config.proxy(None);
    }
    if !plain {
        let found = rustls_native_certs::load_native_certs();
        if found.certs.is_empty() {
            let cause = found.errors.first().map(|error| format!(" ({error})")).unwrap_or_default();
            let reason = format!("this machine has no certificates of authorities{cause}: install the package `ca-certificates`");
            return Err(OciError::Settings { reason });
        }
        let certificates: Vec<Certificate<'static>> = found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).unversioned_rustls_crypto_provider(provider);
        config = config.tls_config(tls.build());
    }
    Ok(Agent::new_with_config(config.build()))
}

#[cfg(test)]
mod tests;
