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

use super::{Shared, blocking, changing, no_body, reading};
use crate::{
    authorise, doctor,
    operation::{Begun, Opening},
};

pub async fn show(State(agent): State<Shared>, request: Request) -> Result<Json<Host>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || agent.host()).await.map(Json)
}

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
        let opening = Opening {
            kind: OperationKind::Claim,
            vm: None,
            subject: format!("host/{}", agent.name()),
            actor: caller.actor,
            actor_key: caller.key,
            idempotency_key: caller.idempotency_key,
            request: caller.request,
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

pub async fn doctor(State(agent): State<Shared>, request: Request) -> Result<Json<DoctorReport>, ApiError> {
    reading(&agent, request).await?;
    Ok(Json(doctor::examine(&agent).await))
}

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
        request: caller.request,
    };
    if let Begun::New(id) = agent.operations.begin(opening)? {
        let result = doctor::fix(&agent).await;
        agent.operations.finish(id, result);
    }
    Ok(Json(doctor::examine(&agent).await))
}
