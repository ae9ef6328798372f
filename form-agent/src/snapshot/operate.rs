//! Making and removing snapshots: recorded, done, and after a crash found done or taken back.

use std::sync::Arc;

use form_api::{
    ApiError, ErrorCode,
    operation::{Operation, OperationKind},
    vm::VmState,
};
use form_types::{Name, OperationId, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{compress, find, take, volumes};
use crate::{
    action::{self, Action},
    agent::{Agent, internal},
    authorise::Caller,
    desired::DesiredVm,
    headroom,
    operation::{Begun, Opening, Record},
    serve::store_error,
};

/// What is asked for.
#[derive(Clone, Debug)]
pub enum Change {
    /// With a name, or one of the time.
    Create {
        name: Option<Name>,
        /// Its memory, once it is there.
        compress: bool,
    },
    Remove(Name),
}

/// What is remembered of it while it is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    vm: VmId,
    name: Name,
    removes: bool,
    #[serde(default)]
    compress: bool,
}

/// # Errors
/// Not found, not in this state, no room, another operation under way, or the database's.
pub fn begin(agent: &Arc<Agent>, caller: &Caller, vm: &Name, change: &Change) -> Result<Operation, ApiError> {
    let removes = matches!(change, Change::Remove(_));
    if removes {
        agent.use_headroom()
    } else {
        agent.keep_headroom()
    }
    let opening = Opening {
        kind: if removes { OperationKind::SnapshotRemove } else { OperationKind::SnapshotCreate },
        vm: Some(vm.clone()),
        // One thing at a time is done with a VM, and its snapshots are part of it.
        subject: format!("vm/{vm}"),
        actor: caller.actor.clone(),
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    // A repeated request is answered whatever has become of the snapshot by now.
    if agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_ok() {
        return match agent.operations.begin(opening)? {
            Begun::Repeated(operation) => Ok(*operation),
            Begun::New(_) => Err(internal(&"the operation of this key was forgotten just now")),
        };
    }
    let desired = agent.vm_named(vm)?;
    let name = check(agent, &desired, change)?;
    let id = match agent.operations.begin(opening)? {
        Begun::Repeated(operation) => return Ok(*operation),
        Begun::New(id) => id,
    };
    let compress = matches!(change, Change::Create { compress: true, .. });
    let progress = Progress { vm: desired.id, name, removes, compress };
    let remembered = serde_json::to_value(&progress).map_err(|error| internal(&error));
    match remembered.and_then(|value| agent.operations.remember(id, value)) {
        Ok(()) => {
            let agent = Arc::clone(agent);
            tokio::spawn(async move {
                let result = perform(&agent, id, &progress).await;
                agent.operations.finish(id, result);
            });
        }
        Err(error) => agent.operations.finish(id, Err(error)),
    }
    agent.operations.get(id)
}

/// Whether it can be done now, and the snapshot's name.
fn check(agent: &Agent, vm: &DesiredVm, change: &Change) -> Result<Name, ApiError> {
    let (wanted, compress) = match change {
        Change::Remove(name) => return super::describe::one(agent, vm, name).map(|_| name.clone()),
        Change::Create { name, compress } => (name, *compress),
    };
    let state = state_of(agent, &vm.id);
    action::check_vm(Action::Snapshot, state, vm)?;
    let has_memory = matches!(state, VmState::Running | VmState::Paused);
    if compress && !has_memory {
        let text = format!("vm/{} is {}: a snapshot of it has no memory to compress", vm.name(), state.as_str());
        return Err(ApiError::new(ErrorCode::Conflict, text).hint("leave out --compress (`compress`), or start the VM"));
    }
    let name = match wanted {
        Some(name) => name.clone(),
        None => name_of(Timestamp::now())?,
    };
    if agent.store.snapshots(&vm.id).map_err(|error| store_error(&error))?.contains(&name) {
        return Err(store_error(&form_store::StoreError::SnapshotExists(name)));
    }
    let space = agent.store.space().map_err(|error| store_error(&error))?;
    if space.free < headroom::LOW {
        let text = format!("the host's disk is full: {} MiB are free under {}", space.free >> 20, agent.store.root().display());
        return Err(ApiError::new(ErrorCode::NoRoom, text).hint("remove snapshots with `form vm snapshot rm`, or images and VMs"));
    }
    volumes::check_create(agent, vm, &name, has_memory)?;
    Ok(name)
}

fn state_of(agent: &Agent, vm: &VmId) -> VmState {
    agent.fleet.observed(vm).map_or(VmState::Pending, |observed| observed.state)
}

/// `s20260131-120000`: in UTC, so that names sort by time.
///
/// # Errors
/// Never: it is a name.
pub fn name_of(now: Timestamp) -> Result<Name, ApiError> {
    now.strftime("s%Y%m%d-%H%M%S").to_string().parse().map_err(|error| internal(&error))
}

async fn perform(agent: &Arc<Agent>, id: OperationId, progress: &Progress) -> Result<(), ApiError> {
    let Progress { vm, name, removes, compress } = progress;
    let (vm, name) = (*vm, name.clone());
    if *removes {
        let of = name.clone();
        on_disk(agent, move |agent| agent.store.remove_snapshot(&vm, &of)).await?;
        return on_disk(agent, move |agent| Ok(volumes::remove_of(agent, &vm, &name))).await?;
    }
    let desired = agent.desired(&vm).ok_or_else(|| ApiError::new(ErrorCode::Conflict, "the VM was removed meanwhile"))?;
    let result = take::take(agent, id, &desired, &name, state_of(agent, &vm), *compress).await;
    if result.is_ok() && *compress {
        compress::compress(agent, id, vm, &name).await;
    }
    if agent.desired(&vm).is_none() {
        // It was destroyed meanwhile, perhaps before its snapshot got its name.
        on_disk(agent, move |agent| agent.store.remove_snapshots(&vm)).await?;
        on_disk(agent, move |agent| Ok(volumes::remove_of_vm(agent, &vm))).await??;
    }
    result
}

/// Work on files, where it may block.
pub(super) async fn on_disk<T: Send + 'static>(
    agent: &Arc<Agent>,
    work: impl FnOnce(&Agent) -> form_store::Result<T> + Send + 'static,
) -> Result<T, ApiError> {
    let agent = Arc::clone(agent);
    let done = tokio::task::spawn_blocking(move || work(&agent)).await.map_err(|error| internal(&error))?;
    done.map_err(|error| store_error(&error))
}

