//! The API: one module a noun. A handler reads, authorises, and hands over to the module that decides.

mod bench;
mod deploy;
mod event;
mod example;
mod host;
mod image;
mod image_contents;
mod interface;
mod kernel;
mod openapi;
mod operation;
mod pool;
mod snapshot;
mod ssh;
mod stats;
mod stream;
mod vm;
mod volume;
mod volume_snapshot;

use std::sync::Arc;

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, FromRequestParts, Path, Request},
    handler::Handler,
    response::Response,
    routing::{MethodFilter, MethodRouter},
};
use form_api::{ApiError, ErrorCode, error::ErrorBody, operation::Operation, server::read_body};
use http::{StatusCode, request::Parts};
use utoipa::{Path as _, openapi::HttpMethod};

pub use self::openapi::document;
use crate::{agent::Agent, authorise, authorise::Caller};

pub(crate) use image::store_error;

type Shared = Arc<Agent>;

/// Makes the router and the OpenAPI document of one list, so that neither has what the other lacks. Method and path of a handler are in its
/// `#[utoipa::path]`, which makes `__path_HANDLER` beside it.
macro_rules! api {
    ($($module:ident::$handler:ident),+ $(,)?) => {
        fn routes() -> Router<Shared> {
            pastey::paste! {
                Router::new()$(.route(&$module::[<__path_ $handler>]::path(), method::<$module::[<__path_ $handler>], _, _>($module::$handler)))+
            }
        }

        #[derive(utoipa::OpenApi)]
        #[openapi(paths($($module::$handler),+))]
        struct Described;
    };
}

api! {
    host::show,
    host::claim,
    host::doctor,
    host::doctor_fix,
    bench::measure,
    openapi::show,
    deploy::plan,
    deploy::deploy,
    deploy::create,
    deploy::versions,
    deploy::rollback,
    vm::list,
    vm::show,
    vm::destroy,
    vm::start,
    vm::stop,
    vm::restart,
    vm::pause,
    vm::resume,
    vm::reset,
    vm::rename,
    vm::set,
    vm::restore,
    vm::logs,
    interface::list,
    interface::attach,
    interface::detach,
    snapshot::list_all,
    snapshot::list,
    snapshot::create,
    snapshot::show,
    snapshot::remove,
    stats::list,
    stats::show,
    stats::health,
    stats::prometheus,
    stream::exec,
    stream::copy,
    stream::console,
    stream::forward,
    ssh::show,
    volume::list,
    volume::create,
    volume::show,
    volume::attach,
    volume::detach,
    volume::resize,
    volume::set,
    volume::clone,
    volume::relocate,
    volume::sync,
    volume::export,
    volume::unexport,
    volume::import,
    volume::contents,
    volume::remove,
    volume_snapshot::list_all,
    volume_snapshot::list,
    volume_snapshot::create,
    volume_snapshot::show,
    volume_snapshot::remove,
    volume_snapshot::restore,
    pool::list,
    pool::create,
    pool::show,
    pool::set,
    pool::remove,
    image::list,
    image::import,
    image::missing,
    image::show,
    image::config,
    image::set,
    image::remove,
    image::verify,
    image_contents::manifest,
    image_contents::blocks,
    image::put_blocks,
    image::put_manifest,
    kernel::list,
    kernel::import,
    kernel::show,
    kernel::remove,
    operation::list,
    operation::show,
    event::list,
}

/// The handler for the methods that its description names.
fn method<P: utoipa::Path, H: Handler<T, Shared>, T: 'static>(handler: H) -> MethodRouter<Shared> {
    P::methods().into_iter().fold(MethodRouter::new(), |router, method| {
        let method = match method {
            HttpMethod::Get => MethodFilter::GET,
            HttpMethod::Put => MethodFilter::PUT,
            HttpMethod::Post => MethodFilter::POST,
            HttpMethod::Delete => MethodFilter::DELETE,
            HttpMethod::Options => MethodFilter::OPTIONS,
            HttpMethod::Head => MethodFilter::HEAD,
            HttpMethod::Patch => MethodFilter::PATCH,
            HttpMethod::Trace => MethodFilter::TRACE,
        };
        router.on(method, handler.clone())
    })
}

