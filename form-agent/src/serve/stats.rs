use std::time::Duration;

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use form_api::{
    ApiError, ErrorCode,
    stats::{HealthReport, MAX_INTERVAL_MS, StatsQuery, VmStats},
    vm::VmState,
};
use form_types::Name;
use http::header::CONTENT_TYPE;

use super::{
    Segment, Shared,
    openapi::{Missing, Refused},
    parsed, query, reading,
};
use crate::{
    action::{self, Action},
    health, metrics, stats,
};

fn interval(query: &StatsQuery) -> Result<Option<Duration>, ApiError> {
    match query.interval_ms {
        Some(1..=MAX_INTERVAL_MS) | None => Ok(query.interval_ms.map(Duration::from_millis)),
        Some(other) => {
            let words = format!("an interval of {other} ms: 1 to {MAX_INTERVAL_MS} are possible");
            Err(ApiError::new(ErrorCode::Invalid, words))
        }
    }
}

/// What all VMs use, by name.
#[utoipa::path(
    get,
    path = "/v1/stats",
    operation_id = "list_stats",
    tag = "vms",
    params(StatsQuery),
    responses((status = 200, description = "What each VM uses", body = Vec<VmStats>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<VmStats>>, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let interval = interval(&query(&parts.uri)?)?;
    Ok(Json(stats::of(&agent, stats::all_vms(&agent), interval).await))
}

/// What one VM uses.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/stats",
    operation_id = "vm_stats",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), StatsQuery),
    responses((status = 200, description = "What the VM uses", body = VmStats), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<VmStats>, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let vm = agent.vm_named(&parsed(&name)?)?;
    let state = agent.fleet.observed(&vm.id).map_or(VmState::Pending, |observed| observed.state);
    action::check_vm(Action::Stats, state, &vm)?;
    let interval = interval(&query(&parts.uri)?)?;
    let found = stats::of(&agent, vec![vm], interval).await.pop();
    found.map(Json).ok_or_else(|| ApiError::new(ErrorCode::Internal, "nothing was found out"))
}

/// How the parts of the agent are.
///
/// The status is 200 also when a part is not well.
#[utoipa::path(
    get,
    path = "/v1/health",
    operation_id = "show_health",
    tag = "hosts",
    responses((status = 200, description = "Every part, and how operations went", body = HealthReport), Refused),
    security((), ("key" = []))
)]
pub async fn health(State(agent): State<Shared>, request: Request) -> Result<Json<HealthReport>, ApiError> {
    reading(&agent, request).await?;
    Ok(Json(health::report(&agent).await))
}

/// The host and its VMs in Prometheus' text format.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "metrics",
    tag = "hosts",
    responses((status = 200, description = "Text format of version 0.0.4: families with `# HELP` and `# TYPE`, names that begin with `form_`", body = String, content_type = "text/plain"), Refused),
    security((), ("key" = []))
)]
pub async fn prometheus(State(agent): State<Shared>, request: Request) -> Result<Response, ApiError> {
    reading(&agent, request).await?;
    let page = metrics::page(&metrics::of(&agent).await?);
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response())
}
