//! A deploy from the request to a healthy VM, or back to what was there before.

use std::{sync::Arc, time::Duration};

use form_api::{
    ApiError, ErrorCode,
    deploy::{DeployRequest, ForkOf, Plan},
    operation::Operation,
    vm::{Health, VmState},
};
use form_types::{Digest, Failpoint, Name, OperationId, VmId, failpoint::reach};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    admit,
    agent::{Agent, internal},
    authorise::{Caller, SignedRequest},
    create::{self, How, Origin, Wanted},
    desired::{self, DesiredVm},
    kept::{self, Previous},
    lifecycle, logs,
    operation::{Begun, Opening, Record},
    plan, volume,
};

/// Lines of the log in the error of a deploy that failed.
const LOG_TAIL: usize = 20;

/// A service that ended so often during its own deploy will not become healthy.
const MAX_RESTARTS: u32 = 3;

/// What is remembered of a deploy under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Progress {
    vm: VmId,
    /// What is being deployed.
    request: SignedRequest,
    /// The state holds what was asked for; before that nothing was changed.
    recorded: bool,
    /// What ran before, to go back to.
    previous: Option<Previous>,
    /// It failed, and the way back has begun.
    #[serde(default)]
    failed: Option<Failed>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Failed {
    /// The start that failed.
    boot: Digest,
    error: ApiError,
}

/// # Errors
/// What the host cannot do, or has no room for.
pub fn make_plan(agent: &Agent, request: &DeployRequest) -> Result<Plan, ApiError> {
    admit::check_valid(request)?;
    admit::check_supported(request)?;
    let before = desired::vm_named(&agent.view(), &request.spec.name);
    admit::check_labels(request, before.as_ref().map(|vm| &vm.request))?;
    admit::admit(request, before.is_none(), &agent.capacity(Some(&request.spec.name))?)?;
    let mut plan = plan::plan(before.as_ref().map(|vm| &vm.request), request, &|image| agent.root_of(image));
    let of_volumes = volume::operate::of_deploy(agent, request)?;
    for planned in &mut plan.vms {
        volume::plan::add(planned, request, &of_volumes);
    }
    let state = before.and_then(|vm| agent.fleet.observed(&vm.id)).map(|observed| observed.state);
    if plan.is_unchanged() && state == Some(VmState::Failed) {
        plan::try_again(&mut plan);
    }
    Ok(plan)
}

/// Records the operation and what should be, and leaves the rest to the driver and a task that watches it.
///
/// # Errors
/// Whatever stands in the way before anything is changed.
pub fn begin(agent: &Arc<Agent>, caller: &Caller, wanted: Wanted) -> Result<Operation, ApiError> {
    let request = &wanted.request;
    admit::check_valid(request)?;
    admit::check_supported(request)?;
    // A repeated request is answered although the VM that it asked for is there by now.
    if agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_err() {
        create::check(agent, &wanted)?;
        check_labels(agent, &wanted)?;
        check_parts(agent, &wanted)?;
    }
    agent.keep_headroom();
    let name = wanted.name();
    let opening = Opening {
        kind: wanted.kind(),
        vm: Some(name.clone()),
        subject: format!("vm/{name}"),
        actor: caller.actor.clone(),
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    let id = match agent.operations.begin(opening)? {
        Begun::Repeated(operation) => return Ok(*operation),
        Begun::New(id) => id,
    };
    if matches!(wanted.origin(), Origin::Disk(_) | Origin::Snapshot(_)) {
        // A copy may take its time.
        let (agent, caller) = (Arc::clone(agent), caller.clone());
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || {
            let _entered = runtime.enter();
            carry_out(&agent, &caller, &wanted, id);
        });
    } else {
        carry_out(agent, caller, &wanted, id);
    }
    agent.operations.get(id)
}

fn carry_out(agent: &Arc<Agent>, caller: &Caller, wanted: &Wanted, id: OperationId) {
    match record(agent, caller, wanted, id) {
        Ok(target) => {
            agent.fleet.reconcile(agent);
            let agent = Arc::clone(agent);
            tokio::spawn(async move { finish(&agent, id, target).await });
        }
        Err(error) => agent.operations.finish(id, Err(error)),
    }
}

/// What was so before may be so again: of the VM itself, and of the one that it is a copy of.
fn check_labels(agent: &Agent, wanted: &Wanted) -> Result<(), ApiError> {
    let before = match wanted.origin() {
        _ if wanted.how == How::Rollback => return Ok(()),
        Origin::Disk(source) | Origin::Snapshot(ForkOf { vm: source, .. }) => source,
        Origin::Image | Origin::Kernel(_) => wanted.name(),
    };
    admit::check_labels(&wanted.request, desired::vm_named(&agent.view(), before).map(|vm| vm.request).as_ref())
}

