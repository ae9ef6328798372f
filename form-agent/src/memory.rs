//! Memory that VMs get and give back while they run. What should be is in the state, and a VM is started with it; this is the way there without
//! a start, for those VMs that can. A guest gives back as it can, so what a VM has may be more than it should have, for as long as it runs.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use form_api::{ApiError, ErrorCode};
use form_bundle::ModuleSet;
use form_types::{Digest, VmId};
use form_vmm::control::{Client, MemoryMetrics};
use tokio::time::{Instant, sleep};

use crate::{
    agent::Agent,
    cgroup,
    desired::{DesiredVm, with_memory},
    driver::process::{Record, RuntimeDirectory},
};

/// How long a VM process may take to say what it has.
const LIMIT: Duration = Duration::from_secs(10);

/// How long a guest may take to come to have what it should. What it gives back it has to clear first.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at a guest that takes or gives.
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LAST_LOOK: Duration = Duration::from_secs(5);

/// What a guest needs to be loaded with.
const MODULE: &str = "virtio_mem";

/// Held from a look at what a VM has to the limit that follows from it: one that lowers a limit must not overlook that more was given meanwhile.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn directory(agent: &Agent, vm: &VmId) -> RuntimeDirectory {
    RuntimeDirectory::new(&agent.paths().vm_runtime(), vm)
}

fn client(agent: &Agent, vm: &VmId) -> Option<Client> {
    let directory = directory(agent, vm);
    directory.read_record().filter(|record| record.booted)?;
    Some(Client::connect(&directory.control()).ok()?.with_timeout(LIMIT))
}

/// What the VM has. None when it has no process, or one of a release that gives no more than it booted with.
fn look(agent: &Agent, vm: &VmId) -> Option<MemoryMetrics> {
    client(agent, vm)?.metrics().ok()?.memory
}

/// What keeps a VM that runs from coming to have `wanted_mib` without a start: the end of a sentence.
///
/// # Errors
/// That.
pub fn check(agent: &Agent, vm: &DesiredVm, wanted_mib: u64) -> Result<(), String> {
    let memory = look(agent, &vm.id).ok_or("it was started by a release that changes memory with a start only")?;
    let manifest = agent.store.kernel_manifest(&vm.request.kernel).map_err(|error| format!("its kernel cannot be looked at: {error}"))?;
    if !manifest.load_order(ModuleSet::Guest).iter().any(|module| module == MODULE) {
        return Err(format!("its kernel bundle has no {MODULE}: a deploy with a new bundle brings it"));
    }
    fits(&memory, wanted_mib)
}

fn fits(memory: &MemoryMetrics, wanted_mib: u64) -> Result<(), String> {
    let MemoryMetrics { booted_mib, step_mib, most_mib, .. } = *memory;
    if wanted_mib < booted_mib {
        return Err(format!("the {booted_mib} MiB that it was started with stay until its next start"));
    }
    if wanted_mib > most_mib {
        return Err(format!("it can have {most_mib} MiB at most until its next start"));
    }
    let more = wanted_mib - booted_mib;
    if more.is_multiple_of(step_mib.max(1)) {
        return Ok(());
    }
    let below = wanted_mib - more % step_mib;
    let above = below.saturating_add(step_mib).min(most_mib);
    Err(format!("memory changes in steps of {step_mib} MiB while it runs: it can have {below} or {above} MiB without a start"))
}

