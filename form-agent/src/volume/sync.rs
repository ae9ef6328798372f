//! A volume brought in line by force: its files, its export, and the VM that has it, with what the state says of it.

use std::sync::PoisonError;

use form_api::{ApiError, ErrorCode, vm::VmState};
use form_guest::protocol::Request;
use form_store::{Pool, StoreError};
use form_types::{Name, VmId, size::Bytes};

use super::{DesiredVolume, describe, export, live};
use crate::{action, agent::Agent, serve::store_error};

/// How long a guest may hold back writes while it writes everything out.
const FLUSH_LIMIT_MS: u64 = 5000;

/// Does it, and tells what there was to do. Blocks.
///
/// # Errors
/// `conflict` when the VM that has it is paused, `timed-out` when its guest does not answer; what could not be brought in line.
pub(super) fn sync(agent: &Agent, pool: &Pool, name: &Name, done: impl Fn(String)) -> Result<(), ApiError> {
    let volume = describe::volume_named(agent, name)?;
    // First: it has the file open.
    if agent.exports.end_unreachable(&volume.id) {
        done("its export, whose socket was gone, is ended".to_owned());
    }
    files(agent, pool, &volume, &done)?;
    let attached = volume.attached.as_ref().map(|attached| attached.vm);
    for vm in agent.vms_on_disk() {
        // Also one that should not have it.
        if attached == Some(vm) || describe::held_by(agent, &vm).contains(&volume.id) || live::has(agent, &vm, &volume) {
            in_vm(agent, &vm, &volume, &done)?;
        }
    }
    Ok(())
}

/// What the pool has of it.
fn files(agent: &Agent, pool: &Pool, volume: &DesiredVolume, done: &impl Fn(String)) -> Result<(), ApiError> {
    let store = |error: StoreError| store_error(&error);
    let _turn = agent.volume_turn();
    if !pool.unsettled(&volume.id).map_err(store)?.is_empty() {
        pool.settle_restore(&volume.id, volume.restored.as_ref()).map_err(store)?;
        done("what was left of a restore is done with".to_owned());
    }
    match pool.volume(&volume.id) {
        Ok(entry) if entry.size_bytes < volume.size_bytes && agent.exports.of(&volume.id).is_some() => {
            export::grow(agent, pool, &volume.id, volume.size_bytes)?;
            done(format!("its file has {} now", Bytes(volume.size_bytes)));
        }
        Ok(entry) if entry.size_bytes < volume.size_bytes => match pool.grow(&volume.id, volume.size_bytes) {
            Ok(_) => done(format!("its file has {} now", Bytes(volume.size_bytes))),
            // That VM's process makes it larger.
            Err(StoreError::VolumeInUse { .. }) => {}
            Err(error) => return Err(store(error)),
        },
        // It is made when it is first needed.
        Ok(_) | Err(StoreError::NoVolume(_)) => {}
        Err(error) => return Err(store(error)),
    }
    Ok(())
}

fn in_vm(agent: &Agent, vm: &VmId, volume: &DesiredVolume, done: &impl Fn(String)) -> Result<(), ApiError> {
    let vm_name = describe::vm_name(agent, vm);
    if live::directory(agent, vm).read_record().is_none() {
        return Ok(());
    }
    if let Some(own) = agent.desired(vm).filter(|vm| !vm.request.has_guest()) {
        let refused = action::no_guest(own.name(), "which says what it has of a volume");
        return Err(refused.hint("stop it first: it starts with its volumes as they should be"));
    }
    if !live::is_possible(agent, vm) {
        let state = agent.fleet.observed(vm).map(|observed| observed.state);
        return Err(match state {
            Some(VmState::Paused) => {
                ApiError::new(ErrorCode::Conflict, format!("vm/{vm_name}, which has volume/{}, is paused", volume.name))
                    .hint(format!("`form vm resume {vm_name}` first"))
            }
            _ => {
                ApiError::new(ErrorCode::TimedOut, format!("the guest of vm/{vm_name}, which has volume/{}, does not answer", volume.name))
                    .hint(format!(
                        "see `form vm show {vm_name}` and `form logs --console {vm_name}`; `form vm reset {vm_name}` starts it anew"
                    ))
            }
        });
    }
    let look = || {
        let turn = agent.volumes_of(vm);
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        live::differences(agent, vm)
    };
    let found = look();
    // Also limits, and sizes that the guest was not told of.
    live::reconcile(agent, vm);
    let left = look();
    for mended in found.iter().filter(|words| !left.contains(words)) {
        done(format!("vm/{vm_name}: mended: {mended}"));
    }
    if !left.is_empty() {
        return Err(ApiError::new(ErrorCode::Failed, format!("vm/{vm_name} cannot be brought in line: {}", left.join("; ")))
            .hint("see the agent's log"));
    }
    let writes = volume.attached.as_ref().is_some_and(|attached| attached.vm == *vm && !attached.read_only);
    if writes { flush(agent, vm, volume) } else { Ok(()) }
}

/// A freeze writes everything out before it holds back writes, for no longer than that takes.
fn flush(agent: &Agent, vm: &VmId, volume: &DesiredVolume) -> Result<(), ApiError> {
    let control = live::directory(agent, vm).control();
    let frozen = live::ask_guest(&control, &Request::Freeze { limit_ms: FLUSH_LIMIT_MS });
    // Also when the answer was lost.
    let thawed = live::ask_guest(&control, &Request::Thaw);
    let failed = |error| live::failed(volume, "the guest does not write it out", &error);
    frozen.map_err(failed)?;
    thawed.map_err(failed)?;
    live::note_synced(agent, vm, &volume.id);
    Ok(())
}
