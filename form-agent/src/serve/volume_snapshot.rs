use axum::{
    Json,
    extract::{Request, State},
};
use form_api::{
    ApiError,
    operation::Operation,
    server::read_json,
    volume::{VolumeRestoreRequest, VolumeSnapshot, VolumeSnapshotRequest},
};
use form_types::Name;
use jiff::Timestamp;

use super::{
    Segment, Segments, Shared, blocking, changing, no_body,
    openapi::{ChangeHeaders, InTheWay, Missing, NoRoom, Refused, Unreadable},
    parsed, reading,
    volume::{Accepted, begin, change},
};
use crate::{
    snapshot::operate::name_of,
    volume::{describe, operate::Change, snapshot},
};

/// The snapshots of all volumes.
#[utoipa::path(
    get,
    path = "/v1/volume-snapshots",
    operation_id = "list_all_volume_snapshots",
    tag = "volumes",
    responses((status = 200, description = "The snapshots, by volume, the oldest first", body = Vec<VolumeSnapshot>), Refused),
    security((), ("key" = []))
)]
pub async fn list_all(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<VolumeSnapshot>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || snapshot::all(&agent)).await.map(Json)
}

/// The snapshots of a volume.
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}/snapshots",
    operation_id = "list_volume_snapshots",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume")),
    responses((status = 200, description = "The snapshots, the oldest first", body = Vec<VolumeSnapshot>), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<Vec<VolumeSnapshot>>, ApiError> {
    reading(&agent, request).await?;
    let name: Name = parsed(&name)?;
    blocking(move || snapshot::of_volume(&agent, &describe::volume_named(&agent, &name)?)).await.map(Json)
}

/// One snapshot of a volume.
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}/snapshots/{snapshot}",
    operation_id = "show_volume_snapshot",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ("snapshot" = Name, Path, description = "The snapshot")),
    responses((status = 200, description = "The snapshot", body = VolumeSnapshot), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(
    State(agent): State<Shared>,
    Segments(volume, name): Segments,
    request: Request,
) -> Result<Json<VolumeSnapshot>, ApiError> {
    reading(&agent, request).await?;
    let (volume, name): (Name, Name) = (parsed(&volume)?, parsed(&name)?);
    blocking(move || snapshot::one(&agent, &describe::volume_named(&agent, &volume)?, &name)).await.map(Json)
}

/// Keeps what a volume holds now.
///
/// A VM that runs with it stands still for a moment, its file systems quiesced when its guest answers; where the pool's file system does not
/// share blocks between files, that is a conflict. Otherwise the volume is copied while nobody may write to it.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/snapshots",
    operation_id = "create_volume_snapshot",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = VolumeSnapshotRequest, description = "What to call it"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn create(State(agent): State<Shared>, Segment(volume): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let VolumeSnapshotRequest { name } = read_json(&body)?;
    let name = name.map_or_else(|| name_of(Timestamp::now()), Ok)?;
    begin(agent, caller, parsed(&volume)?, Change::Snapshot(name)).await
}

/// Removes a snapshot of a volume. What was made from it stays.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}/snapshots/{snapshot}",
    operation_id = "remove_volume_snapshot",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ("snapshot" = Name, Path, description = "The snapshot"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn remove(State(agent): State<Shared>, Segments(volume, name): Segments, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    no_body(&body)?;
    begin(agent, caller, parsed(&volume)?, Change::RemoveSnapshot(parsed(&name)?)).await
}

/// Puts a volume back to what it held when a snapshot was made, and to the size that it had. No VM may run with it, and it may not be exported.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/restore",
    operation_id = "restore_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = VolumeRestoreRequest, description = "To which snapshot"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn restore(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Restore).await
}
