//! Kernel bundles of the host.

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError, ErrorCode,
    event::EventKind,
    image::{ImportRequest, Kernel},
    operation::{Operation, OperationKind},
    server::read_json,
};
use form_store::{KernelEntry, STALE_AFTER, StoreError};
use form_types::{Digest, OperationId};
use jiff::Timestamp;

use super::{
    Segment, Shared, accepted, blocking, changing,
    image::store_error,
    openapi::{ChangeHeaders, InTheWay, Missing, NoRoom, Refused, Unreadable},
    parsed, reading,
};
use crate::{
    agent::Agent,
    heap,
    kernel::Needs,
    operation::{Begun, Opening},
};

fn described(agent: &Agent, entry: &KernelEntry, needs: &Needs) -> Result<Kernel, ApiError> {
    let wanted_at = agent.store.kernel_wanted_at(&entry.digest).map_err(|error| store_error(&error))?;
    let kept_until = wanted_at.saturating_add(STALE_AFTER).unwrap_or(Timestamp::MAX);
    Ok(Kernel {
        digest: entry.digest,
        release: entry.release.clone(),
        size_bytes: entry.size_bytes,
        needed_by: needs.of_kernel(&entry.digest),
        kept_until: (kept_until > Timestamp::now()).then_some(kept_until),
    })
}

/// All kernel bundles, by release.
#[utoipa::path(
    get,
    path = "/v1/kernels",
    operation_id = "list_kernels",
    tag = "images",
    responses((status = 200, description = "The kernel bundles", body = Vec<Kernel>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Kernel>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || {
        let kernels = agent.store.kernels().map_err(|error| store_error(&error))?;
        let needs = Needs::of(&agent)?;
        // One that cannot be described was removed while we looked.
        Ok(kernels.iter().filter_map(|entry| described(&agent, entry, &needs).ok()).collect())
    })
    .await
    .map(Json)
}

/// Removes a kernel bundle that nothing needs.
#[utoipa::path(
    delete,
    path = "/v1/kernels/{digest}",
    operation_id = "remove_kernel",
    tag = "images",
    params(("digest" = Digest, Path, description = "Of its manifest"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn remove(
    State(agent): State<Shared>,
    Segment(digest): Segment,
    request: Request,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let (caller, _) = changing(&agent, request).await?;
    let digest: Digest = parsed(&digest)?;
    blocking(move || {
        agent.use_headroom();
        let entry = agent.store.kernel(&digest).map_err(|error| store_error(&error));
        // A repeated request is answered although the kernel is gone by now.
        if let Err(error) = &entry
            && agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_err()
        {
            return Err(error.clone());
        }
        let opening = Opening {
            kind: OperationKind::KernelRemove,
            vm: None,
            subject: format!("kernel/{}", digest.short()),
            actor: caller.actor,
            actor_key: caller.key,
            idempotency_key: caller.idempotency_key,
            request: caller.request,
        };
        let id = match agent.operations.begin(opening)? {
            Begun::Repeated(operation) => return Ok(*operation),
            Begun::New(id) => id,
        };
        agent.operations.finish(id, entry.and_then(|entry| remove_entry(&agent, &entry)));
        agent.operations.get(id)
    })
    .await
    .map(accepted)
}

fn remove_entry(agent: &Agent, entry: &KernelEntry) -> Result<(), ApiError> {
    // Held so that no deploy begins to use it meanwhile.
    let _admission = agent.admission();
    let needed_by = Needs::of(agent)?.of_kernel(&entry.digest);
    if !needed_by.is_empty() {
        let what = format!("the kernel {} ({}) is needed by {}", entry.digest.short(), entry.release, needed_by.join(", "));
        return Err(ApiError::new(ErrorCode::Conflict, what).hint("`form image prune` removes those that nothing needs"));
    }
    match agent.store.remove_kernel(&entry.digest, STALE_AFTER) {
        // Somebody else was faster.
        Ok(()) | Err(StoreError::NoKernel(_)) => {}
        Err(error) => return Err(store_error(&error)),
    }
    agent.events.emit(EventKind::KernelRemoved, None, None, format!("kernel {} ({}) removed", entry.digest.short(), entry.release));
    Ok(())
}

/// One kernel bundle.
///
/// Whoever asks is taken to be about to make use of it: it is not removed for a day.
#[utoipa::path(
    get,
    path = "/v1/kernels/{digest}",
    operation_id = "show_kernel",
    tag = "images",
    params(("digest" = Digest, Path, description = "Of its manifest")),
    responses((status = 200, description = "The kernel bundle", body = Kernel), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(digest): Segment, request: Request) -> Result<Json<Kernel>, ApiError> {
    reading(&agent, request).await?;
    let digest: Digest = parsed(&digest)?;
    blocking(move || {
        let kernel = agent.store.want_kernel(&digest).map_err(|error| store_error(&error))?;
        described(&agent, &kernel, &Needs::of(&agent)?).map(Json)
    })
    .await
}

/// Makes a kernel bundle of blocks that are all there.
#[utoipa::path(
    post,
    path = "/v1/kernels",
    operation_id = "import_kernel",
    tag = "images",
    params(ChangeHeaders),
    request_body(content = ImportRequest, description = "The manifest"),
    responses((status = 200, description = "The kernel bundle", body = Kernel), Refused, Unreadable, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn import(State(agent): State<Shared>, request: Request) -> Result<Json<Kernel>, ApiError> {
    let (_, body) = changing(&agent, request).await?;
    let import: ImportRequest = read_json(&body)?;
    blocking(move || {
        let kernel = agent.store.import_kernel_uploaded(&import.manifest);
        heap::give_back();
        let kernel = kernel.map_err(|error| store_error(&error))?;
        described(&agent, &kernel, &Needs::of(&agent)?).map(Json)
    })
    .await
}
