//! The API: one module a noun. A handler reads, authorises, and hands over to the module that decides.

mod bench;
mod deploy;
mod event;
mod host;
mod image;
mod operation;
mod stream;
mod vm;

use std::sync::Arc;

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Request},
    routing::{delete, get, post, put},
};
use form_api::{ApiError, ErrorCode, operation::Operation, server::read_body};
use http::{StatusCode, request::Parts};

use crate::{agent::Agent, authorise, authorise::Caller};

type Shared = Arc<Agent>;

/// Everything that both transports serve.
pub fn router(agent: Shared) -> Router {
    Router::new()
        .route("/v1/host", get(host::show))
        .route("/v1/claim", post(host::claim))
        .route("/v1/doctor", get(host::doctor))
        .route("/v1/doctor/fix", post(host::doctor_fix))
        .route("/v1/bench", post(bench::measure))
        .route("/v1/plan", post(deploy::plan))
        .route("/v1/deploy", post(deploy::deploy))
        .route("/v1/vms", get(vm::list))
        .route("/v1/vms/{name}", get(vm::show).patch(vm::set).delete(vm::destroy))
        .route("/v1/vms/{name}/start", post(vm::start))
        .route("/v1/vms/{name}/stop", post(vm::stop))
        .route("/v1/vms/{name}/restart", post(vm::restart))
        .route("/v1/vms/{name}/pause", post(vm::pause))
        .route("/v1/vms/{name}/resume", post(vm::resume))
        .route("/v1/vms/{name}/reset", post(vm::reset))
        .route("/v1/vms/{name}/rename", post(vm::rename))
        .route("/v1/vms/{name}/logs", get(vm::logs))
        .route("/v1/vms/{name}/exec", get(stream::exec))
        .route("/v1/vms/{name}/console", get(stream::console))
        .route("/v1/vms/{name}/forward", get(stream::forward))
        .route("/v1/images", get(image::list).post(image::import))
        .route("/v1/images/missing", post(image::missing))
        .route("/v1/images/{reference}", get(image::show))
        .route("/v1/images/{reference}", delete(image::remove))
        .route("/v1/blocks", put(image::put_blocks))
        .route("/v1/manifests/{digest}", put(image::put_manifest))
        .route("/v1/kernels", post(image::import_kernel))
        .route("/v1/kernels/{digest}", get(image::kernel))
        .route("/v1/operations", get(operation::list))
        .route("/v1/operations/{id}", get(operation::show))
        .route("/v1/events", get(event::list))
        .fallback(nothing_here)
        // Bodies are read by `read_body`, which has the limit, and the streams have theirs.
        .layer(DefaultBodyLimit::disable())
        .with_state(agent)
}

async fn nothing_here(request: Request) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is nothing at {} {}", request.method(), request.uri().path()))
        .hint("client and agent may have different versions: compare `form version`")
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
fn query<T: serde::de::DeserializeOwned>(parts: &Parts) -> Result<T, ApiError> {
    let query = axum::extract::Query::<T>::try_from_uri(&parts.uri)
        .map_err(|error| ApiError::new(ErrorCode::Invalid, format!("the query does not fit: {}", error.body_text())))?;
    Ok(query.0)
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
