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

use super::{Shared, accepted, blocking, changing, reading};
use crate::deploy;

pub async fn plan(State(agent): State<Shared>, request: Request) -> Result<Json<Plan>, ApiError> {
    let (_, body) = reading(&agent, request).await?;
    let request: DeployRequest = read_json(&body)?;
    blocking(move || deploy::make_plan(&agent, &request)).await.map(Json)
}

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
