//! vCPUs that a VM gets and gives back while it runs. Here the VM goes first and the state follows: what a guest does not take or let go
//! is put back, and nothing has changed. An agent that dies between the two finds a VM that is not as it should be, and puts it back.

use std::{path::Path, sync::PoisonError, time::Duration};

use form_api::{ApiError, ErrorCode, deploy::DeployRequest};
use form_guest::protocol::{Reply, Request};
use form_types::{Failpoint, VmId, failpoint::reach};
use form_vmm::control::{Client, ClientError};

use crate::{
    agent::{Agent, internal},
    cgroup,
    desired::DesiredVm,
    driver::{guest::ask, let_go},
    volume::live::{directory, is_possible},
};

/// How long a VM process may take to say what it has.
const ANSWER: Duration = Duration::from_secs(10);
/// A guest waits ten seconds for its kernel to find a vCPU.
const GUEST_LIMIT: Duration = Duration::from_secs(30);
/// How long a guest's kernel may take to let vCPUs go.
const GONE_LIMIT: Duration = Duration::from_secs(30);

/// A change of a VM that runs, which needs no start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    pub vcpus: u32,
}

/// What keeps a VM that runs from coming to have so many without a start: the end of a sentence.
///
/// # Errors
/// That.
pub fn check(agent: &Agent, vm: &DesiredVm, vcpus: u32) -> Result<(), String> {
    judge(vcpus, if is_possible(agent, &vm.id) { room(agent, &vm.id) } else { None })
}

/// How many vCPUs the process of a VM says that it has, and can have.
fn room(agent: &Agent, vm: &VmId) -> Option<(u8, u8)> {
    Client::connect(&directory(agent, vm).control()).ok()?.with_timeout(ANSWER).vcpus().ok()
}

/// `room`: how many vCPUs there are and can be; none when the process cannot change that.
fn judge(vcpus: u32, room: Option<(u8, u8)>) -> Result<(), String> {
    match room {
        Some((_, most)) if vcpus <= u32::from(most) => Ok(()),
        Some((_, most)) => Err(format!("it can have {most} vCPUs until it is started again")),
        None => Err("its vCPUs change with a start".to_owned()),
    }
}

/// Gives the VM so many vCPUs, and has `submit` write that to the state. Blocks.
///
/// # Errors
/// When the guest does not take or give back vCPUs, or the state is not written. Then the VM has those that it had, unless it says so.
pub fn change(
    agent: &Agent,
    vm: &DesiredVm,
    changed: &DeployRequest,
    live: Live,
    submit: impl FnOnce() -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    let turn = agent.volumes_of(&vm.id);
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = directory(agent, &vm.id);
    let noted = || {
        reach(Failpoint::VcpusChanged);
        let boot = DesiredVm { request: changed.clone(), ..vm.clone() }.boot_digest();
        // First: the VM that runs is what the state will say, and not to be started again.
        directory.note_resized(boot, &changed.spec.resources).map_err(|error| internal(&error))?;
        reach(Failpoint::VcpusNoted);
        submit()
    };
    bring(agent, &vm.id, live.vcpus).map_err(|why| ApiError::new(ErrorCode::Failed, why)).and_then(|()| noted()).map_err(|error| {
        directory.forget_resized();
        let before = vm.request.spec.resources.vcpus;
        let has = put_back(agent, &vm.id, before);
        let now = match has {
            Some(has) if has == before => format!("it has {before} as before"),
            Some(has) => format!("it has {has} now, and should have {before}"),
            None => "how many it has now is not known".to_owned(),
        };
        let message = format!("vm/{}: {}; {now}", vm.name(), error.message);
        match &error.hint {
            Some(hint) => ApiError::new(error.code, message).hint(hint.clone()),
            None => ApiError::new(error.code, message).hint("try again, or add --restart: a start brings them"),
        }
    })
}

