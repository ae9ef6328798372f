//! Start, stop, pause and the like: operations that record what should be and wait until it is.

use std::{sync::Arc, time::Duration};

use form_api::{
    ApiError, ErrorCode,
    deploy::DeployRequest,
    operation::{Operation, OperationKind},
    snapshot::RestoreRequest,
    vm::{SetRequest, VmState},
};
use form_types::{Digest, Failpoint, Name, OperationId, VmId, VmLimits, failpoint::reach};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    action::{self, Action},
    admit,
    agent::{Agent, internal},
    authorise::Caller,
    desired::{self, DesiredVm, Run},
    driver::{live, process::RuntimeDirectory},
    fleet::Observed,
    kept, limits, memory,
    operation::{Begun, Opening, Record},
    snapshot, vcpus,
};

/// How long the asked-for state may take: a stop includes the guest's own shutdown.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes of memory that are unfolded in a second on a slow host.
const UNFOLDED_A_SECOND: u64 = 16 << 20;

/// What is asked of a VM that exists.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Change {
    Start,
    Stop,
    Restart,
    Pause,
    Resume,
    Reset,
    Destroy,
    Rename(Name),
    Set(SetRequest),
    Restore(RestoreRequest),
}

impl Change {
    const fn kind(&self) -> OperationKind {
        match self {
            Self::Start => OperationKind::VmStart,
            Self::Stop => OperationKind::VmStop,
            Self::Restart => OperationKind::VmRestart,
            Self::Pause => OperationKind::VmPause,
            Self::Resume => OperationKind::VmResume,
            Self::Reset => OperationKind::VmReset,
            Self::Destroy => OperationKind::VmDestroy,
            Self::Rename(_) => OperationKind::VmRename,
            Self::Set(_) => OperationKind::VmSet,
            Self::Restore(_) => OperationKind::VmRestore,
        }
    }

    const fn action(&self) -> Action {
        match self {
            Self::Start => Action::Start,
            Self::Stop => Action::Stop,
            Self::Restart => Action::Restart,
            Self::Pause => Action::Pause,
            Self::Resume => Action::Resume,
            Self::Reset => Action::Reset,
            Self::Destroy => Action::Destroy,
            Self::Rename(_) => Action::Rename,
            Self::Set(set) if set.needs_start() => Action::Resize,
            Self::Set(_) => Action::Set,
            Self::Restore(_) => Action::Restore,
        }
    }
}

/// What is remembered of a change under way.
#[derive(Clone, Serialize, Deserialize)]
struct Progress {
    vm: VmId,
    change: Change,
    /// What it was last started from before.
    boot: Digest,
}

