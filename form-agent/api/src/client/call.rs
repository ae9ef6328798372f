//! One exchange: build, sign, send, repeat where that is safe, read the answer.

use std::time::Duration;

use form_types::{ClusterId, IdempotencyKey};
use futures_util::Stream;
use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};

use super::{Client, ClientError, Lines, Tunnel, transport::Transport};
use crate::{
    error::ErrorBody,
    exec::EXEC_HEADER,
    host::Host,
    sign::{self, IDEMPOTENCY_HEADER, SIGNATURE_HEADER, ToSign},
};

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// How often a request that may be repeated is sent before its failure counts.
const ATTEMPTS: u32 = 3;

/// The largest JSON answer that is read, in bytes.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// A request, before it is signed.
#[derive(Clone, Debug)]
pub(super) struct Call {
    method: Method,
    /// Path and query.
    path: String,
    body: Bytes,
    idempotency_key: Option<IdempotencyKey>,
    is_claim: bool,
    headers: Vec<(&'static str, String)>,
    /// Answers later than this count as none; `None` is the client's own limit.
    limit: Option<Duration>,
    /// May be sent again when the connection breaks.
    repeatable: bool,
}

impl Call {
    fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            body: Bytes::new(),
            idempotency_key: None,
            is_claim: false,
            headers: Vec::new(),
            limit: None,
            repeatable: true,
        }
    }

    pub(super) fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path)
    }

    pub(super) fn post(path: impl Into<String>) -> Self {
        Self::new(Method::POST, path)
    }

    pub(super) fn put(path: impl Into<String>) -> Self {
        Self::new(Method::PUT, path)
    }

    pub(super) fn patch(path: impl Into<String>) -> Self {
        Self::new(Method::PATCH, path)
    }

    pub(super) fn delete(path: impl Into<String>) -> Self {
        Self::new(Method::DELETE, path)
    }

    pub(super) fn json(mut self, value: &impl Serialize) -> Result<Self, ClientError> {
        let body = serde_json::to_vec(value).map_err(|error| ClientError::local("the request has no JSON form", error))?;
        self.body = Bytes::from(body);
        self.headers.push(("content-type", "application/json".to_owned()));
        Ok(self)
    }

    /// A body that is no JSON.
    pub(super) fn bytes(mut self, body: Vec<u8>) -> Self {
        self.body = Bytes::from(body);
        self
    }

    /// The request changes something: it is signed, and `key` makes its repetition harmless.
    pub(super) fn signed(mut self, key: IdempotencyKey) -> Self {
        self.idempotency_key = Some(key);
        self
    }

    pub(super) fn claim(mut self) -> Self {
        self.is_claim = true;
        self
    }

    pub(super) fn header(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }

    pub(super) fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// What the signature's digest is over; the agent's side is [`sign::signed_bytes`].
    fn signed_bytes(&self) -> &[u8] {
        match self.headers.iter().find(|(name, _)| *name == EXEC_HEADER) {
            Some((_, value)) => value.as_bytes(),
            None => &self.body,
        }
    }

    pub(super) fn once(mut self) -> Self {
        self.repeatable = false;
        self
    }
}

/// What became of one attempt.
enum Attempt {
    Failed(ClientError),
    /// The connection broke: nobody knows whether the agent has seen the request.
    Broken(ClientError),
}

impl Client {
    /// Sends the call and gives back the answer, which is a success or an Upgrade.
    pub(super) async fn send(&self, call: &Call) -> Result<Response<Incoming>, ClientError> {
        let mut attempt = 1;
        loop {
            let body = Full::new(call.body.clone()).map_err(|never| match never {}).boxed_unsync();
            match self.attempt(call, body).await {
                Ok(response) => return Ok(response),
                Err(Attempt::Broken(_)) if call.repeatable && attempt < ATTEMPTS => {
                    self.inner.transport.reset().await;
                    tokio::time::sleep(Duration::from_millis(100) * attempt).await;
                    attempt += 1;
                }
                Err(Attempt::Broken(error) | Attempt::Failed(error)) => return Err(error),
            }
        }
    }