/// Everything that both transports serve.
pub fn router(agent: Shared) -> Router {
    routes()
        .fallback(nothing_here)
        .method_not_allowed_fallback(another_method)
        // Bodies are read by `read_body`, which has the limit, and the streams have theirs.
        .layer(DefaultBodyLimit::disable())
        .with_state(agent)
}

async fn nothing_here(request: Request) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is nothing at {} {}", request.method(), request.uri().path()))
        .hint("client and agent may have different versions: compare `form version`")
}

/// Status 405 (RFC 9110, section 15.5.6); the header `allow`, which the router adds, says which methods there are.
async fn another_method(request: Request) -> (StatusCode, axum::Json<ErrorBody>) {
    let error = ApiError::new(ErrorCode::Invalid, format!("{} does not do {}", request.uri().path(), request.method()))
        .hint("docs/openapi.json, or GET /v1/openapi.json, lists what there is");
    (StatusCode::METHOD_NOT_ALLOWED, axum::Json(ErrorBody { error }))
}

/// The variable part of a path, as text.
struct Segment(String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path(text) = Path::from_request_parts(parts, state)
            .await
            .map_err(|error| ApiError::new(ErrorCode::Invalid, format!("the path is not understood: {}", error.body_text())))?;
        Ok(Self(text))
    }
}

/// Both variable parts of a path, as text.
struct Segments(String, String);

impl<S: Send + Sync> FromRequestParts<S> for Segments {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path((one, other)) = Path::from_request_parts(parts, state)
            .await
            .map_err(|error| ApiError::new(ErrorCode::Invalid, format!("the path is not understood: {}", error.body_text())))?;
        Ok(Self(one, other))
    }
}

/// A request that only the owner may make and that changes nothing.
async fn reading(agent: &Agent, request: Request) -> Result<(Parts, Bytes), ApiError> {
    let (parts, body) = request.into_parts();
    authorise::read(agent, &parts)?;
    Ok((parts, read_body(body).await?))
}

/// A request that changes something, by who may make it.
async fn changing(agent: &Agent, request: Request) -> Result<(Caller, Bytes), ApiError> {
    let (parts, body) = request.into_parts();
    // Before the body is read: a stranger does not make the agent hold eight megabytes.
    authorise_peer(agent, &parts)?;
    let body = read_body(body).await?;
    Ok((authorise::change(agent, &parts, &body)?, body))
}

fn authorise_peer(agent: &Agent, parts: &Parts) -> Result<(), ApiError> {
    authorise::read(agent, parts)
}

/// The answer to a change: the operation, accepted.
fn accepted(operation: Operation) -> (StatusCode, axum::Json<Operation>) {
    let status = if operation.status.is_final() { StatusCode::OK } else { StatusCode::ACCEPTED };
    (status, axum::Json(operation))
}

/// A path's last part as what it should be.
fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, ApiError> {
    text.parse().map_err(|error: T::Err| ApiError::new(ErrorCode::Invalid, error.to_string()))
}

/// A query string as what it should be.
fn query<T: serde::de::DeserializeOwned>(uri: &http::Uri) -> Result<T, ApiError> {
    let query = axum::extract::Query::<T>::try_from_uri(uri)
        .map_err(|error| ApiError::new(ErrorCode::Invalid, format!("the query does not fit: {}", error.body_text())))?;
    Ok(query.0)
}

/// Says where a stream of lines begins, for a follower that has to ask again before it got one.
fn begins_after(mut lines: Response, header: &'static str, cursor: Option<String>) -> Response {
    if let Some(value) = cursor.and_then(|cursor| http::HeaderValue::try_from(cursor).ok()) {
        lines.headers_mut().insert(header, value);
    }
    lines
}

/// Runs what blocks (files, the state, KVM) where it may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(ApiError::new(ErrorCode::Internal, error.to_string())))
}

/// An empty request of a verb that takes no body.
fn no_body(body: &Bytes) -> Result<(), ApiError> {
    if body.is_empty() || body.as_ref() == b"{}" { Ok(()) } else { Err(ApiError::new(ErrorCode::Invalid, "this path takes no body")) }
}

type StreamBody = Body;
