use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError,
    operation::Operation,
    server::read_json,
    snapshot::{ShowSnapshotQuery, Snapshot, SnapshotRequest},
};
use form_types::Name;

use super::{
    Segment, Segments, Shared, accepted, blocking, changing, no_body,
    openapi::{ChangeHeaders, InTheWay, Missing, NoRoom, Refused, Unreadable},
    parsed, query, reading,
};
use crate::{
    authorise::Caller,
    snapshot::{
        describe,
        operate::{self, Change},
    },
};

/// The snapshots of all VMs.
#[utoipa::path(
    get,
    path = "/v1/snapshots",
    operation_id = "list_all_snapshots",
    tag = "snapshots",
    responses((status = 200, description = "The snapshots, by VM, the oldest first", body = Vec<Snapshot>), Refused),
    security((), ("key" = []))
)]
pub async fn list_all(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Snapshot>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || describe::all(&agent)).await.map(Json)
}

/// The snapshots of a VM.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/snapshots",
    operation_id = "list_snapshots",
    tag = "snapshots",
    params(("name" = Name, Path, description = "The VM")),
    responses((status = 200, description = "The snapshots, the oldest first", body = Vec<Snapshot>), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, Segment(vm): Segment, request: Request) -> Result<Json<Vec<Snapshot>>, ApiError> {
    reading(&agent, request).await?;
    let vm: Name = parsed(&vm)?;
    blocking(move || describe::of_vm(&agent, &agent.vm_named(&vm)?)).await.map(Json)
}

/// One snapshot.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/snapshots/{snapshot}",
    operation_id = "show_snapshot",
    tag = "snapshots",
    params(("name" = Name, Path, description = "The VM"), ("snapshot" = Name, Path, description = "The snapshot"), ShowSnapshotQuery),
    responses((status = 200, description = "The snapshot", body = Snapshot), Refused, Unreadable, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segments(vm, name): Segments, request: Request) -> Result<Json<Snapshot>, ApiError> {
    let ShowSnapshotQuery { verify } = query(request.uri())?;
    reading(&agent, request).await?;
    let (vm, name): (Name, Name) = (parsed(&vm)?, parsed(&name)?);
    let look = if verify { describe::verified } else { describe::one };
    blocking(move || look(&agent, &agent.vm_named(&vm)?, &name)).await.map(Json)
}

type Accepted = Result<(StatusCode, Json<Operation>), ApiError>;

async fn begin(agent: Shared, caller: Caller, vm: &str, change: Change) -> Accepted {
    let vm: Name = parsed(vm)?;
    let runtime = tokio::runtime::Handle::current();
    blocking(move || {
        // What it goes on with is a task of this runtime.
        let _entered = runtime.enter();
        operate::begin(&agent, &caller, &vm, &change)
    })
    .await
    .map(accepted)
}

/// Saves memory, devices and root disk of a VM at one instant.
///
/// The VM stands still for it. Of a stopped VM the disks alone are saved. Each volume that it can write to gets a snapshot of the same name,
/// which goes with this one; while the VM runs its pool has to share blocks between files.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/snapshots",
    operation_id = "create_snapshot",
    tag = "snapshots",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    request_body(content = SnapshotRequest, description = "What to call it, and how to keep it"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn create(State(agent): State<Shared>, Segment(vm): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let SnapshotRequest { name, compress } = read_json(&body)?;
    begin(agent, caller, &vm, Change::Create { name, compress }).await
}

/// Removes a snapshot.
///
/// A VM that was restored from it runs on.
#[utoipa::path(
    delete,
    path = "/v1/vms/{name}/snapshots/{snapshot}",
    operation_id = "remove_snapshot",
    tag = "snapshots",
    params(("name" = Name, Path, description = "The VM"), ("snapshot" = Name, Path, description = "The snapshot"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn remove(State(agent): State<Shared>, Segments(vm, name): Segments, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    no_body(&body)?;
    begin(agent, caller, &vm, Change::Remove(parsed(&name)?)).await
}
