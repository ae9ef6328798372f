use std::time::Duration;

use axum::{
    Json,
    extract::{Path, Request, State},
};
use form_api::{
    ApiError,
    operation::{Operation, OperationsQuery, WaitQuery},
};

use super::{Shared, blocking, parsed, query, reading};

const DEFAULT_LIMIT: usize = 50;
const MAX_LIMIT: usize = 1000;
const MAX_WAIT: Duration = Duration::from_secs(60);

pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Operation>>, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let limit = query::<OperationsQuery>(&parts)?.limit.unwrap_or(DEFAULT_LIMIT).min(MAX_LIMIT);
    blocking(move || agent.operations.list(limit)).await.map(Json)
}

pub async fn show(State(agent): State<Shared>, Path(id): Path<String>, request: Request) -> Result<Json<Operation>, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let id = parsed(&id)?;
    match query::<WaitQuery>(&parts)?.wait_ms {
        Some(wait) => agent.operations.wait(id, Duration::from_millis(wait).min(MAX_WAIT)).await.map(Json),
        None => agent.operations.get(id).map(Json),
    }
}
