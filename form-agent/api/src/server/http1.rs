//! One HTTP/1.1 connection, whatever carries it.

use std::convert::Infallible;

use axum::{
    Router,
    body::{Body, HttpBody},
};
use futures_util::StreamExt;
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::{Limits, Peer};

const MAX_HEADERS: usize = 64;

/// A request line and its headers: an exec header may hold a long command.
const MAX_HEADER_BYTES: usize = 256 * 1024;

/// Serves one connection until it ends; after `shutdown` no further request is read from it. `left` is cancelled when the client has left,
/// which ends an answer under way also while there is nothing to write. What was asked for is done nevertheless, up to its answer.
pub(super) async fn serve<S>(
    stream: S,
    peer: Peer,
    router: Router,
    limits: Limits,
    keep_alive: bool,
    left: CancellationToken,
    shutdown: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, left) = (router.clone(), left.clone());
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer);
            let answer = router.oneshot(request).await.map_err(|never: Infallible| never)?;
            Ok::<_, Infallible>(answer.map(|body| until(body, left)))
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .half_close(true)
        .keep_alive(keep_alive)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(?peer, %error, "connection ended early");
    }
}

/// `body`, ended when `left` is cancelled. One whose length is known is written as soon as it is read, or fails at that.
fn until(body: Body, left: CancellationToken) -> Body {
    if body.size_hint().exact().is_some() { body } else { Body::from_stream(body.into_data_stream().take_until(left.cancelled_owned())) }
}
