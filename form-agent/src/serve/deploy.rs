use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError, ErrorCode,
    deploy::{CreateVmRequest, DeployRequest, Plan, RollbackRequest, VmVersion},
    operation::Operation,
    server::read_json,
};
use form_types::Name;

use super::{
    Segment, Shared, accepted, blocking, changing,
    openapi::{ChangeHeaders, Impossible, InTheWay, Missing, NoRoom, Refused, Unreadable},
    parsed, reading,
};
use crate::{authorise::Caller, create::Wanted, deploy, kept};

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
    begin(agent, caller, Wanted::deploy(read_json(&body)?)).await
}

/// What a VM can go back to, the latest first.
///
/// The last few deploys that became healthy are kept, each with what was set later, without the one that it should be now.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/versions",
    operation_id = "vm_versions",
    tag = "deploy",
    params(("name" = Name, Path, description = "The VM")),
    responses((status = 200, description = "The versions", body = Vec<VmVersion>), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn versions(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<Vec<VmVersion>>, ApiError> {
    reading(&agent, request).await?;
    let name: Name = parsed(&name)?;
    blocking(move || Ok(kept::versions(&agent, &agent.vm_named(&name)?))).await.map(Json)
}

/// Makes a VM again what it was before: a deploy of something that became healthy here.
///
/// When it does not become healthy again, what ran before is put back. A new image means a new root disk; a plan says what is lost.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/rollback",
    operation_id = "rollback_vm",
    tag = "deploy",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    request_body(content = RollbackRequest, description = "One of the VM's versions"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, Impossible, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn rollback(
    State(agent): State<Shared>,
    Segment(name): Segment,
    request: Request,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let (caller, body) = changing(&agent, request).await?;
    let name: Name = parsed(&name)?;
    let wanted = Wanted::rollback(read_json(&body)?);
    if *wanted.name() != name {
        let text = format!("vm/{name} goes back to what it was itself, not to vm/{}", wanted.name());
        return Err(ApiError::new(ErrorCode::Invalid, text).hint(format!("take one of GET /v1/vms/{name}/versions")));
    }
    begin(agent, caller, wanted).await
}

/// Makes a VM that is not there yet, without a Formfile: of an image, or with a copy of a stopped VM's root disk.
///
/// Of a name that is taken nothing is changed: that is a conflict.
#[utoipa::path(
    post,
    path = "/v1/vms",
    operation_id = "create_vm",
    tag = "vms",
    params(ChangeHeaders),
    request_body(content = CreateVmRequest, description = "The new VM; its image and kernel bundle are on the host"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, Impossible, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn create(State(agent): State<Shared>, request: Request) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let (caller, body) = changing(&agent, request).await?;
    begin(agent, caller, Wanted::create(read_json(&body)?)?).await
}

async fn begin(agent: Shared, caller: Caller, wanted: Wanted) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let runtime = tokio::runtime::Handle::current();
    blocking(move || {
        // The drivers that it wakes are tasks of this runtime.
        let _entered = runtime.enter();
        deploy::begin(&agent, &caller, wanted)
    })
    .await
    .map(accepted)
}
