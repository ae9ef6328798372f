//! What a running guest is told of changes: the time after a pause, a new name, a new restart policy, who it is.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use form_guest::protocol::{NewIdentity, Reply, Request};
use form_types::VmId;

use super::guest::{GuestError, ask};
use crate::{agent::Agent, desired::DesiredVm, vm};

/// How long a guest may take to answer.
const LIMIT: Duration = Duration::from_secs(5);
/// It may have to make host keys.
const IDENTITY_LIMIT: Duration = Duration::from_secs(60);

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
    let told = vm::settings(&desired.id, &desired.request, &agent.links(desired), Vec::new(), false);
    tell(control, &Request::SetName { hostname: told.hostname, hosts: told.hosts }).await?;
    tell(control, &Request::SetRestart { restart: desired.request.spec.restart.clone() }).await
}

/// To the guest of a VM that goes on as a copy of another one: who it is.
///
/// # Errors
/// As [`settings`]; then it must not go on.
pub async fn new_identity(control: &Path, agent: &Agent, desired: &DesiredVm) -> Result<(), GuestError> {
    let told = vm::settings(&desired.id, &desired.request, &agent.links(desired), Vec::new(), false);
    let mut seed = [0; 32];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty()).map_err(std::io::Error::from)?;
    let identity = NewIdentity {
        hostname: told.hostname,
        hosts: told.hosts,
        interfaces: told.interfaces,
        root_serial: told.root_serial,
        seed,
        unix_ns: now_ns(),
    };
    match ask(control, &Request::NewIdentity(Box::new(identity)), IDENTITY_LIMIT).await? {
        Reply::Done => Ok(()),
        _ => Err(GuestError::Unexpected),
    }
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// After a pause: the time, and what was changed meanwhile.
///
/// # Errors
/// As [`settings`].
pub async fn resumed(control: &Path, agent: &Agent, id: &VmId) -> Result<(), GuestError> {
    tell(control, &Request::SyncTime { unix_ns: now_ns() }).await?;
    match agent.desired(id) {
        Some(desired) => settings(control, agent, &desired).await,
        None => Ok(()),
    }
}
