//! Answers and bodies as every handler needs them.

use axum::{
    body::{Body, Bytes, HttpBody},
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt};
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};

use crate::{ApiError, ErrorCode, MAX_BODY, error::ErrorBody};

const NDJSON: HeaderValue = HeaderValue::from_static("application/x-ndjson");

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = axum::Json(ErrorBody { error: self }).into_response();
        *response.status_mut() = status;
        response
    }
}

/// A whole HTTP/1.1 response with `error` in it, for a client whose request is not read.
pub(super) fn raw(error: &ApiError) -> Vec<u8> {
    let body = serde_json::to_string(&ErrorBody { error: error.clone() }).unwrap_or_default();
    let status = error.code.http_status();
    format!("HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
        .into_bytes()
}

/// The whole body of a request, for its digest and its JSON.
///
/// # Errors
/// `too-large` over [`MAX_BODY`] bytes (before keeping any, where the length is announced), `invalid` when the connection fails.
pub async fn read_body(mut body: Body) -> Result<Bytes, ApiError> {
    let too_large = || ApiError::new(ErrorCode::TooLarge, format!("the request's body is larger than {} MiB", MAX_BODY >> 20));
    let announced = body.size_hint().lower();
    if announced > MAX_BODY as u64 {
        // A client that is cut off while it sends sees a broken connection instead of the answer: what is not far too much is let in and dropped.
        while announced <= 2 * MAX_BODY as u64 && matches!(body.frame().await, Some(Ok(_))) {}
        return Err(too_large());
    }
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(error) => Err(ApiError::new(ErrorCode::Invalid, format!("the request's body did not arrive: {error}"))),
    }
}

/// A request's body as JSON.
///
/// # Errors
/// `invalid` with the place where the JSON is not what was expected.
pub fn read_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        ApiError::new(ErrorCode::Invalid, format!("the request's body is not what this path expects: {error}"))
            .hint("client and agent may have different versions: compare `form version`")
    })
}

/// A long answer: one JSON value a line, sent as it comes. An error in the middle becomes the last line, as `{"error": …}`.
pub fn ndjson<T, S>(lines: S) -> Response
where
    T: Serialize + Send + 'static,
    S: Stream<Item = Result<T, ApiError>> + Send + 'static,
{
    let mut failed = false;
    let lines = lines
        .take_while(move |line| {
            let go_on = !failed;
            failed = line.is_err();
            futures_util::future::ready(go_on)
        })
        .map(|line| {
            let mut text = match line {
                Ok(value) => serde_json::to_vec(&value),
                Err(error) => serde_json::to_vec(&ErrorBody { error }),
            }
            .map_err(std::io::Error::other)?;
            text.push(b'\n');
            Ok::<_, std::io::Error>(Bytes::from(text))
        });
    let mut response = Response::new(Body::from_stream(lines));
    response.headers_mut().insert(header::CONTENT_TYPE, NDJSON);
    response
}

/// Answers an Upgrade to `protocol`: send the response, and the future gives the bytes that follow it.
///
/// # Errors
/// `invalid` when the request asks for no upgrade, or for another.
pub fn upgrade(
    request: &mut Request<Body>,
    protocol: &'static str,
) -> Result<(Response, impl Future<Output = Result<TokioIo<Upgraded>, hyper::Error>> + Send + 'static), ApiError> {
    let asked = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if !asked.is_some_and(|asked| asked.eq_ignore_ascii_case(protocol)) {
        return Err(ApiError::new(ErrorCode::Invalid, format!("this path wants an Upgrade to `{protocol}`")));
    }
    let upgrade = hyper::upgrade::on(request);
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(protocol));
    Ok((response, async move { upgrade.await.map(TokioIo::new) }))
}