    /// Sends the call with a body that comes in pieces and exists only once.
    pub(super) async fn send_stream<S>(&self, call: &Call, body: S) -> Result<Response<Incoming>, ClientError>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let frames = futures_util::StreamExt::map(body, |piece| piece.map(Frame::data));
        match self.attempt(call, BodyExt::boxed_unsync(StreamBody::new(frames))).await {
            Ok(response) => Ok(response),
            Err(Attempt::Broken(error) | Attempt::Failed(error)) => Err(error),
        }
    }

    pub(super) async fn read<T: DeserializeOwned>(&self, call: &Call) -> Result<T, ClientError> {
        let response = self.send(call).await?;
        self.json(response).await
    }

    pub(super) async fn json<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, ClientError> {
        let bytes = self.whole(response, MAX_ANSWER, self.inner.timeouts.request).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.protocol(error.to_string()))
    }

    /// An answer of at most `most` bytes, for which there is `limit` time.
    pub(super) async fn bytes(&self, call: &Call, most: usize, limit: Duration) -> Result<Vec<u8>, ClientError> {
        let response = self.send(call).await?;
        Ok(self.whole(response, most, limit).await?.into())
    }

    pub(super) async fn lines<T: DeserializeOwned>(&self, call: &Call) -> Result<Lines<T>, ClientError> {
        Ok(Lines::new(self.send(call).await?.into_body(), self.target()))
    }

    pub(super) async fn tunnel(&self, call: Call, protocol: &'static str) -> Result<Tunnel, ClientError> {
        self.tunnel_with_headers(call, protocol).await.map(|(tunnel, _)| tunnel)
    }

    /// The tunnel, and the headers of the answer that opened it.
    pub(super) async fn tunnel_with_headers(&self, call: Call, protocol: &'static str) -> Result<(Tunnel, http::HeaderMap), ClientError> {
        let call = call.once().header("connection", "upgrade".to_owned()).header("upgrade", protocol.to_owned());
        let response = self.send(&call).await?;
        if response.status() != http::StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.protocol(format!("status {} instead of an Upgrade", response.status())));
        }
        let headers = response.headers().clone();
        match hyper::upgrade::on(response).await {
            Ok(upgraded) => Ok((TokioIo::new(upgraded), headers)),
            Err(error) => Err(self.protocol(error.to_string())),
        }
    }

    async fn attempt(&self, call: &Call, body: Body) -> Result<Response<Incoming>, Attempt> {
        let request = self.request(call, body).await.map_err(Attempt::Failed)?;
        let stream = self.inner.transport.open(&self.inner.timeouts).await.map_err(Attempt::Failed)?;
        let broken = |error: hyper::Error| {
            let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
            if error.is_parse() {
                Attempt::Failed(self.protocol(reason))
            } else {
                let hint = "the agent may be restarting: look at `form host show`, and repeat the command".to_owned();
                Attempt::Broken(ClientError::Unreachable {
                    target: self.target(),
                    reason: format!("the connection broke ({reason})"),
                    hint,
                })
            }
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // It ends with the exchange: when the response body or the tunnel is dropped.
        tokio::spawn(connection.with_upgrades());
        let limit = self.inner.timeouts.bound(call.limit.unwrap_or(self.inner.timeouts.request));
        let response = match tokio::time::timeout(limit, sender.send_request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(broken(error)),
            Err(_) => return Err(Attempt::Failed(ClientError::TimedOut { target: self.target(), seconds: limit.as_secs() })),
        };
        if response.status().is_success() || response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        Err(Attempt::Failed(self.refusal(response).await))
    }

    async fn request(&self, call: &Call, body: Body) -> Result<Request<Body>, ClientError> {
        let mut builder = Request::builder().method(&call.method).uri(&call.path).header(header::HOST, "agent");
        for (name, value) in &call.headers {
            builder = builder.header(*name, value);
        }
        if let Some(key) = call.idempotency_key {
            builder = match &self.inner.transport {
                Transport::Unix(_) => builder.header(IDEMPOTENCY_HEADER, key.to_string()),
                Transport::Quic(quic) => {
                    let cluster = if call.is_claim { None } else { Some(self.cluster().await?) };
                    let to_sign = ToSign {
                        cluster,
                        host: quic.host_key,
                        method: call.method.as_str(),
                        path: &call.path,
                        body: call.signed_bytes(),
                        idempotency_key: key,
                    };
                    let signature = sign::sign_request(&to_sign, &quic.identity, Timestamp::now())
                        .map_err(|error| ClientError::local("the request cannot be signed", error))?;
                    builder.header(
                        SIGNATURE_HEADER,
                        HeaderValue::from_str(&signature).map_err(|error| ClientError::local("no header", error))?,
                    )
                }
            };
        }
        builder.body(body).map_err(|error| ClientError::local("the request cannot be made", error))
    }

    /// Signatures hold for one cluster; which one, the host says itself (its key is checked already).
    async fn cluster(&self) -> Result<ClusterId, ClientError> {
        let asked = self.inner.cluster.get_or_try_init(|| async {
            let host: Host = Box::pin(self.read(&Call::get("/v1/host"))).await?;
            Ok::<_, ClientError>(host.cluster)
        });
        asked.await.copied()
    }

    /// Only `limit` may pass between an answer's head and its end, of at most `most` bytes.
    async fn whole(&self, response: Response<Incoming>, most: usize, limit: Duration) -> Result<Bytes, ClientError> {
        let limit = self.inner.timeouts.bound(limit);
        match tokio::time::timeout(limit, Limited::new(response.into_body(), most).collect()).await {
            Ok(Ok(collected)) => Ok(collected.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(self.protocol(format!("more than {} MiB", most >> 20))),
            Ok(Err(error)) => Err(ClientError::Unreachable {
                target: self.target(),
                reason: format!("the answer broke off ({error})"),
                hint: "repeat the command".to_owned(),
            }),
            Err(_) => Err(ClientError::TimedOut { target: self.target(), seconds: limit.as_secs() }),
        }
    }

    async fn refusal(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status();
        let body = match self.whole(response, MAX_ANSWER, self.inner.timeouts.request).await {
            Ok(body) => body,
            Err(error) => return error,
        };
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => ClientError::Api(body.error),
            Err(_) => {
                let text: String = String::from_utf8_lossy(&body).chars().take(200).collect();
                self.protocol(format!("status {status} {text}").trim_end().to_owned())
            }
        }
    }

    pub(super) fn protocol(&self, what: String) -> ClientError {
        ClientError::Protocol { target: self.target(), what }
    }
}
