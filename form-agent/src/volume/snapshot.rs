//! Snapshots of volumes: made, listed, removed, and gone back to. They are their pool's matter, and not in the replicated state; that a volume
//! went back to one is (`restored`), since what is in the pool has to be what the state says.

use std::sync::{Arc, PoisonError};

use form_api::{
    ApiError, ErrorCode,
    snapshot::Consistency,
    vm::VmState,
    volume::{CloneRequest, VolumeRestoreRequest, VolumeSnapshot},
};
use form_store::{Pool, StoreError, VolumeSnapshotDraft, VolumeSnapshotEntry};
use form_types::{Failpoint, Name, OperationId, VmId, failpoint::reach};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    DesiredVolume, describe,
    operate::{self, Exported, Progress},
    pool, rules, volumes,
};
use crate::{
    agent::{Agent, internal},
    authorise::SignedRequest,
    serve::store_error,
    snapshot::still::{self, Still},
};

/// What the store keeps of a snapshot for the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartDetails {
    /// That made it: a restarted agent knows by it that the operation has come to its end.
    pub operation: OperationId,
    pub created_at: Timestamp,
    pub consistency: Consistency,
    pub pause_ms: Option<u64>,
    /// The VM whose snapshot of the same name it is a part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_of: Option<VmId>,
}

type Details = PartDetails;

/// A snapshot of a volume that belongs to one of a VM.
pub struct Part {
    pub volume: DesiredVolume,
    pub name: Name,
    pub details: PartDetails,
}

impl Part {
    pub fn is_of(&self, vm: &VmId) -> bool {
        self.details.part_of == Some(*vm)
    }
}

/// Every such one in the pools that are there. One whose record cannot be read is nobody's part.
pub fn parts(agent: &Agent) -> Vec<Part> {
    let mut found = Vec::new();
    for volume in own(agent) {
        let Ok(pool) = pool_of(agent, &volume) else { continue };
        for name in pool.snapshots(&volume.id).unwrap_or_default() {
            if let Ok((_, details)) = find(&pool, &volume, &name)
                && details.part_of.is_some()
            {
                found.push(Part { volume: volume.clone(), name, details });
            }
        }
    }
    found
}

/// The VM whose snapshot a part belongs to, when that exists or is being made or removed.
pub fn whole_of(agent: &Agent, part: &Part) -> Option<String> {
    let vm = part.details.part_of?;
    let name = describe::vm_name(agent, &vm);
    let is_there = || agent.store.snapshots(&vm).is_ok_and(|names| names.contains(&part.name));
    // Looked at again: it may have been made in between.
    (is_there() || agent.operations.is_under_way(&format!("vm/{name}")) || is_there()).then_some(name)
}

/// Whether the part of the snapshot `name` of `vm` is there, and of a volume of this size.
///
/// # Errors
/// Not found, damaged, of another size or of something else.
pub fn check_part(agent: &Agent, volume: &DesiredVolume, name: &Name, vm: &VmId, size_bytes: u64) -> Result<(), ApiError> {
    let found = pool_of(agent, volume).and_then(|pool| find(&pool, volume, name));
    let (entry, details) = found.map_err(|error| ApiError { message: format!("volume/{}: {}", volume.name, error.message), ..error })?;
    if details.part_of == Some(*vm) && entry.size_bytes == size_bytes {
        return Ok(());
    }
    let text = format!("the snapshot `{name}` of volume/{} is not the one that was made with the VM's", volume.name);
    Err(conflict(text, "another snapshot may do: `form vm snapshot ls`".to_owned()))
}

/// Whether a snapshot of a volume can be removed by itself.
pub(super) fn check_remove(agent: &Agent, volume: &DesiredVolume, name: &Name) -> Result<(), ApiError> {
    let pool = pool_of(agent, volume)?;
    is_one(&pool, volume, name)?;
    let Ok((_, details)) = find(&pool, volume, name) else { return Ok(()) };
    match whole_of(agent, &Part { volume: volume.clone(), name: name.clone(), details }) {
        None => Ok(()),
        Some(vm) => {
            let text = format!("the snapshot `{name}` of volume/{} is a part of that of vm/{vm}", volume.name);
            Err(conflict(text, format!("remove both: `form vm snapshot rm {vm} {name}`")))
        }
    }
}

