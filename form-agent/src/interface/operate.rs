//! Operations on the interfaces of VMs: recorded, done, and after a crash finished or taken back.

use std::sync::{Arc, PoisonError};

use form_api::{
    ApiError, ErrorCode,
    operation::{Operation, OperationKind},
    vm::VmState,
};
use form_types::{Failpoint, Name, OperationId, VmId, failpoint::reach};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::{live, name_of, rules};
use crate::{
    action::{self, Action},
    agent::{Agent, internal},
    authorise::{self, Caller, SignedRequest},
    desired::DesiredVm,
    operation::{Begun, Opening, Record},
    volume::live::is_possible,
};

/// What is asked of the interfaces of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Change {
    Attach,
    Detach { interface: String, force: bool },
}

/// What is remembered of a change under way.
#[derive(Clone, Serialize, Deserialize)]
struct Progress {
    vm: VmId,
    change: Change,
    /// The numbers of the interfaces that it had.
    before: Vec<u8>,
    request: SignedRequest,
}

/// Begins a change of the VM `name`.
///
/// # Errors
/// What stands in the way before anything is changed.
pub fn begin(agent: &Arc<Agent>, caller: &Caller, name: &Name, change: Change) -> Result<Operation, ApiError> {
    agent.use_headroom();
    let kind = match &change {
        Change::Attach => OperationKind::InterfaceAttach,
        Change::Detach { .. } => OperationKind::InterfaceDetach,
    };
    let opening = Opening {
        kind,
        vm: Some(name.clone()),
        subject: format!("vm/{name}"),
        actor: caller.actor.clone(),
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    // A repeated request is answered whatever has become of the VM by now.
    if agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_err() {
        check(agent, &agent.vm_named(name)?, &change)?;
    }
    let id = match agent.operations.begin(opening)? {
        Begun::Repeated(operation) => return Ok(*operation),
        Begun::New(id) => id,
    };
    let remembered = agent.vm_named(name).and_then(|vm| {
        let progress = Progress { vm: vm.id, change, before: vm.interfaces.into_keys().collect(), request: caller.signed.clone() };
        agent.operations.remember(id, serde_json::to_value(&progress).map_err(|error| internal(&error))?)?;
        Ok(progress)
    });
    match remembered {
        Ok(progress) => {
            let task_agent = Arc::clone(agent);
            tokio::task::spawn_blocking(move || {
                let result = perform(&task_agent, &progress);
                task_agent.operations.finish(id, result);
            });
        }
        Err(error) => agent.operations.finish(id, Err(error)),
    }
    agent.operations.get(id)
}

/// Whether it can be done now.
fn check(agent: &Agent, vm: &DesiredVm, change: &Change) -> Result<(), ApiError> {
    if vm.host != agent.host_id() {
        let text = format!("vm/{} is another host's", vm.name());
        return Err(ApiError::new(ErrorCode::Conflict, text).hint("ask that host"));
    }
    let state = state(agent, vm);
    action::check_vm(Action::Plug, state, vm)?;
    if !vm.request.has_guest() && state != VmState::Stopped {
        let refused = action::no_guest(vm.name(), "which takes interfaces and gives them back while it runs");
        return Err(refused.hint(format!("stop it before: `form vm stop {}`", vm.name())));
    }
    if state == VmState::Running && !is_possible(agent, &vm.id) {
        let text = format!("vm/{} runs, and its guest has not said that it is ready", vm.name());
        return Err(ApiError::new(ErrorCode::Conflict, text).hint(format!("wait for it with `form wait vm/{} --for=ready`", vm.name())));
    }
    match change {
        Change::Attach => rules::next_number(vm).map(drop),
        Change::Detach { interface, .. } => rules::detachable(vm, interface).map(drop),
    }
}

fn state(agent: &Agent, vm: &DesiredVm) -> VmState {
    agent.fleet.observed(&vm.id).map_or(VmState::Pending, |observed| observed.state)
}

fn gone() -> ApiError {
    ApiError::new(ErrorCode::Conflict, "the VM was removed meanwhile")
}

fn perform(agent: &Arc<Agent>, progress: &Progress) -> Result<(), ApiError> {
    let turn = agent.volumes_of(&progress.vm);
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    let desired = || agent.desired(&progress.vm).ok_or_else(gone);
    let vm = desired()?;
    match &progress.change {
        Change::Attach => {
            submit(agent, progress)?;
            let vm = desired()?;
            let Some(number) = vm.interfaces.keys().copied().find(|number| !progress.before.contains(number)) else { return Ok(()) };
            if is_possible(agent, &vm.id) {
                live::plug(agent, &vm, number).inspect_err(|_| take_back(agent, &vm, number))?;
            }
            Ok(())
        }
        Change::Detach { interface, force } => {
            let number = rules::detachable(&vm, interface)?;
            if is_possible(agent, &vm.id) {
                live::unplug(agent, &vm, number, *force)?;
            }
            submit(agent, progress)?;
            Handle::current().block_on(agent.apply_rules()).map_err(|error| internal(&error))
        }
    }
}

/// Writes down what should be.
fn submit(agent: &Agent, progress: &Progress) -> Result<(), ApiError> {
    // Two do not get one address.
    let _admission = agent.admission();
    let vm = agent.desired(&progress.vm).ok_or_else(gone)?;
    match &progress.change {
        Change::Attach => rules::next_number(&vm).map(drop)?,
        Change::Detach { interface, .. } => rules::detachable(&vm, interface).map(drop)?,
    }
    agent.submit(&progress.request)?;
    reach(Failpoint::InterfaceSubmitted);
    Ok(())
}

/// What a running VM could not be given it does not have. One that has it all the same keeps it as it is written down.
fn take_back(agent: &Agent, vm: &DesiredVm, number: u8) {
    if live::held(agent, &vm.id).is_some_and(|held| held.contains(&number)) {
        return;
    }
    let path = format!("/v1/vms/{}/interfaces/{}/detach", vm.name(), name_of(number));
    let taken_back = authorise::own(agent, "POST", &path, "").and_then(|request| agent.submit(&request));
    if let Err(error) = taken_back {
        tracing::warn!(vm = %vm.id, "{} stays written down: {error}", name_of(number));
    }
    if let Err(error) = Handle::current().block_on(agent.apply_rules()) {
        tracing::warn!(vm = %vm.id, "the firewall knows {} until the next change: {error}", name_of(number));
    }
}

/// Ends what an earlier run of the agent left unfinished: what the state knows is done, or will be when the guest is next heard of.
pub fn resume(agent: &Arc<Agent>, record: &Record) {
    let nothing_changed =
        || ApiError::new(ErrorCode::Failed, "the agent was stopped before it changed anything").hint("run the same command again");
    let progress: Option<Progress> = record.resume.clone().and_then(|resume| serde_json::from_value(resume).ok());
    let result = progress.ok_or_else(nothing_changed).and_then(|progress| {
        let vm = agent.desired(&progress.vm).ok_or_else(gone)?;
        let is_done = match &progress.change {
            Change::Attach => vm.interfaces.keys().any(|number| !progress.before.contains(number)),
            Change::Detach { interface, .. } => rules::detachable(&vm, interface).is_err(),
        };
        if is_done { Ok(()) } else { Err(nothing_changed()) }
    });
    agent.operations.finish(record.operation.id, result);
}