/// # Errors
/// Not found, not in this state, another operation under way, or the database's.
pub fn begin(agent: &Arc<Agent>, caller: &Caller, name: &Name, change: Change) -> Result<Operation, ApiError> {
    agent.use_headroom();
    let opening = Opening {
        kind: change.kind(),
        vm: Some(name.clone()),
        subject: format!("vm/{name}"),
        actor: caller.actor.clone(),
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    // A repeated request is answered even when the VM is gone by now: that may be what it asked for.
    if is_known(agent, caller) {
        if let Begun::Repeated(operation) = agent.operations.begin(opening)? {
            return Ok(*operation);
        }
        return Err(internal(&"the operation of this key was forgotten just now"));
    }
    let vm = agent.vm_named(name)?;
    let needed = check(agent, &vm, &change)?;
    let live = if let Change::Set(set) = &change { live_vcpus(agent, &vm, set)? } else { None };
    let id = match agent.operations.begin(opening)? {
        Begun::Repeated(operation) => return Ok(*operation),
        Begun::New(id) => id,
    };
    let progress = Progress { vm: vm.id, boot: vm.boot_digest(), change };
    let recorded = match live {
        Some(live) => remember(agent, id, &progress).map(|()| {
            let (agent, caller) = (Arc::clone(agent), caller.clone());
            tokio::spawn(async move {
                let result = change_live(&agent, &caller, id, &progress, live).await;
                finish(&agent, &caller, id, &progress, result).await;
            });
        }),
        None => record(agent, caller, id, &progress, needed).map(|()| {
            let (agent, caller) = (Arc::clone(agent), caller.clone());
            agent.fleet.reconcile(&agent);
            tokio::spawn(async move { finish(&agent, &caller, id, &progress, Ok(())).await });
        }),
    };
    if let Err(error) = recorded {
        agent.operations.finish(id, Err(error));
    }
    agent.operations.get(id)
}

/// Waits until the VM is as what was `recorded` wants it.
async fn finish(agent: &Arc<Agent>, caller: &Caller, id: OperationId, progress: &Progress, recorded: Result<(), ApiError>) {
    let result = match recorded {
        Ok(()) => reached(agent, id, progress).await,
        Err(error) => Err(error),
    };
    if let (Ok(()), Change::Set(_)) = (&result, &progress.change) {
        kept::keep_change(agent, &progress.vm, &caller.signed);
    }
    agent.operations.finish(id, settled(agent, progress, result).await);
}

/// Changes the VM that runs, and records that.
async fn change_live(agent: &Arc<Agent>, caller: &Caller, id: OperationId, progress: &Progress, live: vcpus::Live) -> Result<(), ApiError> {
    let Change::Set(set) = &progress.change else { return Ok(()) };
    let vm = agent.desired(&progress.vm).ok_or_else(gone)?;
    let changed = desired::with_set(&vm.request, set).map_err(|message| ApiError::new(ErrorCode::Invalid, message))?;
    // Again when it is recorded; but what there is no room for the guest is not given.
    admit::admit(&changed, false, &agent.capacity(Some(vm.name()))?)?;
    let (task_agent, caller, progress) = (Arc::clone(agent), caller.clone(), progress.clone());
    let change = move || vcpus::change(&task_agent, &vm, &changed, live, || record(&task_agent, &caller, id, &progress, true));
    tokio::task::spawn_blocking(change).await.map_err(|error| internal(&error))??;
    agent.fleet.reconcile(agent);
    Ok(())
}

fn is_known(agent: &Agent, caller: &Caller) -> bool {
    agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_ok()
}

/// Whether there is something to do.
fn check(agent: &Agent, vm: &DesiredVm, change: &Change) -> Result<bool, ApiError> {
    let state = agent.fleet.observed(&vm.id).map_or(VmState::Pending, |observed| observed.state);
    let needed = action::check_vm(change.action(), state, vm)?;
    match change {
        Change::Rename(new) if new == vm.name() => return Ok(false),
        Change::Rename(new) if desired::vm_named(&agent.view(), new).is_some() => {
            return Err(ApiError::new(ErrorCode::Conflict, format!("there is a vm/{new} already")).hint("choose another name"));
        }
        Change::Set(set) => {
            if set.is_empty() {
                return Err(ApiError::new(ErrorCode::Invalid, "nothing is to be set")
                    .hint("say what: labels, restart policy, vcpus, memory, limits"));
            }
            let changed = desired::with_set(&vm.request, set).map_err(|message| ApiError::new(ErrorCode::Invalid, message))?;
            admit::check_labels(&changed, Some(&vm.request))?;
            if (set.disk_iops.is_some() || set.disk_bytes_per_second.is_some()) && !vm.request.has_guest() {
                return Err(action::no_guest(vm.name(), "and has no root disk to limit").hint("limit its volumes with `form volume set`"));
            }
            may_start(agent, vm, &changed, state, set.restart)?;
            return Ok(changed != vm.request || with_limits(vm, set)? != vm.limits);
        }
        Change::Restore(request) => return snapshot::restore::check(agent, vm, &request.snapshot).map(|_| true),
        _ => {}
    }
    Ok(needed)
}

/// Why what runs has to be started again to be `changed`: the end of a sentence.
fn needs_start(agent: &Agent, vm: &DesiredVm, changed: &DeployRequest, state: VmState) -> Option<String> {
    let (new, old) = (&changed.spec.resources, &vm.request.spec.resources);
    match state {
        _ if new == old => None,
        VmState::Starting => Some("vCPUs and memory change with a start until its guest is ready".to_owned()),
        VmState::Running if !vm.request.has_guest() => {
            Some("it runs a kernel of its own without Formation's guest, so that vCPUs and memory change with a start".to_owned())
        }
        VmState::Running => {
            let vcpus = if new.vcpus == old.vcpus { Ok(()) } else { vcpus::check(agent, vm, new.vcpus) };
            let memory = |()| if new.memory_mib == old.memory_mib { Ok(()) } else { memory::check(agent, vm, new.memory_mib) };
            vcpus.and_then(memory).err()
        }
        _ => None,
    }
}

/// Whether the change comes without a start; one that does not is a conflict unless a start `is_allowed`.
fn may_start(agent: &Agent, vm: &DesiredVm, changed: &DeployRequest, state: VmState, is_allowed: bool) -> Result<bool, ApiError> {
    let name = vm.name();
    match needs_start(agent, vm, changed, state) {
        None => Ok(true),
        Some(_) if is_allowed => Ok(false),
        Some(reason) => Err(ApiError::new(ErrorCode::Conflict, format!("vm/{name} is {}, and {reason}", state.as_str()))
            .hint(format!("add --restart, or stop it before with `form vm stop {name}`"))),
    }
}

/// The vCPUs that a VM that runs gets or gives back without a start; none when nothing of this is asked, or a start brings them.
fn live_vcpus(agent: &Agent, vm: &DesiredVm, set: &SetRequest) -> Result<Option<vcpus::Live>, ApiError> {
    let changed = desired::with_set(&vm.request, set).map_err(|message| ApiError::new(ErrorCode::Invalid, message))?;
    let state = agent.fleet.observed(&vm.id).map_or(VmState::Pending, |observed| observed.state);
    let vcpus = changed.spec.resources.vcpus;
    let differ = vcpus != vm.request.spec.resources.vcpus && state == VmState::Running;
    let without_start = differ && may_start(agent, vm, &changed, state, set.restart)?;
    Ok(without_start.then_some(vcpus::Live { vcpus }))
}

/// Gives a VM that runs the memory that it should have from now on, if it can. Whatever else needs a start brings that memory, too.
fn give_memory(agent: &Agent, vm: &DesiredVm, changed: &DeployRequest, restart: bool) -> Result<(), ApiError> {
    let state = agent.fleet.observed(&vm.id).map_or(VmState::Pending, |observed| observed.state);
    let memory_mib = changed.spec.resources.memory_mib;
    // Again: it may have been otherwise a moment ago.
    let without_start = may_start(agent, vm, changed, state, restart)?;
    let differs = memory_mib != vm.request.spec.resources.memory_mib && state == VmState::Running;
    if differs && without_start { memory::give(agent, vm, memory_mib) } else { Ok(()) }
}

fn with_limits(vm: &DesiredVm, set: &SetRequest) -> Result<VmLimits, ApiError> {
    desired::with_limits(vm.limits, set).map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))
}