fn store(error: &StoreError) -> ApiError {
    store_error(error)
}

fn pool_of(agent: &Agent, volume: &DesiredVolume) -> Result<Arc<Pool>, ApiError> {
    agent.store.pool(&volume.pool).map_err(|error| store(&error))
}

fn conflict(text: String, hint: String) -> ApiError {
    ApiError::new(ErrorCode::Conflict, text).hint(hint)
}

/// The snapshots of one volume, the oldest first.
///
/// # Errors
/// When the pool is not there, or the directory cannot be read.
pub fn of_volume(agent: &Agent, volume: &DesiredVolume) -> Result<Vec<VolumeSnapshot>, ApiError> {
    let pool = pool_of(agent, volume)?;
    let names = pool.snapshots(&volume.id).map_err(|error| store(&error))?;
    let mut all: Vec<VolumeSnapshot> = names.iter().map(|name| described(agent, &pool, volume, name)).collect();
    all.sort_by(|one, other| (one.created_at, &one.name).cmp(&(other.created_at, &other.name)));
    Ok(all)
}

fn own(agent: &Agent) -> Vec<DesiredVolume> {
    volumes(&agent.view()).into_values().filter(|volume| volume.host == agent.host_id()).collect()
}

/// Those of all volumes, by volume. Of a pool that is not there none is known; `form volume ls` and `form doctor` say that.
///
/// # Errors
/// When a directory cannot be read.
pub fn all(agent: &Agent) -> Result<Vec<VolumeSnapshot>, ApiError> {
    let is_there = |volume: &DesiredVolume| pool_of(agent, volume).is_ok_and(|pool| pool.is_there().is_ok());
    let all = own(agent).into_iter().filter(is_there).map(|volume| of_volume(agent, &volume));
    Ok(all.collect::<Result<Vec<_>, _>>()?.concat())
}

/// One; with its fault, when it cannot be used.
///
/// # Errors
/// When there is none of this name.
pub fn one(agent: &Agent, volume: &DesiredVolume, name: &Name) -> Result<VolumeSnapshot, ApiError> {
    let pool = pool_of(agent, volume)?;
    is_one(&pool, volume, name)?;
    Ok(described(agent, &pool, volume, name))
}

fn is_one(pool: &Pool, volume: &DesiredVolume, name: &Name) -> Result<(), ApiError> {
    if pool.snapshots(&volume.id).map_err(|error| store(&error))?.contains(name) {
        return Ok(());
    }
    let hint = format!("list them with `form volume snapshot ls {}`", volume.name);
    Err(store(&StoreError::NoVolumeSnapshot(name.clone())).hint(hint))
}

fn find(pool: &Pool, volume: &DesiredVolume, name: &Name) -> Result<(VolumeSnapshotEntry, Details), ApiError> {
    is_one(pool, volume, name)?;
    let entry = pool.snapshot(&volume.id, name).map_err(|error| store(&error))?;
    let details = serde_json::from_value(entry.details.clone()).map_err(|error| {
        let text = format!("the snapshot `{name}` cannot be understood: {error}");
        ApiError::new(ErrorCode::Failed, text).hint("use the release that made it, or remove it with `form volume snapshot rm`")
    })?;
    Ok((entry, details))
}

fn described(agent: &Agent, pool: &Pool, volume: &DesiredVolume, name: &Name) -> VolumeSnapshot {
    let mut snapshot = VolumeSnapshot {
        name: name.clone(),
        volume: volume.name.clone(),
        volume_id: volume.id,
        host: volume.host,
        host_name: agent.name().to_owned(),
        pool: volume.pool.clone(),
        format: volume.format,
        created_at: None,
        consistency: None,
        size_bytes: None,
        allocated_bytes: None,
        pause_ms: None,
        fault: None,
    };
    match find(pool, volume, name) {
        Ok((entry, details)) => {
            snapshot.created_at = Some(details.created_at);
            snapshot.consistency = Some(details.consistency);
            snapshot.size_bytes = Some(entry.size_bytes);
            snapshot.allocated_bytes = Some(entry.allocated_bytes);
            snapshot.pause_ms = details.pause_ms;
        }
        Err(error) => snapshot.fault = Some(error.message),
    }
    snapshot
}

