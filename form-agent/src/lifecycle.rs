//! Start, stop, restart and destroy: operations that record what should be and wait until it is.

use std::{sync::Arc, time::Duration};

use form_api::{
    ApiError, ErrorCode,
    operation::{Operation, OperationKind},
    vm::VmState,
};
use form_types::{Name, OperationId, VmId};
use tokio::time::Instant;

use crate::{
    agent::{Agent, internal},
    authorise::Caller,
    operation::{Begun, Opening},
};

/// How long the asked-for state may take: a stop includes the guest's own shutdown.
const PATIENCE: Duration = Duration::from_secs(120);

/// # Errors
/// Not found, another operation under way, or the database's.
pub fn begin(agent: &Arc<Agent>, caller: &Caller, name: &Name, kind: OperationKind) -> Result<Operation, ApiError> {
    let opening = Opening {
        kind,
        vm: Some(name.clone()),
        subject: format!("vm/{name}"),
        actor: caller.actor.clone(),
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request,
    };
    // A repeated request is answered even when the VM is gone by now: that may be what it asked for.
    let vm = agent.vm_named(name);
    if let Err(error) = &vm
        && !is_known(agent, caller)
    {
        return Err(error.clone());
    }
    let id = match agent.operations.begin(opening)? {
        Begun::Repeated(operation) => return Ok(*operation),
        Begun::New(id) => id,
    };
    match vm.and_then(|vm| record(agent, caller, &vm.id, kind).map(|()| vm.id)) {
        Ok(vm) => {
            agent.fleet.reconcile(agent);
            let agent = Arc::clone(agent);
            tokio::spawn(async move { agent.operations.finish(id, reached(&agent, &vm, kind).await) });
        }
        Err(error) => agent.operations.finish(id, Err(error)),
    }
    agent.operations.get(id)
}

fn is_known(agent: &Agent, caller: &Caller) -> bool {
    agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_ok()
}

fn record(agent: &Agent, caller: &Caller, vm: &VmId, kind: OperationKind) -> Result<(), ApiError> {
    let running = agent.fleet.observed(vm).is_some_and(|observed| matches!(observed.state, VmState::Running | VmState::Starting));
    if kind == OperationKind::VmStart && running {
        return Ok(());
    }
    agent.submit(&caller.signed)
}

/// Waits until the VM is as the operation wants it.
async fn reached(agent: &Agent, vm: &VmId, kind: OperationKind) -> Result<(), ApiError> {
    let mut changed = agent.fleet.subscribe();
    let deadline = Instant::now() + PATIENCE.max(Duration::from_secs(agent.config().boot_timeout_seconds));
    loop {
        let observed = agent.fleet.observed(vm);
        let boot = agent.desired(vm).map(|desired| desired.boot_digest());
        let done = match (kind, &observed) {
            (OperationKind::VmDestroy, None) => true,
            (OperationKind::VmStop, Some(observed)) => observed.state == VmState::Stopped,
            (OperationKind::VmStart | OperationKind::VmRestart, Some(observed)) => {
                if observed.boot == boot && observed.gave_up {
                    let fault = observed.fault.clone().unwrap_or_else(|| "it has ended".to_owned());
                    return Err(ApiError::new(ErrorCode::Failed, fault).hint("see `form logs`"));
                }
                observed.boot == boot && observed.state == VmState::Running && observed.ready
            }
            _ => false,
        };
        if done {
            return Ok(());
        }
        if boot.is_none() && kind != OperationKind::VmDestroy {
            return Err(ApiError::new(ErrorCode::Conflict, "the VM was removed meanwhile"));
        }
        if tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
            let state = observed.map_or("gone", |observed| observed.state.as_str());
            return Err(ApiError::new(ErrorCode::TimedOut, format!("it is still {state}")).hint("see `form events` and `form logs`"));
        }
    }
}

/// Goes on with what an earlier run of the agent left unfinished: what it recorded is what the drivers work towards already.
pub fn resume(agent: &Arc<Agent>, id: OperationId, subject: &str, kind: OperationKind) {
    let name: Option<Name> = subject.strip_prefix("vm/").and_then(|name| name.parse().ok());
    let vm = name.and_then(|name| agent.vm_named(&name).ok());
    match (vm, kind) {
        (None, OperationKind::VmDestroy) => agent.operations.finish(id, Ok(())),
        (None, _) => agent.operations.finish(id, Err(internal(&"the VM is gone"))),
        // Not recorded: a recorded one would not be in the state any more.
        (Some(_), OperationKind::VmDestroy) => {
            let error =
                ApiError::new(ErrorCode::Failed, "the agent was stopped before it changed anything").hint("run the same command again");
            agent.operations.finish(id, Err(error));
        }
        (Some(vm), _) => {
            let agent = Arc::clone(agent);
            tokio::spawn(async move { agent.operations.finish(id, reached(&agent, &vm.id, kind).await) });
        }
    }
}
