use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError,
    interface::{DetachInterfaceRequest, Interface},
    operation::Operation,
    server::read_json,
};
use form_types::Name;

use super::{
    Segment, Segments, Shared, accepted, blocking, changing, no_body,
    openapi::{ChangeHeaders, InTheWay, Missing, Refused, Unreadable},
    parsed, reading,
};
use crate::{
    authorise::Caller,
    desired,
    interface::{
        describe,
        operate::{self, Change},
    },
};

type Accepted = Result<(StatusCode, Json<Operation>), ApiError>;

/// The network interfaces of all VMs, by VM.
#[utoipa::path(
    get,
    path = "/v1/interfaces",
    operation_id = "list_interfaces",
    tag = "vms",
    responses((status = 200, description = "The interfaces", body = Vec<Interface>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Interface>>, ApiError> {
    reading(&agent, request).await?;
    let mut vms: Vec<_> = desired::vms(&agent.view()).into_values().collect();
    vms.sort_by(|one, other| one.name().cmp(other.name()));
    Ok(Json(vms.iter().flat_map(|vm| describe::of_vm(&agent, vm)).collect()))
}

async fn begin(agent: Shared, caller: Caller, name: Name, change: Change) -> Accepted {
    blocking(move || operate::begin(&agent, &caller, &name, change)).await.map(accepted)
}

/// Gives a VM one more network interface, with addresses of its own.
///
/// A VM that runs has it when its guest has set it up; one that does not has it from its next start on.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/interfaces",
    operation_id = "attach_interface",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn attach(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    no_body(&body)?;
    begin(agent, caller, parsed(&name)?, Change::Attach).await
}

/// Takes a network interface from a VM. It keeps the first one.
///
/// The guest of one that runs takes it out of use before; while something there uses it, that is a conflict that names who does.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/interfaces/{interface}/detach",
    operation_id = "detach_interface",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ("interface" = String, Path, description = "The interface: `eth1`"), ChangeHeaders),
    request_body(content = Option<DetachInterfaceRequest>, description = "How; without a body not by force"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn detach(State(agent): State<Shared>, Segments(name, interface): Segments, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let DetachInterfaceRequest { force } = if body.is_empty() { DetachInterfaceRequest::default() } else { read_json(&body)? };
    begin(agent, caller, parsed(&name)?, Change::Detach { interface, force }).await
}