/// Snapshots that cannot be used: files that nothing describes, and descriptions whose files are gone or torn. For `form doctor`.
pub fn faults(agent: &Agent) -> Vec<(String, String)> {
    let of_one = |volume: DesiredVolume| {
        let pool = pool_of(agent, &volume).ok();
        let names = pool.as_ref().and_then(|pool| pool.snapshots(&volume.id).ok()).unwrap_or_default();
        let look = |name: &Name| Some((format!("volume/{}/{name}", volume.name), find(pool.as_deref()?, &volume, name).err()?.message));
        names.iter().filter_map(look).collect::<Vec<_>>()
    };
    own(agent).into_iter().flat_map(of_one).collect()
}

/// Volumes beside which lies what was left of going back to a snapshot, with nobody at work on them. For `form doctor`.
pub fn unsettled(agent: &Agent) -> Vec<Name> {
    let is_left =
        |volume: &DesiredVolume| pool_of(agent, volume).is_ok_and(|pool| pool.unsettled(&volume.id).is_ok_and(|left| !left.is_empty()));
    let under_way = |volume: &DesiredVolume| agent.operations.is_under_way(&format!("volume/{}", volume.name));
    // Looked at again: what was under way may have ended in between.
    let found = own(agent).into_iter().filter(|volume| is_left(volume) && !under_way(volume) && is_left(volume));
    found.map(|volume| volume.name).collect()
}

/// Finishes what the state says of such a volume, and takes everything else back.
///
/// # Errors
/// When somebody has the volume open; those of the pool.
pub fn settle(agent: &Agent, name: &Name) -> Result<(), ApiError> {
    let _turn = agent.volume_turn();
    let volume = describe::volume_named(agent, name)?;
    pool_of(agent, &volume)?.settle_restore(&volume.id, volume.restored.as_ref()).map_err(|error| store(&error))
}

/// Whether a snapshot of a volume can be made now.
///
/// # Errors
/// Not found, no room, in use by somebody who cannot be kept from writing.
pub fn check_create(agent: &Agent, volume: &DesiredVolume, name: &Name) -> Result<(), ApiError> {
    let pool = pool_of(agent, volume)?;
    if pool.snapshots(&volume.id).map_err(|error| store(&error))?.contains(name) {
        return Err(store(&StoreError::VolumeSnapshotExists(name.clone())));
    }
    operate::not_exported(agent, volume, "have a snapshot made", Exported::Writable)?;
    let entry = match pool.volume(&volume.id) {
        Ok(entry) => entry,
        // It is made then.
        Err(StoreError::NoVolume(_)) => return Ok(()),
        Err(error) => return Err(store(&error)),
    };
    pool::has_room(&pool)?;
    pool::may_promise(agent, &pool, entry.allocated_bytes)?;
    if pool.is_at_rest(&volume.id).map_err(|error| store(&error))? {
        return Ok(());
    }
    let (vm, _) = writer(agent, volume)?;
    shares(agent, &pool, volume, &vm)
}

/// The VM that runs with the volume and may write to it, and whether it stands still already.
fn writer(agent: &Agent, volume: &DesiredVolume) -> Result<(VmId, bool), ApiError> {
    let name = &volume.name;
    let Some(vm) = agent.vms_on_disk().into_iter().find(|vm| describe::held_by(agent, vm).contains(&volume.id)) else {
        let text = format!("volume/{name} is in use, and not by a VM of this host");
        return Err(conflict(text, "`form doctor` and `lsof` may say by whom; try again when that is done".to_owned()));
    };
    let vm_name = describe::vm_name(agent, &vm);
    match agent.fleet.observed(&vm).map(|observed| observed.state) {
        Some(VmState::Running) => Ok((vm, false)),
        Some(VmState::Paused) => Ok((vm, true)),
        state => {
            let state = state.map_or("starting", VmState::as_str);
            let text = format!("vm/{vm_name}, which has volume/{name}, is {state}");
            Err(conflict(text, format!("wait for it: `form wait vm/{vm_name} --for=running`")))
        }
    }
}

