use axum::{
    Json,
    extract::{Request, State},
};
use form_api::{
    ApiError, ErrorCode,
    event::EventKind,
    host::{ClaimRequest, DoctorReport, Host},
    operation::OperationKind,
    server::{read_body, read_json},
};

use super::{
    Shared, blocking, changing, no_body,
    openapi::{ChangeHeaders, InTheWay, Refused, Unreadable},
    reading,
};
use crate::{
    authorise, doctor,
    operation::{Begun, Opening},
};

/// The host: who it is, what it has, what of it is taken.
#[utoipa::path(
    get,
    path = "/v1/host",
    operation_id = "show_host",
    tag = "hosts",
    responses((status = 200, description = "The host", body = Host), Refused),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, request: Request) -> Result<Json<Host>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || agent.host()).await.map(Json)
}

/// Makes the key that signed the request the owner of a host that has none.
///
/// The signature is over no cluster: the client does not know it yet.
#[utoipa::path(
    post,
    path = "/v1/claim",
    operation_id = "claim_host",
    tag = "hosts",
    params(ChangeHeaders),
    request_body(content = ClaimRequest, description = "The secret half of the token"),
    responses((status = 200, description = "The host, which is yours now", body = Host), Refused, Unreadable),
    security((), ("key" = [], "signature" = []))
)]
pub async fn claim(State(agent): State<Shared>, request: Request) -> Result<Json<Host>, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read_body(body).await?;
    let caller = authorise::claim(&agent, &parts, &body)?;
    let claim: ClaimRequest = read_json(&body)?;
    blocking(move || {
        let accepted = agent
            .identity()
            .claim(caller.key, claim.secret.trim())
            .map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
        if !accepted {
            let (message, hint) = match agent.identity().owner() {
                Some(_) => ("this host has an owner already", "its owner can add your key; see `form host show`"),
                None => ("the token is wrong or was used before", "print a new one on the host with `form-agent init`"),
            };
            return Err(ApiError::new(ErrorCode::NotAllowed, message).hint(hint));
        }
        agent.record_owner()?;
        let opening = Opening {
            kind: OperationKind::Claim,
            vm: None,
            subject: format!("host/{}", agent.name()),
            actor: caller.actor,
            actor_key: caller.key,
            idempotency_key: caller.idempotency_key,
            request: caller.request.clone(),
        };
        if let Begun::New(id) = agent.operations.begin(opening)? {
            agent.events.emit(EventKind::HostClaimed, None, Some(id), format!("{} owns this host", caller.key));
            agent.operations.finish(id, Ok(()));
        }
        agent.host()
    })
    .await
    .map(Json)
}

/// Looks for what the host lacks, and for leftovers.
#[utoipa::path(
    get,
    path = "/v1/doctor",
    operation_id = "examine_host",
    tag = "hosts",
    responses((status = 200, description = "What was found", body = DoctorReport), Refused),
    security((), ("key" = []))
)]
pub async fn doctor(State(agent): State<Shared>, request: Request) -> Result<Json<DoctorReport>, ApiError> {
    reading(&agent, request).await?;
    Ok(Json(doctor::examine(&agent).await))
}

/// Removes leftovers, and looks again.
#[utoipa::path(
    post,
    path = "/v1/doctor/fix",
    operation_id = "mend_host",
    tag = "hosts",
    params(ChangeHeaders),
    responses((status = 200, description = "What is left", body = DoctorReport), Refused, Unreadable, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn doctor_fix(State(agent): State<Shared>, request: Request) -> Result<Json<DoctorReport>, ApiError> {
    let (caller, body) = changing(&agent, request).await?;
    no_body(&body)?;
    let opening = Opening {
        kind: OperationKind::DoctorFix,
        vm: None,
        subject: format!("host/{}", agent.name()),
        actor: caller.actor,
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    if let Begun::New(id) = agent.operations.begin(opening)? {
        let result = doctor::fix(&agent).await;
        agent.operations.finish(id, result);
    }
    Ok(Json(doctor::examine(&agent).await))
}