fn check_parts(agent: &Agent, wanted: &Wanted) -> Result<(), ApiError> {
    let request = &wanted.request;
    let missing = |what: &str| {
        let name = wanted.name();
        let hint = match wanted.how {
            How::Rollback => format!("see what is left with `form rollback {name} --list`, or build that version again and deploy it"),
            How::Create { origin: Origin::Kernel(_), .. } => "run `form vm create --kernel`, which uploads it".to_owned(),
            How::Deploy | How::Create { .. } => "run `form deploy`, which uploads it".to_owned(),
        };
        Err(ApiError::new(ErrorCode::NotFound, format!("the host does not have {what}")).hint(hint))
    };
    if let Some(image) = request.image()
        && agent.store.by_digest(image).is_err()
    {
        return missing(&format!("the image {}", image.short()));
    }
    // What is asked for may take its time: meanwhile nobody removes it.
    let Ok(kernel) = agent.store.want_kernel(&request.kernel) else {
        return missing(&format!("the kernel bundle {}", request.kernel.short()));
    };
    if request.has_guest() { Ok(()) } else { create::check_kernel(&kernel) }
}

/// Where a deploy leads: the VM, the start that it waits for, and the way back.
struct Target {
    vm: VmId,
    name: Name,
    boot: Digest,
    request: SignedRequest,
    previous: Option<Previous>,
    /// A VM that is not to be started has only to be there.
    is_started: bool,
}

fn record(agent: &Agent, caller: &Caller, wanted: &Wanted, id: OperationId) -> Result<Target, ApiError> {
    let (name, request) = (wanted.name(), &wanted.request);
    let new = VmId::derive(&caller.key, &caller.idempotency_key, name.as_str());
    let made = match wanted.origin() {
        Origin::Disk(source) => {
            agent.operations.step(id, format!("copying the disk of vm/{source}"));
            Some(create::copy_disk(agent, source, new, request)?)
        }
        Origin::Snapshot(fork) => Some(create::share_snapshot(agent, fork, new, request)?),
        Origin::Image | Origin::Kernel(_) => None,
    };
    let _admission = agent.admission();
    let before = desired::vm_named(&agent.view(), name);
    if matches!(wanted.how, How::Create { .. }) {
        create::is_new(before.as_ref())?;
    }
    // Somebody may have removed them since it was asked for.
    check_parts(agent, wanted)?;
    admit::admit(request, before.is_none(), &agent.capacity(Some(name))?)?;
    check_ports(request, before.as_ref())?;
    volume::operate::of_deploy(agent, request)?;
    if let Origin::Kernel(volumes) = wanted.origin() {
        volume::operate::of_create(agent, volumes, name)?;
    }
    let vm = before.as_ref().map_or(new, |vm| vm.id);
    let previous = before.as_ref().and_then(|vm| kept::previous(agent, vm));
    let remember = |recorded: bool| {
        let progress = Progress { vm, request: caller.signed.clone(), recorded, previous: previous.clone(), failed: None };
        agent.operations.remember(id, serde_json::to_value(progress).map_err(|error| internal(&error))?)
    };
    remember(false)?;
    reach(Failpoint::DeployRemembered);
    agent.submit(&caller.signed)?;
    if let Some(made) = made {
        made.keep();
    }
    reach(Failpoint::DeploySubmitted);
    remember(true)?;
    reach(Failpoint::DeployRecorded);
    let after = desired::vm_named(&agent.view(), name).ok_or_else(|| internal(&"the VM is not in the state after it was recorded"))?;
    if before.is_some_and(|before| before.boot_digest() == after.boot_digest()) {
        agent.fleet.retry(&vm);
    }
    Ok(Target {
        vm,
        name: name.clone(),
        boot: after.boot_digest(),
        request: caller.signed.clone(),
        previous,
        is_started: wanted.is_started(),
    })
}

/// A published port that something else on the machine listens on.
fn check_ports(request: &DeployRequest, before: Option<&DesiredVm>) -> Result<(), ApiError> {
    for port in &request.spec.ports {
        let Some(host_port) = port.host_port else { continue };
        let is_ours = before
            .is_some_and(|vm| vm.request.spec.ports.iter().any(|old| (old.protocol, old.host_port) == (port.protocol, port.host_port)));
        if is_ours {
            continue;
        }
        if let Some(user) = form_net::port_in_use(port.protocol, host_port).map_err(|error| internal(&error))? {
            let what = format!("port {host_port}/{} of the host is in use by {user}", port.protocol.as_str());
            return Err(ApiError::new(ErrorCode::Conflict, what).hint("publish another host port with EXPOSE HOSTPORT:PORT"));
        }
    }
    Ok(())
}

/// Why a deploy did not lead to a healthy VM.
enum Shortfall {
    Failed(ApiError),
    /// Somebody asked for something else meanwhile: that holds, and nothing is put back.
    Superseded(ApiError),
}