/// Ends what an earlier run of the agent left unfinished. What it left of a snapshot was removed when the store was opened, but for its parts
/// in pools, and its VM goes on by its driver.
pub fn resume(agent: &Arc<Agent>, record: &Record) {
    let id = record.operation.id;
    let progress: Option<Progress> = record.resume.clone().and_then(|resume| serde_json::from_value(resume).ok());
    let stopped = || ApiError::new(ErrorCode::Failed, "the agent was stopped in the middle of it, and nothing of it was kept");
    let unfinished = || Err(stopped().hint("run the same command again"));
    let result = match progress {
        None => unfinished(),
        Some(Progress { vm, name, removes: true, .. }) => {
            if agent.store.snapshots(&vm).is_ok_and(|names| !names.contains(&name)) {
                volumes::remove_of(agent, &vm, &name)
            } else {
                unfinished()
            }
        }
        Some(Progress { vm, name, removes: false, compress }) => {
            if find(agent, &vm, &name).is_ok_and(|(_, details)| details.operation == id) {
                if compress {
                    let agent = Arc::clone(agent);
                    tokio::spawn(async move {
                        compress::compress(&agent, id, vm, &name).await;
                        agent.operations.finish(id, Ok(()));
                    });
                    return;
                }
                Ok(())
            } else {
                volumes::remove_made_by(agent, id).and_then(|()| unfinished())
            }
        }
    };
    agent.operations.finish(id, result);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_the_time_is_a_name() {
        let name = name_of("2026-01-31T12:00:00Z".parse().unwrap()).unwrap();
        assert_eq!(name.as_str(), "s20260131-120000");
    }
}