fn remember(agent: &Agent, id: OperationId, progress: &Progress) -> Result<(), ApiError> {
    agent.operations.remember(id, serde_json::to_value(progress).map_err(|error| internal(&error))?)
}

fn record(agent: &Arc<Agent>, caller: &Caller, id: OperationId, progress: &Progress, needed: bool) -> Result<(), ApiError> {
    remember(agent, id, progress)?;
    if !needed {
        return Ok(());
    }
    // Two that want one name, or the last free memory, do not both get it; and a deploy that puts its old version back looks whether
    // the VM is still wanted.
    let _admission = agent.admission();
    if let Change::Set(set) = &progress.change {
        let vm = agent.desired(&progress.vm).ok_or_else(gone)?;
        let changed = desired::with_set(&vm.request, set).map_err(|message| ApiError::new(ErrorCode::Invalid, message))?;
        admit::check_labels(&changed, Some(&vm.request))?;
        admit::admit(&changed, false, &agent.capacity(Some(vm.name()))?)?;
        give_memory(agent, &vm, &changed, set.restart)?;
    }
    if let Err(error) = agent.submit(&caller.signed) {
        if matches!(progress.change, Change::Set(_)) {
            tokio::spawn(memory::reconcile(Arc::clone(agent), progress.vm));
        }
        return Err(error);
    }
    reach(Failpoint::LifecycleSubmitted);
    Ok(())
}