fn superseded(name: &Name, how: &str) -> Shortfall {
    Shortfall::Superseded(ApiError::new(ErrorCode::Conflict, format!("vm/{name} was {how} before its deploy was done")))
}

async fn finish(agent: &Arc<Agent>, id: OperationId, target: Target) {
    if !target.is_started {
        let result = lifecycle::stopped(agent, &target.vm).await;
        return agent.operations.finish(id, result);
    }
    let error = match become_healthy(agent, Some(id), &target).await {
        Ok(()) => {
            reach(Failpoint::DeployHealthy);
            kept::keep(agent, &target.vm, &target.request, target.boot);
            reach(Failpoint::DeployKept);
            return agent.operations.finish(id, Ok(()));
        }
        Err(Shortfall::Superseded(error)) => return agent.operations.finish(id, Err(error)),
        Err(Shortfall::Failed(error)) => with_log(agent, &target.vm, error),
    };
    match target.previous.clone().filter(|previous| previous.boot != target.boot) {
        Some(previous) => go_back(agent, id, &target, &previous, error).await,
        None => {
            let hint = format!(
                "it stays as it is: see `form logs {0}`, mend it and deploy again, or remove it with `form destroy {0}`",
                target.name
            );
            agent.operations.finish(id, Err(error.hint(hint)));
        }
    }
}

/// Ends a deploy that failed with the old version put back.
async fn go_back(agent: &Arc<Agent>, id: OperationId, target: &Target, previous: &Previous, error: ApiError) {
    let progress = Progress {
        vm: target.vm,
        request: target.request.clone(),
        recorded: true,
        previous: Some(previous.clone()),
        failed: Some(Failed { boot: target.boot, error: error.clone() }),
    };
    let remembered = serde_json::to_value(progress).map_err(|error| internal(&error)).and_then(|json| agent.operations.remember(id, json));
    if let Err(error) = remembered {
        tracing::warn!(operation = %id, "a restarted agent will try this deploy again before it goes back: {error}");
    }
    agent.operations.step(id, format!("{}; putting the old version back", error.message.lines().next().unwrap_or_default()));
    let error = match put_back(agent, target, previous).await {
        Ok(()) => error.hint("the old version runs again"),
        Err(Shortfall::Failed(again)) => error.hint(format!("the old version could not be put back either: {again}")),
        Err(Shortfall::Superseded(change)) => error.hint(format!("the old version was not put back: {}", change.message)),
    };
    agent.operations.finish(id, Err(error));
}

async fn put_back(agent: &Arc<Agent>, target: &Target, previous: &Previous) -> Result<(), Shortfall> {
    let lost = |error: &dyn std::fmt::Display| Shortfall::Failed(internal(error));
    let boot = {
        let (agent, previous) = (Arc::clone(agent), previous.clone());
        let (vm, name, boot) = (target.vm, target.name.clone(), target.boot);
        tokio::task::spawn_blocking(move || submit_previous(&agent, &vm, &name, boot, &previous)).await.map_err(|error| lost(&error))??
    };
    reach(Failpoint::RollbackSubmitted);
    agent.fleet.reconcile(agent);
    let back =
        Target { vm: target.vm, name: target.name.clone(), boot, request: previous.request.clone(), previous: None, is_started: true };
    become_healthy(agent, None, &back).await
}

/// Records the old version as what should be, unless somebody asked for something else since `failed`. Gives the start it leads to.
fn submit_previous(agent: &Agent, vm: &VmId, name: &Name, failed: Digest, previous: &Previous) -> Result<Digest, Shortfall> {
    let _admission = agent.admission();
    let gone = || superseded(name, "destroyed");
    let desired = agent.desired(vm).ok_or_else(gone)?;
    if desired.boot_digest() == failed {
        agent.submit(&previous.request).map_err(Shortfall::Failed)?;
    } else if !is_on_the_way_back(&desired, previous) {
        return Err(superseded(name, "changed by somebody else"));
    }
    // Set again what was set: once more does no harm to an agent that was killed right here.
    previous.changes.iter().try_for_each(|change| agent.submit(change)).map_err(Shortfall::Failed)?;
    Ok(agent.desired(vm).ok_or_else(gone)?.boot_digest())
}

/// Whether an agent that was killed in the middle of going back has recorded the old version already.
fn is_on_the_way_back(desired: &DesiredVm, previous: &Previous) -> bool {
    let Some(Wanted { request: old, .. }) = Wanted::read(&previous.request) else { return false };
    if previous.changes.is_empty() {
        desired.request == old
    } else {
        (&desired.request.boot, desired.request.kernel) == (&old.boot, old.kernel)
    }
}

