use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError,
    deploy::{DeployRequest, Plan},
    operation::Operation,
    server::read_json,
};

use super::{
    Shared, accepted, blocking, changing,
    openapi::{ChangeHeaders, Impossible, InTheWay, Missing, NoRoom, Refused, Unreadable},
    reading,
};
use crate::deploy;

/// What a deploy would change. Changes nothing.
#[utoipa::path(
    post,
    path = "/v1/plan",
    operation_id = "plan",
    tag = "deploy",
    request_body(content = DeployRequest, description = "The VM that should run"),
    responses((status = 200, description = "The plan", body = Plan), Refused, Unreadable, InTheWay, Impossible, NoRoom),
    security((), ("key" = []))
)]
pub async fn plan(State(agent): State<Shared>, request: Request) -> Result<Json<Plan>, ApiError> {
    let (_, body) = reading(&agent, request).await?;
    let request: DeployRequest = read_json(&body)?;
    blocking(move || deploy::make_plan(&agent, &request)).await.map(Json)
}

/// Makes a VM be as the request says: creates it, or changes it.
///
/// The operation is completed when the VM is ready and healthy; when it fails, what ran before is put back.
#[utoipa::path(
    post,
    path = "/v1/deploy",
    operation_id = "deploy",
    tag = "deploy",
    params(ChangeHeaders),
    request_body(content = DeployRequest, description = "The VM that should run; its image and kernel bundle have been uploaded before"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, Impossible, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn deploy(State(agent): State<Shared>, request: Request) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let (caller, body) = changing(&agent, request).await?;
    let request: DeployRequest = read_json(&body)?;
    let runtime = tokio::runtime::Handle::current();
    blocking(move || {
        // The drivers that it wakes are tasks of this runtime.
        let _entered = runtime.enter();
        deploy::begin(&agent, &caller, &request)
    })
    .await
    .map(accepted)
}