/// Gives the guest vCPUs, or asks for them, until it has and uses `vcpus`.
fn bring(agent: &Agent, vm: &VmId, vcpus: u32) -> Result<(), String> {
    let control = directory(agent, vm).control();
    let count = u8::try_from(vcpus).map_err(|error| error.to_string())?;
    let process = |error: ClientError| format!("the VM process: {error}");
    let client = Client::connect(&control).map_err(process)?;
    let (has, _) = client.vcpus().map_err(process)?;
    if has <= count {
        client.plug_vcpus(count).map_err(process)?;
        use_processors(&control, vcpus)?;
    } else {
        let gone = client.unplug_vcpus(count).map_err(process)?;
        if !let_go::within(&gone, GONE_LIMIT) {
            let left = client.vcpus().map_err(process)?.0;
            let (asked, given) = (has - count, has.saturating_sub(left));
            return Err(format!("the kernel of its guest gave back {given} of {asked} vCPUs within {} s", GONE_LIMIT.as_secs()));
        }
    }
    cgroup::set_vcpus(&agent.host_id().mark(), vm, vcpus).map_err(|error| format!("its cgroup: {error}"))
}

fn use_processors(control: &Path, count: u32) -> Result<(), String> {
    let request = Request::UseProcessors { count };
    match tokio::runtime::Handle::current().block_on(ask(control, &request, GUEST_LIMIT)) {
        Ok(Reply::Done) => Ok(()),
        Ok(_) => Err("its guest answered something else".to_owned()),
        Err(error) => Err(format!("its guest does not use them: {error}")),
    }
}

/// After a change that failed. Gives how many there are then.
fn put_back(agent: &Agent, vm: &VmId, vcpus: u32) -> Option<u32> {
    if let Err(error) = bring(agent, vm, vcpus) {
        tracing::warn!(%vm, "its vCPUs are not as they were: {error}");
        // What it has not let go by now it keeps: later nobody would know.
        let client = Client::connect(&directory(agent, vm).control()).ok()?;
        let (has, _) = client.vcpus().ok()?;
        let _ = client.plug_vcpus(has);
    }
    room(agent, vm).map(|(has, _)| has.into())
}

/// How many vCPUs a VM that runs has and should have, where these differ. Of one that is about to be started again nothing is said.
fn difference(agent: &Agent, vm: &VmId) -> Option<(u32, u32)> {
    let desired = agent.desired(vm).filter(|_| is_possible(agent, vm))?;
    let record = directory(agent, vm).read_record().filter(|record| record.boot == desired.boot_digest())?;
    let (has, _) = room(agent, &record.vm)?;
    let (has, should) = (u32::from(has), desired.request.spec.resources.vcpus);
    (has != should).then_some((has, should))
}

/// Where a VM that runs and the state do not agree, in words. Nothing is said of one that is being changed.
pub fn drift(agent: &Agent, vm: &VmId) -> Option<String> {
    let turn = agent.volumes_of(vm);
    let _turn = turn.try_lock().ok()?;
    let (has, should) = difference(agent, vm)?;
    Some(format!("it runs with {has} vCPUs, and should have {should}"))
}

/// Brings a VM whose guest answers in line with the state: an agent that was killed may have left it with other vCPUs. What cannot be done
/// is logged, and `form doctor` shows it. Blocks.
pub fn reconcile(agent: &Agent, vm: &VmId) {
    let turn = agent.volumes_of(vm);
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((has, should)) = difference(agent, vm) else { return };
    // What an operation noted that did not come to its end.
    directory(agent, vm).forget_resized();
    match bring(agent, vm, should) {
        Ok(()) => tracing::info!(%vm, "it had {has} vCPUs, and has {should} as it should"),
        Err(error) => tracing::warn!(%vm, "it has {has} vCPUs, and should have {should}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_vm_can_have_other_vcpus_up_to_its_most() {
        for vcpus in [1, 3, 4] {
            assert_eq!(judge(vcpus, Some((2, 4))), Ok(()));
        }
        assert_eq!(judge(5, Some((2, 4))).unwrap_err(), "it can have 4 vCPUs until it is started again");
        // A process of a release that could not, or one that does not answer.
        assert_eq!(judge(3, None).unwrap_err(), "its vCPUs change with a start");
    }
}