/// Has the process of a VM that runs give its guest so much. Its limit is raised before; it goes down when the guest has given back
/// ([`follow`]). Nothing is changed when there is no process: the next one is started with it.
///
/// # Errors
/// When it is not possible after all.
pub fn give(agent: &Agent, vm: &DesiredVm, wanted_mib: u64) -> Result<(), ApiError> {
    let failed = |what: String| {
        ApiError::new(ErrorCode::Failed, format!("vm/{}: {what}", vm.name())).hint("nothing was changed; add --restart, or try again")
    };
    let Some(client) = client(agent, &vm.id) else { return Ok(()) };
    let _turn = turn();
    let before = client.metrics().map_err(|error| failed(format!("its process does not say what it has: {error}")))?;
    let present_mib = before.memory.map_or(0, |memory| memory.present_mib);
    let limit = cgroup::set_memory(&agent.host_id().mark(), &vm.id, wanted_mib.max(present_mib));
    limit.map_err(|error| failed(format!("its limit of memory cannot be raised: {error}")))?;
    client.memory(wanted_mib).map_err(|error| failed(format!("its process does not take {wanted_mib} MiB: {error}")))?;
    directory(agent, &vm.id).set_memory(wanted_mib).map_err(|error| {
        // What is not noted would be made good by a start that nobody asked for.
        if let Some(memory) = before.memory
            && let Err(error) = client.memory(memory.wanted_mib)
        {
            tracing::warn!(vm = %vm.id, "it keeps {wanted_mib} MiB until its guest is ready anew: {error}");
        }
        failed(format!("that it has other memory cannot be noted: {error}"))
    })
}

/// Whether what runs, of which `record` tells how it was started, is as `desired` says because it got other memory since.
pub fn makes_up(agent: &Agent, desired: &DesiredVm, record: &Record) -> bool {
    let given = directory(agent, &desired.id).memory();
    given.is_some_and(|given_mib| is_only_memory(desired, record.request.spec.resources.memory_mib, &record.boot, given_mib))
}

/// Whether a VM that was started from `boot`, with `started_mib`, and was given `given_mib` since is `desired`.
fn is_only_memory(desired: &DesiredVm, started_mib: u64, boot: &Digest, given_mib: u64) -> bool {
    let as_started = DesiredVm { request: with_memory(&desired.request, started_mib), ..desired.clone() };
    desired.request.spec.resources.memory_mib == given_mib && as_started.boot_digest() == *boot
}

/// How much of the host's memory a VM has: the `should_mib` that it should have, or more as long as its guest has not given it back.
pub fn held_mib(agent: &Agent, vm: &VmId, should_mib: u64) -> u64 {
    let present = agent.fleet.observed(vm).and_then(|observed| observed.memory_mib);
    should_mib.max(present.unwrap_or(0))
}

/// Sets the limit of a VM that goes on from what was saved, and whose guest may have had more than it should.
///
/// # Errors
/// When it cannot be raised: the VM would be killed.
pub fn restored(agent: &Agent, vm: &VmId) -> std::io::Result<()> {
    let Some(memory) = look(agent, vm) else { return Ok(()) };
    note(agent, vm, &memory);
    cgroup::set_memory(&agent.host_id().mark(), vm, memory.present_mib.max(memory.wanted_mib)).map(drop)
}

/// Brings a VM whose guest is ready anew in line with what it should have, since an agent may have died in between, and looks after it until
/// it is so.
pub async fn reconcile(agent: Arc<Agent>, vm: VmId) {
    let looking = Arc::clone(&agent);
    let told = tokio::task::spawn_blocking(move || {
        let Some((desired, memory)) = looking.desired(&vm).zip(look(&looking, &vm)) else { return };
        note(&looking, &vm, &memory);
        let wanted = desired.request.spec.resources.memory_mib;
        if memory.wanted_mib != wanted
            && fits(&memory, wanted).is_ok()
            && let Err(error) = give(&looking, &desired, wanted)
        {
            tracing::warn!(%vm, "{error}");
        }
    });
    if told.await.is_ok() {
        follow(&agent, &vm, None).await;
    }
}

/// Notes what a VM has while that is not what it should have.
fn note(agent: &Agent, vm: &VmId, memory: &MemoryMetrics) {
    let differs = memory.present_mib != memory.wanted_mib;
    agent.fleet.update(vm, |observed| observed.memory_mib = differs.then_some(memory.present_mib));
}

