use std::time::Duration;

use axum::{
    Json,
    extract::{Request, State},
};
use form_api::{
    ApiError,
    operation::{Operation, OperationsQuery, WaitQuery},
};

use form_types::OperationId;

use super::{
    Segment, Shared, blocking,
    openapi::{Missing, Refused},
    parsed, query, reading,
};

const DEFAULT_LIMIT: usize = 50;
const MAX_LIMIT: usize = 1000;
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The newest operations, the newest first.
#[utoipa::path(
    get,
    path = "/v1/operations",
    operation_id = "list_operations",
    tag = "operations",
    params(OperationsQuery),
    responses((status = 200, description = "The operations", body = Vec<Operation>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Operation>>, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let limit = query::<OperationsQuery>(&parts.uri)?.limit.unwrap_or(DEFAULT_LIMIT).min(MAX_LIMIT);
    blocking(move || agent.operations.list(limit)).await.map(Json)
}

/// One operation; with `wait_ms` once it is final.
#[utoipa::path(
    get,
    path = "/v1/operations/{id}",
    operation_id = "show_operation",
    tag = "operations",
    params(("id" = OperationId, Path, description = "The operation"), WaitQuery),
    responses((status = 200, description = "The operation", body = Operation), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(id): Segment, request: Request) -> Result<Json<Operation>, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let id = parsed(&id)?;
    match query::<WaitQuery>(&parts.uri)?.wait_ms {
        Some(wait) => agent.operations.wait(id, Duration::from_millis(wait).min(MAX_WAIT)).await.map(Json),
        None => agent.operations.get(id).map(Json),
    }
}
