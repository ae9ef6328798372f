use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError,
    operation::Operation,
    pool::{PoolCreateRequest, PoolSetRequest},
    server::read_json,
    volume::Pool,
};
use form_types::Name;

use super::{
    Segment, Shared, accepted, blocking, changing, no_body,
    openapi::{ChangeHeaders, InTheWay, Missing, Refused, Unreadable},
    parsed, reading,
};
use crate::{
    authorise::Caller,
    volume::{
        describe,
        pool::{self, Change},
    },
};

/// The places that volumes live in.
#[utoipa::path(
    get,
    path = "/v1/pools",
    operation_id = "list_pools",
    tag = "pools",
    responses((status = 200, description = "The pools", body = Vec<Pool>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Pool>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || Ok(agent.store.pools().iter().map(|pool| describe::pool(&agent, pool)).collect())).await.map(Json)
}

/// One pool.
#[utoipa::path(
    get,
    path = "/v1/pools/{name}",
    operation_id = "show_pool",
    tag = "pools",
    params(("name" = Name, Path, description = "The pool")),
    responses((status = 200, description = "The pool", body = Pool), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<Pool>, ApiError> {
    reading(&agent, request).await?;
    let name = parsed(&name)?;
    blocking(move || describe::pool_named(&agent, &name)).await.map(Json)
}

type Accepted = Result<(StatusCode, Json<Operation>), ApiError>;

async fn change(agent: Shared, caller: Caller, name: Name, change: Change) -> Accepted {
    blocking(move || pool::change(&agent, &caller, &name, change)).await.map(accepted)
}

/// Makes a directory of the host a pool.
///
/// A file in it says from then on whose it is. While that file is not there (its file system is not mounted) the pool is unavailable, and
/// nothing is made in the directory.
#[utoipa::path(
    post,
    path = "/v1/pools",
    operation_id = "create_pool",
    tag = "pools",
    params(ChangeHeaders),
    request_body(content = PoolCreateRequest, description = "The new pool"),
    responses((status = 200, description = "The operation, which is final", body = Operation), Refused, Unreadable, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn create(State(agent): State<Shared>, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let body: PoolCreateRequest = read_json(&body)?;
    change(agent, caller, body.name.clone(), Change::Create(body)).await
}

/// Changes a pool's reserve, limit or labels. What is there already stays.
#[utoipa::path(
    patch,
    path = "/v1/pools/{name}",
    operation_id = "set_pool",
    tag = "pools",
    params(("name" = Name, Path, description = "The pool"), ChangeHeaders),
    request_body(content = PoolSetRequest, description = "What is to be changed"),
    responses((status = 200, description = "The operation, which is final", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn set(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    change(agent, caller, parsed(&name)?, Change::Set(read_json(&body)?)).await
}

/// Removes a pool that has no volumes. Its directory stays.
#[utoipa::path(
    delete,
    path = "/v1/pools/{name}",
    operation_id = "remove_pool",
    tag = "pools",
    params(("name" = Name, Path, description = "The pool"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn remove(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    no_body(&body)?;
    change(agent, caller, parsed(&name)?, Change::Remove).await
}