/// A VM stands still for what takes no time, not for a copy of a whole disk.
///
/// # Errors
/// A conflict, in a pool that does not share blocks.
pub fn shares(agent: &Agent, pool: &Pool, volume: &DesiredVolume, vm: &VmId) -> Result<(), ApiError> {
    if pool.shares_blocks().map_err(|error| store(&error))? {
        return Ok(());
    }
    let (name, vm) = (&volume.name, describe::vm_name(agent, vm));
    let text = format!(
        "vm/{vm} runs with volume/{name}, and would stand still until all of it is copied: the file system of pool/{} does not share blocks \
         between files",
        pool.name()
    );
    Err(conflict(
        text,
        format!(
            "`form vm stop {vm}` or `form volume detach {name}` first, or keep the volume in a pool on XFS or Btrfs (`form volume move`)"
        ),
    ))
}

/// Makes one. Nothing is left of one that could not be made.
pub(super) fn create(agent: &Arc<Agent>, pool: &Pool, volume: &Name, progress: &Progress, name: &Name) -> Result<(), ApiError> {
    let volume = describe::volume_named(agent, volume)?;
    let operation = progress.operation.ok_or_else(|| internal(&"an operation without an id"))?;
    pool::has_room(pool)?;
    let drafted = {
        let _turn = agent.volume_turn();
        pool.settle_restore(&volume.id, volume.restored.as_ref())
            .and_then(|()| pool.ensure(&volume.id, volume.format, volume.size_bytes))
            .and_then(|_| pool.draft_snapshot(&volume.id, name, false))
    };
    let mut details = Details { operation, created_at: Timestamp::now(), consistency: Consistency::Stopped, pause_ms: None, part_of: None };
    let draft = match drafted {
        Ok(draft) => {
            agent.operations.step(operation, "copying the volume");
            draft.copy().map_err(|error| store(&error))?;
            draft
        }
        // Only who writes keeps readers out.
        Err(StoreError::VolumeInUse { path, user }) => {
            let (vm, _) = writer(agent, &volume).map_err(|_| {
                let error = StoreError::VolumeInUse { path, user };
                conflict(format!("volume/{}: {error}", volume.name), "end what uses it, and try again".to_owned())
            })?;
            shares(agent, pool, &volume, &vm)?;
            agent.operations.step(operation, "quiescing the guest's file systems");
            let (draft, still) = of_running(agent, pool, &volume, name, &vm)?;
            details.created_at = Timestamp::now();
            details.consistency = if still.frozen { Consistency::Quiesced } else { Consistency::Crash };
            details.pause_ms = still.pause_ms;
            draft
        }
        Err(error) => return Err(store(&error)),
    };
    let details = serde_json::to_value(&details).map_err(|error| internal(&error))?;
    draft.publish(details).map_err(|error| store(&error))
}

/// Of a volume that a VM writes to: at an instant at which the VM stands still.
fn of_running(
    agent: &Arc<Agent>,
    pool: &Pool,
    volume: &DesiredVolume,
    name: &Name,
    vm: &VmId,
) -> Result<(VolumeSnapshotDraft, Still), ApiError> {
    let turn = agent.volumes_of(vm);
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, stands) = writer(agent, volume)?;
    // Everything that may take time or fail is done before.
    let draft = pool.draft_snapshot(&volume.id, name, true).map_err(|error| store(&error))?;
    let still = still::while_still(agent, vm, !stands, || {
        reach(Failpoint::VolumeSnapshotPaused);
        draft.share().map_err(|error| store(&error))
    })?;
    Ok((draft, still))
}

/// Whether a volume can go back to a snapshot now.
pub(super) fn check_restore(agent: &Agent, volume: &DesiredVolume, request: &VolumeRestoreRequest) -> Result<(), ApiError> {
    let size_bytes = rules::restored_size(volume, request).map_err(rules::VolumeFault::into_api)?;
    let pool = pool_of(agent, volume)?;
    has_size(&pool, volume, &request.snapshot, size_bytes)?;
    pool::may_promise(agent, &pool, size_bytes.saturating_sub(volume.size_bytes))?;
    operate::not_exported(agent, volume, "be restored", Exported::Whatever)?;
    operate::not_held(agent, volume, "be restored")
}

