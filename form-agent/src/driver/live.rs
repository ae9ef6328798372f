//! What a running guest is told of changes: the time after a pause, a new name, a new restart policy.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use form_guest::protocol::{Reply, Request};
use form_types::VmId;

use super::guest::{GuestError, ask};
use crate::{agent::Agent, desired::DesiredVm, vm};

/// How long a guest may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

async fn tell(control: &Path, request: &Request) -> Result<(), GuestError> {
    match ask(control, request, LIMIT).await? {
        Reply::Done => Ok(()),
        _ => Err(GuestError::Unexpected),
    }
}

/// The name and the restart policy as they should be now.
///
/// # Errors
/// When the guest does not answer, or cannot do it.
pub async fn settings(control: &Path, agent: &Agent, desired: &DesiredVm) -> Result<(), GuestError> {
    let told = vm::settings(&desired.id, &desired.request, &agent.link(desired), Vec::new(), false);
    tell(control, &Request::SetName { hostname: told.hostname, hosts: told.hosts }).await?;
    tell(control, &Request::SetRestart { restart: desired.request.spec.restart.clone() }).await
}

/// After a pause: the time, and what was changed meanwhile.
///
/// # Errors
/// As [`settings`].
pub async fn resumed(control: &Path, agent: &Agent, id: &VmId) -> Result<(), GuestError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    tell(control, &Request::SyncTime { unix_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX) }).await?;
    match agent.desired(id) {
        Some(desired) => settings(control, agent, &desired).await,
        None => Ok(()),
    }
}