/// Looks until the guest has what it should, and lowers the VM's limit then. Gives what it last had when that is not so `until` then; none when
/// it is, or the process is gone.
async fn follow(agent: &Arc<Agent>, vm: &VmId, until: Option<Instant>) -> Option<MemoryMetrics> {
    let mut pause = FIRST_LOOK;
    let mut last = None;
    loop {
        let (looking, id) = (Arc::clone(agent), *vm);
        let seen = tokio::task::spawn_blocking(move || {
            let client = client(&looking, &id)?;
            // One that does not answer now may later.
            let Ok(metrics) = client.metrics() else { return Some(None) };
            let memory = metrics.memory?;
            note(&looking, &id, &memory);
            Some(Some((memory, memory.present_mib == memory.wanted_mib && lower(&looking, &id, &client))))
        });
        let seen = seen.await.ok()??;
        last = seen.map(|(memory, _)| memory).or(last);
        if seen.is_some_and(|(_, done)| done) {
            return None;
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return last;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
    }
}

/// Lowers the limit of a VM whose guest has what it should. `false`: that is not so any more, or the limit is to be left alone for now.
fn lower(agent: &Agent, vm: &VmId, client: &Client) -> bool {
    let _turn = turn();
    let memory = client.metrics().ok().and_then(|metrics| metrics.memory);
    let Some(memory) = memory.filter(|memory| memory.present_mib == memory.wanted_mib) else { return false };
    cgroup::set_memory(&agent.host_id().mark(), vm, memory.wanted_mib).unwrap_or_else(|error| {
        tracing::warn!(%vm, "it may use more memory than it has until it is started again: {error}");
        true
    })
}

/// Waits until the guest has what it should.
///
/// # Errors
/// When it takes too long. It goes on, and so does the host.
pub async fn settled(agent: &Arc<Agent>, vm: &DesiredVm) -> Result<(), ApiError> {
    let Some(memory) = follow(agent, &vm.id, Some(Instant::now() + PATIENCE)).await else { return Ok(()) };
    let (name, MemoryMetrics { wanted_mib, present_mib, .. }) = (vm.name(), memory);
    tokio::spawn(reconcile(Arc::clone(agent), vm.id));
    if present_mib == wanted_mib {
        // Only its limit is yet to be lowered.
        return Ok(());
    }
    let what = if present_mib > wanted_mib { "given back no more" } else { "taken no more" };
    let text = format!("vm/{name} should have {wanted_mib} MiB and has {present_mib}: its guest has {what} so far, and goes on as it can");
    Err(ApiError::new(ErrorCode::TimedOut, text)
        .hint(format!("see `form vm stats {name}`; `form vm restart {name}` starts it with {wanted_mib} MiB")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::vm;

    #[test]
    fn what_was_given_makes_up_for_other_memory_and_nothing_else() {
        let before = vm("web");
        let boot = before.boot_digest();
        let started_mib = before.request.spec.resources.memory_mib;
        let more = DesiredVm { request: with_memory(&before.request, 1024), ..before.clone() };
        assert!(is_only_memory(&more, started_mib, &boot, 1024));
        assert!(!is_only_memory(&more, started_mib, &boot, 512), "it was given other memory than it should have");
        assert!(!is_only_memory(&DesiredVm { starts: 2, ..more.clone() }, started_mib, &boot, 1024), "somebody asked for a start");
        let mut other = more;
        other.request.spec.resources.vcpus += 1;
        assert!(!is_only_memory(&other, started_mib, &boot, 1024));
    }

    #[test]
    fn what_a_vm_can_have_without_a_start() {
        let memory = MemoryMetrics { booted_mib: 300, step_mib: 128, most_mib: 300 + 8 * 128, wanted_mib: 428, present_mib: 428 };
        for possible in [300, 428, 556, 300 + 8 * 128] {
            assert_eq!(fits(&memory, possible), Ok(()), "{possible}");
        }
        let refused = |mib| fits(&memory, mib).unwrap_err();
        assert!(refused(299).contains("300 MiB that it was started with"));
        assert!(refused(512).contains("428 or 556 MiB"));
        assert!(refused(301).contains("300 or 428 MiB"));
        assert!(refused(300 + 9 * 128).contains("1324 MiB at most"));
        assert!(refused(u64::MAX).contains("1324 MiB at most"));
        assert!(fits(&MemoryMetrics { most_mib: 300, ..memory }, 428).unwrap_err().contains("300 MiB at most"));
    }
}