/// Whether a clone can be made of the snapshot that it names.
pub(super) fn check_clone(agent: &Agent, volume: &DesiredVolume, request: &CloneRequest, name: &Name) -> Result<(), ApiError> {
    let size_bytes = rules::clone_size(volume, request).map_err(rules::VolumeFault::into_api)?;
    has_size(&*pool_of(agent, volume)?, volume, name, size_bytes)
}

/// The state learns the size from the request: it has to be true.
fn has_size(pool: &Pool, volume: &DesiredVolume, name: &Name, size_bytes: u64) -> Result<(), ApiError> {
    let (entry, _) = find(pool, volume, name)?;
    if entry.size_bytes == size_bytes {
        return Ok(());
    }
    let text = format!("the snapshot `{name}` has {} bytes, and not {size_bytes}", entry.size_bytes);
    Err(conflict(text, format!("ask for it with the size that it has: `\"size_bytes\": {}`", entry.size_bytes)))
}

/// Puts a volume back to a snapshot: what it will be is made beside it, then the state says so, then it takes its place in one step.
pub(super) fn restore(
    agent: &Agent,
    pool: &Pool,
    name: &Name,
    (progress, request): (&Progress, &SignedRequest),
    check: impl FnOnce() -> Result<(), ApiError>,
    wanted: &VolumeRestoreRequest,
) -> Result<(), ApiError> {
    let operation = progress.operation.ok_or_else(|| internal(&"an operation without an id"))?;
    pool::has_room(pool)?;
    pool.draft_restore(&progress.id, &wanted.snapshot, &operation).map_err(|error| store(&error))?;
    let _turn = agent.volume_turn();
    let submit = || {
        let held = pool.hold(&progress.id).map_err(|error| match error {
            StoreError::VolumeInUse { .. } => conflict(format!("volume/{name}: {error}"), "end what uses it, and try again".to_owned()),
            error => store(&error),
        })?;
        let _admission = agent.admission();
        check()?;
        if !pool.has_restore(&progress.id, &operation) {
            return Err(conflict(format!("volume/{name} was used just now"), "run the same command again".to_owned()));
        }
        agent.submit(request)?;
        Ok(held)
    };
    match submit() {
        Ok(held) => {
            reach(Failpoint::VolumeSubmitted);
            pool.settle_held(held, Some(&operation)).map_err(|error| store(&error))
        }
        Err(error) => {
            let before = describe::volume_named(agent, name).ok().and_then(|volume| volume.restored);
            if before != Some(operation)
                && let Err(stays) = pool.drop_restore(&progress.id, &operation)
            {
                tracing::warn!("what volume/{name} was to go back to stays: {stays}");
            }
            Err(error)
        }
    }
}

/// Whether the operation has made this snapshot.
pub(super) fn is_made(agent: &Agent, volume: &DesiredVolume, name: &Name, operation: Option<OperationId>) -> bool {
    let details = pool_of(agent, volume).and_then(|pool| find(&pool, volume, name));
    details.is_ok_and(|(_, details)| Some(details.operation) == operation)
}

/// A volume that has snapshots is not removed by mistake.
pub(super) fn none_left(agent: &Agent, volume: &DesiredVolume) -> Result<(), ApiError> {
    let pool = pool_of(agent, volume)?;
    let names = match pool.snapshots(&volume.id) {
        Ok(names) => names,
        // Of a pool that is not there nothing is removed anyway, and that is said better.
        Err(_) if pool.is_there().is_err() => return Ok(()),
        Err(error) => return Err(store(&error)),
    };
    if names.is_empty() {
        return Ok(());
    }
    let (name, listed) = (&volume.name, |separator: &str| names.iter().map(Name::as_str).collect::<Vec<_>>().join(separator));
    let text = format!("volume/{name} has snapshots: {}", listed(", "));
    let hint =
        format!("remove them first: `form volume snapshot rm {name} {}`, or with it: `form volume rm {name} --snapshots`", listed(" "));
    Err(conflict(text, hint))
}
