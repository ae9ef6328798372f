//! A VM that stands still for a moment, its file systems quiesced, so that what its disks hold is of one instant.

use std::{sync::Arc, time::Instant};

use form_api::ApiError;
use form_types::VmId;
use form_vmm::control::{Client, VmState as ProcessState};

use super::take::{Fault, Running, go_on, pause, process_error, still_stands};
use crate::{
    agent::{Agent, internal},
    desired::Run,
    driver::process::RuntimeDirectory,
};

/// How it went.
#[derive(Clone, Copy, Debug)]
pub struct Still {
    /// The guest had written everything out and held back writes.
    pub frozen: bool,
    /// How long it stood; none of one that stood before.
    pub pause_ms: Option<u64>,
}

/// Does `work` while the VM stands: what it has written to its disks is in their files, and nothing changes them. It should take no time.
/// With `runs` its guest is asked to quiesce before, and it goes on after. Blocks, on a thread of the runtime.
///
/// # Errors
/// What `work` fails with; that the VM ended meanwhile, or somebody let it go on.
pub fn while_still(agent: &Arc<Agent>, vm: &VmId, runs: bool, work: impl FnOnce() -> Result<(), ApiError>) -> Result<Still, ApiError> {
    let running = Running { agent, vm, directory: RuntimeDirectory::new(&agent.paths().vm_runtime(), vm) };
    let runtime = tokio::runtime::Handle::current();
    let runs = runs && agent.desired(vm).is_none_or(|vm| vm.request.has_guest());
    let frozen = runs && runtime.block_on(running.freeze());
    let stood = stand(agent, vm, &running.directory, work);
    if runs {
        runtime.block_on(running.thaw(frozen));
    }
    Ok(Still { frozen, pause_ms: stood? })
}

fn stand(
    agent: &Agent,
    vm: &VmId,
    directory: &RuntimeDirectory,
    work: impl FnOnce() -> Result<(), ApiError>,
) -> Result<Option<u64>, ApiError> {
    // An agent that is killed now leaves a VM that stands: the next one finds the mark and lets it go on.
    directory.mark_saving().map_err(|error| internal(&error))?;
    let result = stand_and_work(agent, vm, directory, work);
    if !matches!(result, Err(Fault::Stands(_))) {
        directory.unmark_saving();
    }
    result.map_err(Fault::into_api)
}

fn stand_and_work(
    agent: &Agent,
    vm: &VmId,
    directory: &RuntimeDirectory,
    work: impl FnOnce() -> Result<(), ApiError>,
) -> Result<Option<u64>, Fault> {
    let control = directory.control();
    let failed = |error| Fault::Api(process_error(&error));
    let client = Client::connect(&control).map_err(failed)?;
    let ran = client.status().map_err(failed)?.0 == ProcessState::Running;
    let begun = Instant::now();
    // Its process may have been killed meanwhile, and another one started that writes.
    let worked = pause(&client, ran).and_then(|()| work()).and_then(|()| still_stands(&client));
    if !ran {
        return worked.map(|()| None).map_err(Fault::Api);
    }
    go_on(&control).map_err(Fault::Stands)?;
    let pause_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    // Somebody who paused it meanwhile has been told that it stands.
    if agent.desired(vm).is_some_and(|vm| vm.run == Run::Paused) {
        let paused = Client::connect(&control).and_then(|client| client.pause());
        if let Err(error) = paused {
            tracing::warn!(%vm, "it was to be paused, and goes on after a snapshot of its volume: {error}");
        }
    }
    worked.map(|()| Some(pause_ms)).map_err(Fault::Api)
}