fn with_log(agent: &Agent, vm: &VmId, mut error: ApiError) -> ApiError {
    let lines = logs::tail(&agent.log_directory(vm), LOG_TAIL).unwrap_or_default();
    if !lines.is_empty() {
        let text: String = lines.iter().map(|line| format!("\n  | {}", line.line)).collect();
        error.message.push_str(&format!("\nthe last lines of its log:{text}"));
    }
    error
}

/// Waits until the VM runs from the wanted start and is ready and healthy, or clearly will not be.
async fn become_healthy(agent: &Agent, id: Option<OperationId>, target: &Target) -> Result<(), Shortfall> {
    let failed = |message: String| Err(Shortfall::Failed(ApiError::new(ErrorCode::Failed, message)));
    let mut changed = agent.fleet.subscribe();
    let (mut deadline, mut said) = (None, "");
    let patience = Duration::from_secs(agent.config().boot_timeout_seconds);
    loop {
        let Some(desired) = agent.desired(&target.vm) else { return Err(superseded(&target.name, "destroyed")) };
        if desired.boot_digest() != target.boot {
            return Err(superseded(&target.name, "changed by somebody else"));
        }
        if let Some(observed) = agent.fleet.observed(&target.vm).filter(|observed| observed.boot == Some(target.boot)) {
            let step = match (observed.state, observed.ready, observed.health) {
                (VmState::Running, true, Health::None | Health::Healthy) if observed.fault.is_none() => return Ok(()),
                // More cannot be known.
                (VmState::Running, ..) if !desired.request.has_guest() => return Ok(()),
                _ if observed.gave_up => {
                    return failed(format!("vm/{} does not run: {}", target.name, observed.fault.as_deref().unwrap_or("it has ended")));
                }
                (VmState::Running, ..) if observed.restarts >= MAX_RESTARTS && observed.fault.is_some() => {
                    return failed(format!("vm/{}: {}", target.name, observed.fault.unwrap_or_default()));
                }
                (_, _, Health::Unhealthy) => {
                    return failed(format!("vm/{} is unhealthy: {}", target.name, observed.fault.unwrap_or_default()));
                }
                (VmState::Running, true, Health::Starting) => "waiting for the healthcheck",
                (VmState::Starting, ..) if observed.started_at.is_some() => "waiting for the guest to start",
                _ => "starting the VM",
            };
            if let Some(id) = id.filter(|_| step != said) {
                agent.operations.step(id, step);
                said = step;
                // Each step has the whole patience.
                deadline = Some(Instant::now() + patience * 2);
            }
        }
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + patience * 2);
        if tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
            return failed(format!("vm/{} was not ready in time ({said})", target.name));
        }
    }
}

/// The agent was stopped between recording what should be and remembering that it had.
fn is_what_was_asked(progress: &Progress, desired: &DesiredVm) -> bool {
    Wanted::read(&progress.request).is_some_and(|asked| asked.request == desired.request)
}

/// Goes on with a deploy that an earlier run of the agent left unfinished, or ends it when nothing was changed yet.
pub fn resume(agent: &Arc<Agent>, record: &Record) {
    let id = record.operation.id;
    let unchanged =
        || ApiError::new(ErrorCode::Failed, "the agent was stopped before it changed anything").hint("run the same command again");
    let progress: Option<Progress> = record.resume.clone().and_then(|resume| serde_json::from_value(resume).ok());
    let Some(progress) = progress else { return agent.operations.finish(id, Err(unchanged())) };
    let desired = agent.desired(&progress.vm);
    let target = |boot: Digest, name: &Name| Target {
        vm: progress.vm,
        name: name.clone(),
        boot,
        request: progress.request.clone(),
        previous: progress.previous.clone(),
        is_started: Wanted::read(&progress.request).is_none_or(|wanted| wanted.is_started()),
    };
    match (desired, &progress) {
        (Some(desired), Progress { failed: Some(failed), previous: Some(previous), .. }) => {
            let (agent, target) = (Arc::clone(agent), target(failed.boot, desired.name()));
            let (previous, error) = (previous.clone(), failed.error.clone());
            tokio::spawn(async move { go_back(&agent, id, &target, &previous, error).await });
        }
        (Some(desired), _) if is_what_was_asked(&progress, &desired) => {
            let (agent, target) = (Arc::clone(agent), target(desired.boot_digest(), desired.name()));
            tokio::spawn(async move { finish(&agent, id, target).await });
        }
        (_, Progress { failed: Some(failed), .. }) => agent.operations.finish(id, Err(failed.error.clone())),
        (None, Progress { recorded: true, .. }) => {
            let error =
                ApiError::new(ErrorCode::Conflict, format!("{} was destroyed before its deploy was done", record.operation.subject));
            agent.operations.finish(id, Err(error));
        }
        _ => agent.operations.finish(id, Err(unchanged())),
    }
}