fn gone() -> ApiError {
    ApiError::new(ErrorCode::Conflict, "the VM was removed meanwhile")
}

/// Waits until the VM is as the operation wants it.
async fn reached(agent: &Arc<Agent>, id: OperationId, progress: &Progress) -> Result<(), ApiError> {
    let (vm, change) = (&progress.vm, &progress.change);
    if matches!(change, Change::Rename(_)) {
        agent.apply_rules().await.map_err(|error| internal(&error))?;
    }
    if matches!(change, Change::Rename(_) | Change::Set(_)) {
        tell_guest(agent, vm).await;
    }
    if let (Change::Set(set), Some(desired)) = (change, agent.desired(vm))
        && set.limits()
    {
        let told_agent = Arc::clone(agent);
        let told = tokio::task::spawn_blocking(move || limits::of_vm_itself(&told_agent, &desired)).await;
        told.map_err(|error| internal(&error))??;
    }
    let mut changed = agent.fleet.subscribe();
    let mut patience = PATIENCE.max(Duration::from_secs(agent.config().boot_timeout_seconds));
    if let Change::Restore(request) = change
        && let Some(bytes) = snapshot::restore::to_unfold(agent, vm, &request.snapshot)
    {
        agent.operations.step(id, format!("unfolding {} MiB of memory, and going back", bytes.div_ceil(1 << 20)));
        patience += Duration::from_secs(bytes / UNFOLDED_A_SECOND);
    }
    let deadline = Instant::now() + patience;
    loop {
        let observed = agent.fleet.observed(vm);
        let desired = agent.desired(vm);
        if let (Change::Restore(request), Some(vm)) = (change, &desired)
            && let Some(fault) = snapshot::restore::fault(agent, vm)
        {
            let text = format!("the snapshot `{}` was not restored: {fault}", request.snapshot);
            return Err(ApiError::new(ErrorCode::Failed, text).hint("the VM is on the disk that it had; see `form ps` and `form events`"));
        }
        if is_reached(progress, desired.as_ref(), observed.as_ref())? {
            return Ok(());
        }
        if tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
            let state = observed.map_or("gone", |observed| observed.state.as_str());
            return Err(ApiError::new(ErrorCode::TimedOut, format!("it is still {state}")).hint("see `form events` and `form logs`"));
        }
    }
}

/// After that, what only its guest can do.
async fn settled(agent: &Arc<Agent>, progress: &Progress, reached: Result<(), ApiError>) -> Result<(), ApiError> {
    match (reached, &progress.change, agent.desired(&progress.vm)) {
        (Ok(()), Change::Set(set), Some(vm)) if set.memory_mib.is_some() => memory::settled(agent, &vm).await,
        (reached, ..) => reached,
    }
}

/// Waits until a VM that was made and not started is there, or somebody has started it.
///
/// # Errors
/// A conflict when it was removed meanwhile, and when it takes too long.
pub async fn stopped(agent: &Agent, vm: &VmId) -> Result<(), ApiError> {
    let mut changed = agent.fleet.subscribe();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let desired = agent.desired(vm).ok_or_else(gone)?;
        let is_stopped = agent.fleet.observed(vm).is_some_and(|observed| observed.state == VmState::Stopped);
        if is_stopped || desired.run != Run::Stopped {
            return Ok(());
        }
        if tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
            return Err(ApiError::new(ErrorCode::TimedOut, "it is not there yet").hint("see `form events`"));
        }
    }
}

