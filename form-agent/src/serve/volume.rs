use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError,
    operation::Operation,
    server::read_json,
    volume::{AttachRequest, CloneRequest, CreateRequest, Pool, ResizeRequest, Volume},
};
use form_types::Name;
use serde::de::DeserializeOwned;

use super::{
    Segment, Shared, accepted, blocking, changing, no_body,
    openapi::{ChangeHeaders, InTheWay, Missing, NoRoom, Refused, Unreadable},
    parsed, reading,
};
use crate::{
    agent::Agent,
    authorise::Caller,
    volume::{
        describe,
        operate::{self, Change},
        volumes,
    },
};

/// All volumes, by name.
#[utoipa::path(
    get,
    path = "/v1/volumes",
    operation_id = "list_volumes",
    tag = "volumes",
    responses((status = 200, description = "The volumes", body = Vec<Volume>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Volume>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || Ok(volumes(&agent.view()).values().map(|volume| describe::volume(&agent, volume)).collect())).await.map(Json)
}

/// One volume.
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}",
    operation_id = "show_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume")),
    responses((status = 200, description = "The volume", body = Volume), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<Volume>, ApiError> {
    reading(&agent, request).await?;
    let name = parsed(&name)?;
    blocking(move || Ok(describe::volume(&agent, &describe::volume_named(&agent, &name)?))).await.map(Json)
}

type Accepted = Result<(StatusCode, Json<Operation>), ApiError>;

async fn begin(agent: Arc<Agent>, caller: Caller, name: Name, change: Change) -> Accepted {
    let runtime = tokio::runtime::Handle::current();
    blocking(move || {
        // What it goes on with is a task of this runtime.
        let _entered = runtime.enter();
        operate::begin(&agent, &caller, &name, change)
    })
    .await
    .map(accepted)
}

async fn change<T: DeserializeOwned>(agent: Shared, name: &str, request: Request, change: impl FnOnce(T) -> Change) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let body: T = read_json(&body)?;
    begin(agent, caller, parsed(name)?, change(body)).await
}

async fn bare_change(agent: Shared, name: &str, request: Request, change: Change) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    no_body(&body)?;
    begin(agent, caller, parsed(name)?, change).await
}

/// Makes an empty volume.
///
/// It takes room as it fills. A guest makes a file system on it when it first mounts it.
#[utoipa::path(
    post,
    path = "/v1/volumes",
    operation_id = "create_volume",
    tag = "volumes",
    params(ChangeHeaders),
    request_body(content = CreateRequest, description = "The new volume"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn create(State(agent): State<Shared>, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let body: CreateRequest = read_json(&body)?;
    begin(agent, caller, body.name.clone(), Change::Create(body)).await
}

/// Gives a volume to a VM, which has it from its next start on.
///
/// One VM at a time has a volume.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/attach",
    operation_id = "attach_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = AttachRequest, description = "The VM, and where it mounts the volume"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn attach(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Attach).await
}

/// Takes a volume from the VM that has it, which must not run with it.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/detach",
    operation_id = "detach_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn detach(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    bare_change(agent, &name, request, Change::Detach).await
}

/// Makes a volume larger; a VM that runs with it sees that from its next start on.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/resize",
    operation_id = "resize_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = ResizeRequest, description = "The new size"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn resize(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Resize).await
}

/// Makes a new volume that holds what another holds now. No VM may run with that one.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/clone",
    operation_id = "clone_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume to copy"), ChangeHeaders),
    request_body(content = CloneRequest, description = "The name of the new one"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn clone(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Clone).await
}

/// Removes a volume that no VM has, with everything it holds.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}",
    operation_id = "remove_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn remove(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    bare_change(agent, &name, request, Change::Remove).await
}

/// The places that volumes live in.
#[utoipa::path(
    get,
    path = "/v1/pools",
    operation_id = "list_pools",
    tag = "pools",
    responses((status = 200, description = "The pools", body = Vec<Pool>), Refused),
    security((), ("key" = []))
)]
pub async fn pools(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Pool>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || Ok(agent.store.pools().map(|pool| describe::pool(&agent, pool)).collect())).await.map(Json)
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
pub async fn pool(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<Pool>, ApiError> {
    reading(&agent, request).await?;
    let name = parsed(&name)?;
    blocking(move || describe::pool_named(&agent, &name)).await.map(Json)
}