fn is_reached(progress: &Progress, desired: Option<&DesiredVm>, observed: Option<&Observed>) -> Result<bool, ApiError> {
    let (desired, observed) = match (&progress.change, desired, observed) {
        (Change::Destroy, _, observed) => return Ok(observed.is_none()),
        (_, Some(desired), Some(observed)) => (desired, observed),
        (_, Some(_), None) => return Ok(false),
        (_, None, _) => return Err(gone()),
    };
    let boot = desired.boot_digest();
    let runs = || {
        if observed.boot == Some(boot) && observed.gave_up {
            let fault = observed.fault.clone().unwrap_or_else(|| "it has ended".to_owned());
            return Err(ApiError::new(ErrorCode::Failed, fault).hint("see `form logs`"));
        }
        let is_up = observed.ready || !desired.request.has_guest();
        Ok(observed.boot == Some(boot) && observed.state == VmState::Running && is_up)
    };
    match &progress.change {
        Change::Destroy => Ok(false),
        Change::Stop => Ok(observed.state == VmState::Stopped),
        Change::Start | Change::Restart | Change::Reset | Change::Restore(_) => runs(),
        Change::Pause if matches!(observed.state, VmState::Stopped | VmState::Failed) => {
            let fault = observed.fault.clone().unwrap_or_else(|| "it has ended".to_owned());
            Err(ApiError::new(ErrorCode::Failed, format!("it ended before it was paused: {fault}")))
        }
        Change::Pause => Ok(observed.state == VmState::Paused),
        // A VM whose guest is yet to be heard of goes on, too.
        Change::Resume => Ok(matches!(observed.state, VmState::Running | VmState::Starting | VmState::Stopped | VmState::Failed)),
        Change::Rename(_) => Ok(true),
        Change::Set(_) if boot == progress.boot || desired.run == Run::Stopped => Ok(true),
        Change::Set(_) => runs(),
    }
}

/// What has changed in a running VM. A guest that does not take it has it from its next start on.
async fn tell_guest(agent: &Agent, vm: &VmId) {
    let Some(desired) = agent.desired(vm).filter(|vm| vm.request.has_guest()) else { return };
    if agent.fleet.observed(vm).is_some_and(|observed| observed.state == VmState::Running) {
        let control = RuntimeDirectory::new(&agent.paths().vm_runtime(), vm).control();
        if let Err(error) = live::settings(&control, agent, &desired).await {
            tracing::warn!(vm = %vm, "the guest does not take its new name and restart policy, it gets them at its next start: {error}");
        }
    }
}

/// Goes on with what an earlier run of the agent left unfinished: what it recorded is what the drivers work towards already.
pub fn resume(agent: &Arc<Agent>, record: &Record) {
    let id = record.operation.id;
    let nothing_done = || {
        let error = ApiError::new(ErrorCode::Failed, "the agent was stopped before it changed anything").hint("run the same command again");
        agent.operations.finish(id, Err(error));
    };
    let progress: Option<Progress> = record.resume.clone().and_then(|resume| serde_json::from_value(resume).ok());
    let Some(progress) = progress else { return nothing_done() };
    match (agent.desired(&progress.vm), &progress.change) {
        // Its driver may still be at work on what is left.
        (None, Change::Destroy) => {
            let agent = Arc::clone(agent);
            tokio::spawn(async move { agent.operations.finish(id, reached(&agent, id, &progress).await) });
        }
        (None, _) => agent.operations.finish(id, Err(gone())),
        (Some(vm), change) if !is_recorded(&vm, change, &progress.boot) => nothing_done(),
        (Some(_), _) => {
            let agent = Arc::clone(agent);
            tokio::spawn(async move {
                let result = reached(&agent, id, &progress).await;
                agent.operations.finish(id, settled(&agent, &progress, result).await);
            });
        }
    }
}

/// Whether the state has what the change asks for.
fn is_recorded(vm: &DesiredVm, change: &Change, boot: &Digest) -> bool {
    match change {
        Change::Start | Change::Resume => vm.run == Run::Running,
        Change::Stop => vm.run == Run::Stopped,
        Change::Pause => vm.run == Run::Paused,
        Change::Restart | Change::Reset | Change::Restore(_) => vm.boot_digest() != *boot,
        Change::Rename(name) => vm.name() == name,
        Change::Set(set) => {
            desired::with_set(&vm.request, set).is_ok_and(|changed| changed == vm.request)
                && desired::with_limits(vm.limits, set) == Ok(vm.limits)
        }
        // A recorded one would not be in the state any more.
        Change::Destroy => false,
    }
}

#[cfg(test)]
mod tests;
