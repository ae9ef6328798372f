//! Operations on volumes: recorded, done, and after a crash finished or taken back.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError},
};

use form_api::{
    ApiError, ErrorCode,
    deploy::GivenVolume,
    operation::{Operation, OperationKind},
    vm::VmState,
    volume::{
        AttachRequest, CloneRequest, CreateRequest, DetachRequest, ExportRequest, MoveRequest, ResizeRequest, SetVolumeRequest,
        VolumeRestoreRequest,
    },
};
use form_state::Table;
use form_store::{Hold, Pool, StoreError};
use form_types::{Failpoint, Name, OperationId, VmId, VolumeFormat, VolumeId, failpoint::reach};
use serde::{Deserialize, Serialize};

use super::{DesiredVolume, describe, export, live, of_vm, pool, rules, snapshot, sync};
use crate::{
    agent::{Agent, internal},
    authorise::{self, Caller, SignedRequest},
    limits,
    operation::{Begun, Opening, Record},
    serve::store_error,
};

/// What is asked of a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Change {
    Create(CreateRequest),
    Attach(AttachRequest),
    Detach(DetachRequest),
    Resize(ResizeRequest),
    Set(SetVolumeRequest),
    Clone(CloneRequest),
    Move(MoveRequest),
    /// The new volume, which comes from elsewhere.
    Import(CreateRequest),
    Export(ExportRequest),
    Unexport,
    Remove,
    RemoveWithSnapshots,
    /// It is gone with its pool.
    Forget,
    /// A new one of this name.
    Snapshot(Name),
    RemoveSnapshot(Name),
    Restore(VolumeRestoreRequest),
    Sync,
}

impl Change {
    const fn kind(&self) -> OperationKind {
        match self {
            Self::Create(_) => OperationKind::VolumeCreate,
            Self::Attach(_) => OperationKind::VolumeAttach,
            Self::Detach(_) => OperationKind::VolumeDetach,
            Self::Resize(_) => OperationKind::VolumeResize,
            Self::Set(_) => OperationKind::VolumeSet,
            Self::Clone(_) => OperationKind::VolumeClone,
            Self::Move(_) => OperationKind::VolumeMove,
            Self::Import(_) => OperationKind::VolumeImport,
            Self::Export(_) => OperationKind::VolumeExport,
            Self::Unexport => OperationKind::VolumeUnexport,
            Self::Remove | Self::RemoveWithSnapshots | Self::Forget => OperationKind::VolumeRemove,
            Self::Snapshot(_) => OperationKind::VolumeSnapshotCreate,
            Self::RemoveSnapshot(_) => OperationKind::VolumeSnapshotRemove,
            Self::Restore(_) => OperationKind::VolumeRestore,
            Self::Sync => OperationKind::VolumeSync,
        }
    }
}

/// What is remembered of a change under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Progress {
    /// The volume that is made, changed or removed.
    pub(super) id: VolumeId,
    pub(super) pool: Name,
    pub(super) change: Change,
    request: SignedRequest,
    /// None of one that an earlier release began.
    #[serde(default)]
    pub(super) operation: Option<OperationId>,
}

/// How [`open`] went.
pub(super) enum Opened {
    New(OperationId, Box<Progress>),
    /// The same request was made before.
    Repeated(Box<Operation>),
}

/// Begins a change of the volume `name`; for [`Change::Create`] and [`Change::Clone`] that is the new one, and the source.
///
/// # Errors
/// What stands in the way before anything is changed.
pub fn begin(agent: &Arc<Agent>, caller: &Caller, name: &Name, change: Change) -> Result<Operation, ApiError> {
    let (id, progress) = match open(agent, caller, name, change)? {
        Opened::Repeated(operation) => return Ok(*operation),
        Opened::New(id, progress) => (id, progress),
    };
    let (task_agent, name) = (Arc::clone(agent), name.clone());
    tokio::task::spawn_blocking(move || {
        let result = perform(&task_agent, &name, &progress);
        task_agent.operations.finish(id, result);
    });
    agent.operations.get(id)
}

/// Checks and records a change; whoever gets a new one does it, and finishes it.
///
/// # Errors
/// What stands in the way before anything is changed.
pub(super) fn open(agent: &Agent, caller: &Caller, name: &Name, change: Change) -> Result<Opened, ApiError> {
    let subject = match &change {
        Change::Clone(request) => format!("volume/{}", request.name),
        _ => format!("volume/{name}"),
    };
    let opening = Opening {
        kind: change.kind(),
        vm: None,
        subject,
        actor: caller.actor.clone(),
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    match change {
        // These free room, or hold back who takes it.
        Change::Remove | Change::RemoveWithSnapshots | Change::Forget | Change::RemoveSnapshot(_) | Change::Detach(_) | Change::Set(_) => {
            agent.use_headroom()
        }
        _ => agent.keep_headroom(),
    }
    // A repeated request is answered whatever has become of the volume by now.
    let repeated = agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_ok();
    if !repeated {
        check(agent, name, &change)?;
    }
    let id = match agent.operations.begin(opening)? {
        Begun::Repeated(operation) => return Ok(Opened::Repeated(operation)),
        Begun::New(id) => id,
    };
    match remember(agent, caller, id, name, change) {
        Ok(progress) => Ok(Opened::New(id, Box::new(progress))),
        Err(error) => {
            agent.operations.finish(id, Err(error.clone()));
            Err(error)
        }
    }
}

fn remember(agent: &Agent, caller: &Caller, id: OperationId, name: &Name, change: Change) -> Result<Progress, ApiError> {
    let (id_of_it, pool) = match &change {
        Change::Create(request) | Change::Import(request) => (
            VolumeId::derive(&caller.key, &caller.idempotency_key, request.name.as_str()),
            request.pool.clone().unwrap_or_else(form_store::local_pool),
        ),
        Change::Clone(request) => {
            let source = describe::volume_named(agent, name)?;
            (VolumeId::derive(&caller.key, &caller.idempotency_key, request.name.as_str()), source.pool)
        }
        _ => {
            let volume = describe::volume_named(agent, name)?;
            (volume.id, volume.pool)
        }
    };
    let progress = Progress { id: id_of_it, pool, change, request: caller.signed.clone(), operation: Some(id) };
    agent.operations.remember(id, serde_json::to_value(&progress).map_err(|error| internal(&error))?)?;
    Ok(progress)
}

/// Whether it can be done now.
fn check(agent: &Agent, name: &Name, change: &Change) -> Result<(), ApiError> {
    let view = agent.view();
    let fault = rules::VolumeFault::into_api;
    if let Change::Create(request) | Change::Import(request) = change {
        let pool = agent.store.pool(request.pool.as_ref().unwrap_or(&form_store::local_pool())).map_err(|error| store_error(&error))?;
        request.limits.check().map_err(|error| fault(error.into()))?;
        rules::check_new(&request.name, request.size_bytes, &view).map_err(fault)?;
        pool.is_there().map_err(|error| store_error(&error))?;
        return pool::may_promise(agent, &pool, request.size_bytes);
    }
    let volume = rules::existing(name, &view).map_err(fault)?;
    if volume.host != agent.host_id() {
        return Err(fault(rules::VolumeFault::NotYours(volume.name)));
    }
    match change {
        Change::Snapshot(name) => snapshot::check_create(agent, &volume, name),
        Change::RemoveSnapshot(name) => snapshot::check_remove(agent, &volume, name),
        Change::Restore(request) => snapshot::check_restore(agent, &volume, request),
        change => check_of(agent, &volume, &view, change),
    }
}

/// Of a volume that is there, and this host's.
fn check_of(agent: &Agent, volume: &DesiredVolume, view: &form_state::View, change: &Change) -> Result<(), ApiError> {
    let fault = rules::VolumeFault::into_api;
    match change {
        Change::Create(_) | Change::Import(_) | Change::Sync => Ok(()),
        Change::Snapshot(_) | Change::RemoveSnapshot(_) | Change::Restore(_) => Ok(()),
        Change::Export(request) => {
            export::check(request)?;
            not_exported(agent, volume, "be exported once more", Whatever)?;
            not_held(agent, volume, "be exported")
        }
        Change::Unexport => match agent.exports.of(&volume.id) {
            Some(_) => Ok(()),
            None => {
                Err(ApiError::new(ErrorCode::Conflict, format!("volume/{} is not exported", volume.name)).hint("see `form volume show`"))
            }
        },
        Change::Attach(request) => {
            let vm = rules::check_attach(volume, request, view).map_err(fault)?;
            can_be_given(agent, &vm, request)?;
            not_exported(agent, volume, "be attached", Whatever)?;
            if describe::held_by(agent, &vm).contains(&volume.id) { Ok(()) } else { not_held(agent, volume, "be attached") }
        }
        Change::Detach(_) => {
            rules::check_detach(volume).map_err(fault)?;
            not_exported(agent, volume, "be detached", Writable)?;
            can_be_let_go(agent, volume)
        }
        Change::Resize(request) => {
            rules::check_resize(volume, request.size_bytes).map_err(fault)?;
            pool::may_promise(agent, &*pool_of(agent, volume)?, request.size_bytes - volume.size_bytes)
        }
        Change::Set(request) if request.is_empty() => {
            Err(ApiError::new(ErrorCode::Invalid, "nothing is to be set").hint("say what: iops, bytes_per_second"))
        }
        Change::Set(request) => rules::check_set(volume, request).map(drop).map_err(fault),
        Change::Clone(request) => {
            let size_bytes = rules::clone_size(volume, request).map_err(fault)?;
            rules::check_new(&request.name, size_bytes, view).map_err(fault)?;
            pool::may_promise(agent, &*pool_of(agent, volume)?, size_bytes)?;
            if let Some(snapshot) = &request.snapshot {
                return snapshot::check_clone(agent, volume, request, snapshot);
            }
            not_exported(agent, volume, "be cloned", Writable)?;
            not_held(agent, volume, "be cloned")
        }
        Change::Move(request) => {
            rules::check_move(volume, &request.pool).map_err(fault)?;
            let target = agent.store.pool(&request.pool).map_err(|error| store_error(&error))?;
            target.is_there().map_err(|error| store_error(&error))?;
            let snapshots = pool_of(agent, volume)?.snapshot_bytes(&volume.id);
            pool::may_promise(agent, &target, volume.size_bytes.saturating_add(snapshots))?;
            not_exported(agent, volume, "be moved", Whatever)?;
            not_held(agent, volume, "be moved")
        }
        Change::Remove | Change::RemoveWithSnapshots => {
            rules::check_remove(volume, view).map_err(fault)?;
            if matches!(change, Change::Remove) {
                snapshot::none_left(agent, volume)?;
            }
            not_exported(agent, volume, "be removed", Writable)?;
            not_held(agent, volume, "be removed")
        }
        Change::Forget => {
            rules::check_remove(volume, view).map_err(fault)?;
            if pool_of(agent, volume)?.is_there().is_ok() {
                let text = format!("pool/{} is there, and volume/{} is not lost with it", volume.pool, volume.name);
                let hint = format!("remove it as any other: `form volume rm {}`", volume.name);
                return Err(ApiError::new(ErrorCode::Conflict, text).hint(hint));
            }
            not_held(agent, volume, "be removed")
        }
    }
}

fn pool_of(agent: &Agent, volume: &DesiredVolume) -> Result<Arc<Pool>, ApiError> {
    agent.store.pool(&volume.pool).map_err(|error| store_error(&error))
}

/// Which exports of a volume stand in the way of a change.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Exported {
    Writable,
    Whatever,
}

use Exported::{Whatever, Writable};

/// # Errors
/// A conflict, when there is such an export.
pub fn not_exported(agent: &Agent, volume: &DesiredVolume, what: &str, which: Exported) -> Result<(), ApiError> {
    match agent.exports.of(&volume.id).filter(|export| export.writable || which == Whatever) {
        Some(export) => {
            let how = if export.writable { " for writing" } else { "" };
            let text = format!("volume/{} is exported over NBD{how}, at {}, and cannot {what} meanwhile", volume.name, export.uri);
            Err(ApiError::new(ErrorCode::Conflict, text).hint(format!("end that first: `form volume unexport {}`", volume.name)))
        }
        None => Ok(()),
    }
}

/// No VM process of this host has it open.
pub(super) fn not_held(agent: &Agent, volume: &DesiredVolume, what: &str) -> Result<(), ApiError> {
    match agent.vms_on_disk().into_iter().find(|vm| describe::held_by(agent, vm).contains(&volume.id)) {
        Some(vm) => {
            let holder = describe::vm_name(agent, &vm);
            let text = format!("vm/{holder} runs with volume/{}, which cannot {what} meanwhile", volume.name);
            Err(ApiError::new(ErrorCode::Conflict, text).hint(format!("stop it first: `form vm stop {holder}`")))
        }
        None => Ok(()),
    }
}

/// A guest says what became of a volume that it gets while it runs, and mounts it; without ours there is nobody to say it.
fn can_be_given(agent: &Agent, vm: &VmId, request: &AttachRequest) -> Result<(), ApiError> {
    let Some(vm) = agent.desired(vm).filter(|vm| !vm.request.has_guest()) else { return Ok(()) };
    let name = vm.name();
    if request.path.is_some() {
        let refused = crate::action::no_guest(name, "which mounts volumes");
        return Err(refused.hint("attach it without a path: the VM sees a disk with the serial that `form volume show` says"));
    }
    let is_off = agent.fleet.observed(&vm.id).is_some_and(|observed| observed.state == VmState::Stopped);
    if is_off {
        return Ok(());
    }
    let refused = crate::action::no_guest(name, "which says that a volume has arrived");
    Err(refused.hint(format!("attach it while the VM is off: `form vm stop {name}`")))
}

/// Nobody has it open but a VM that runs, whose guest can be asked for it.
fn can_be_let_go(agent: &Agent, volume: &DesiredVolume) -> Result<(), ApiError> {
    match &volume.attached {
        Some(attached) if live::is_possible(agent, &attached.vm) => Ok(()),
        _ => not_held(agent, volume, "be detached"),
    }
}

fn perform(agent: &Arc<Agent>, name: &Name, progress: &Progress) -> Result<(), ApiError> {
    let pool = agent.store.pool(&progress.pool).map_err(|error| store_error(&error))?;
    let pool = &*pool;
    let _in_use = pool.enter().map_err(|error| store_error(&error))?;
    // One that does not answer is waited for before it is anybody's turn.
    if pool.export().is_some() && !matches!(progress.change, Change::Detach(_) | Change::Unexport | Change::Set(_) | Change::Forget) {
        pool.is_there().map_err(|error| store_error(&error))?;
    }
    match &progress.change {
        Change::Move(request) => return relocate(agent, pool, name, progress, request),
        Change::Snapshot(snapshot) => return snapshot::create(agent, pool, name, progress, snapshot),
        Change::Sync => {
            return sync::sync(agent, pool, name, |message| {
                if let Some(id) = progress.operation {
                    agent.operations.step(id, message);
                }
            });
        }
        Change::RemoveSnapshot(snapshot) => return pool.remove_snapshot(&progress.id, snapshot).map_err(|error| store_error(&error)),
        Change::Restore(request) => {
            let check = || check(agent, name, &progress.change);
            return snapshot::restore(agent, pool, name, (progress, &progress.request), check, request);
        }
        _ => {}
    }
    make(agent, pool, name, progress)?;
    let Some(vm) = vm_of(agent, name, &progress.change) else { return complete(agent, pool, name, progress) };
    let turn = agent.volumes_of(&vm);
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    if let Change::Detach(request) = &progress.change
        && live::is_possible(agent, &vm)
    {
        live::unplug(agent, &vm, &describe::volume_named(agent, name)?, request.force)?;
    }
    complete(agent, pool, name, progress)?;
    match &progress.change {
        Change::Attach(_) if live::is_possible(agent, &vm) => {
            live::plug(agent, &vm, describe::volume_named(agent, name)?).inspect_err(|_| take_back(agent, name))
        }
        Change::Resize(_) if live::is_possible(agent, &vm) => live::grow(agent, &vm, &describe::volume_named(agent, name)?),
        // The guest has no part in it.
        Change::Set(_) => limits::of_volume(agent, &vm, &describe::volume_named(agent, name)?),
        _ => Ok(()),
    }
}

/// Copies a volume to another pool, compares, and only then says that it lives there and removes the first one. It is whole in the pool that
/// the state names at every moment, and nobody writes to it until it is done.
fn relocate(agent: &Agent, from: &Pool, name: &Name, progress: &Progress, request: &MoveRequest) -> Result<(), ApiError> {
    let store = |error: StoreError| store_error(&error);
    let target = agent.store.pool(&request.pool).map_err(store)?;
    let _in_use = target.enter().map_err(store)?;
    let volume = describe::volume_named(agent, name)?;
    {
        let _turn = agent.volume_turn();
        from.settle_restore(&volume.id, volume.restored.as_ref()).map_err(store)?;
    }
    pool::has_room(&target)?;
    target.can_hold(volume.format, volume.size_bytes).map_err(store)?;
    let held = target.copy_from(from, &progress.id).map_err(store)?;
    reach(Failpoint::VolumeMade);
    let submit = || {
        let _turn = agent.volume_turn();
        let _admission = agent.admission();
        check(agent, name, &progress.change)?;
        // A VM that was started and stopped meanwhile would have made it.
        if held.is_none() && !matches!(from.volume(&progress.id), Err(StoreError::NoVolume(_))) {
            let text = format!("volume/{name} was used for the first time just now");
            return Err(ApiError::new(ErrorCode::Conflict, text).hint("run the same command again"));
        }
        agent.submit(&progress.request)
    };
    if let Err(error) = submit() {
        if let Err(stays) = target.hold(&progress.id).and_then(|held| target.remove(held)) {
            tracing::warn!("the copy of volume/{name} in pool/{} stays: {stays}", request.pool);
        }
        return Err(error);
    }
    reach(Failpoint::VolumeSubmitted);
    // The lock that kept writers away from the old one.
    drop(held);
    settle(from, progress, None)
}

/// The VM whose guest may have to take part.
fn vm_of(agent: &Agent, name: &Name, change: &Change) -> Option<VmId> {
    match change {
        Change::Attach(request) => crate::desired::vm_named(&agent.view(), &request.vm).map(|vm| vm.id),
        Change::Detach(_) | Change::Resize(_) | Change::Set(_) => {
            describe::volume_named(agent, name).ok()?.attached.map(|attached| attached.vm)
        }
        _ => None,
    }
}

/// What a running VM could not be given is not attached. A VM that has it all the same, or ended meanwhile, keeps it as it is written down.
fn take_back(agent: &Agent, name: &Name) {
    let _turn = agent.volume_turn();
    let taken_back = describe::volume_named(agent, name).and_then(|volume| {
        not_held(agent, &volume, "be detached")?;
        agent.submit(&authorise::own(agent, "POST", &format!("/v1/volumes/{name}/detach"), "")?)
    });
    if let Err(error) = taken_back {
        tracing::warn!("volume/{name} stays attached: {error}");
    }
}

/// What is left to do when a new volume's bytes are there; they are removed again when it cannot be.
pub(super) fn complete(agent: &Agent, pool: &Pool, name: &Name, progress: &Progress) -> Result<(), ApiError> {
    let result = record(agent, pool, name, progress);
    let is_known = || agent.view().cluster().record(Table::Volumes, progress.id).is_some();
    if let (Change::Create(_) | Change::Clone(_) | Change::Import(_), Err(_)) = (&progress.change, &result)
        && !is_known()
        && let Err(error) = pool.hold(&progress.id).and_then(|held| pool.remove(held))
    {
        tracing::warn!("a volume that nobody knows stays: {error}");
    }
    result
}

/// New bytes first: what the state knows is there.
fn make(agent: &Agent, pool: &Pool, name: &Name, progress: &Progress) -> Result<(), ApiError> {
    let store = |error: StoreError| store_error(&error);
    match &progress.change {
        Change::Create(request) => {
            pool::has_room(pool)?;
            pool.can_hold(request.format, request.size_bytes).map_err(store)?;
            pool.create(&progress.id, request.format, request.size_bytes).map_err(store)?;
        }
        Change::Clone(request) => {
            pool::has_room(pool)?;
            let source = describe::volume_named(agent, name)?;
            match (&request.snapshot, pool.volume(&source.id)) {
                (Some(snapshot), _) => pool.clone_snapshot(&source.id, snapshot, &progress.id).map_err(store)?,
                (None, Ok(_)) => pool.clone_volume(&source.id, &progress.id).map_err(store)?,
                // Of one that was never used there is nothing to copy.
                (None, Err(StoreError::NoVolume(_))) => pool.create(&progress.id, source.format, source.size_bytes).map_err(store)?,
                (None, Err(error)) => return Err(store(error)),
            };
        }
        Change::Resize(request) => {
            let volume = describe::volume_named(agent, name)?;
            return pool.can_hold(volume.format, request.size_bytes).map_err(store);
        }
        Change::Attach(AttachRequest { path: Some(_), read_only: true, .. }) if is_blank(pool, &progress.id) => {
            let text = format!("volume/{name} never held anything, and a VM that cannot write to it cannot make a file system on it");
            return Err(ApiError::new(ErrorCode::Conflict, text).hint("attach it without --read-only first, or without a path"));
        }
        _ => return Ok(()),
    }
    reach(Failpoint::VolumeMade);
    Ok(())
}

/// Nobody has it open and nothing was ever written to it.
fn is_blank(pool: &Pool, id: &VolumeId) -> bool {
    match pool.open_volume(id, true) {
        Ok(open) => open.is_blank,
        Err(error) => matches!(error, StoreError::NoVolume(_)),
    }
}

/// Writes down what should be, and does what is left to do. Until it returns no VM starts with a volume.
fn record(agent: &Agent, pool: &Pool, name: &Name, progress: &Progress) -> Result<(), ApiError> {
    let _turn = agent.volume_turn();
    match &progress.change {
        // Things of this run of the agent, of which the state says nothing.
        Change::Export(request) => {
            check(agent, name, &progress.change)?;
            return export::start(agent, pool, &describe::volume_named(agent, name)?, request);
        }
        Change::Unexport => {
            agent.exports.end(&progress.id);
            return Ok(());
        }
        // They end an export that only reads.
        Change::Remove | Change::RemoveWithSnapshots | Change::Forget | Change::Detach(_) => {
            check(agent, name, &progress.change)?;
            agent.exports.end(&progress.id);
        }
        _ => {}
    }
    let held = hold(pool, name, progress)?;
    {
        let _admission = agent.admission();
        check(agent, name, &progress.change)?;
        agent.submit(&progress.request)?;
    }
    reach(Failpoint::VolumeSubmitted);
    if let Change::Resize(request) = &progress.change
        && export::grow(agent, pool, &progress.id, request.size_bytes)?
    {
        return Ok(());
    }
    settle(pool, progress, held)
}

/// The volume, when it may be changed only while nobody has it open: the state may be wrong about that, its lock is not.
fn hold(pool: &Pool, name: &Name, progress: &Progress) -> Result<Option<Hold>, ApiError> {
    match (&progress.change, pool.hold(&progress.id)) {
        (Change::Remove | Change::RemoveWithSnapshots | Change::Detach(_), Err(error @ StoreError::VolumeInUse { .. })) => {
            Err(ApiError::new(ErrorCode::Conflict, format!("volume/{name}: {error}")).hint("end what uses it, and try again"))
        }
        (Change::Remove | Change::RemoveWithSnapshots, Err(error)) => {
            let hint = format!("is the file system of its pool mounted? If it is gone for good: `form volume rm {name} --lost`");
            Err(store_error(&error).hint(hint))
        }
        (Change::Remove | Change::RemoveWithSnapshots, Ok(held)) => Ok(Some(held)),
        (Change::Detach(_), held) => Ok(held.ok()),
        _ => Ok(None),
    }
}

/// What is left to do once the state says what should be.
fn settle(pool: &Pool, progress: &Progress, held: Option<Hold>) -> Result<(), ApiError> {
    match &progress.change {
        // What is in the pool that it came from.
        Change::Remove | Change::RemoveWithSnapshots | Change::Move(_) => {
            let held = held.map_or_else(|| pool.hold(&progress.id), Ok).map_err(|error| store_error(&error))?;
            pool.remove(held).map_err(|error| store_error(&error))
        }
        Change::Forget => pool.forget(&progress.id).map_err(|error| store_error(&error)),
        Change::Resize(request) => match pool.grow(&progress.id, request.size_bytes) {
            // Made when the VM starts, or grown then, unless it can be while it runs.
            Ok(_) | Err(StoreError::NoVolume(_) | StoreError::VolumeInUse { .. }) => Ok(()),
            Err(error) => Err(store_error(&error)),
        },
        Change::Create(_) | Change::Clone(_) | Change::Import(_) | Change::Attach(_) | Change::Detach(_) | Change::Set(_) => Ok(()),
        Change::Export(_) | Change::Unexport => Ok(()),
        Change::Snapshot(_) | Change::RemoveSnapshot(_) | Change::Sync => Ok(()),
        Change::Restore(_) => pool.settle_restore(&progress.id, progress.operation.as_ref()).map_err(|error| store_error(&error)),
    }
}

/// Ends what an earlier run of the agent left unfinished: what the state knows is completed, everything else is taken back.
pub fn resume(agent: &Arc<Agent>, record: &Record) {
    let id = record.operation.id;
    let progress: Option<Progress> = record.resume.clone().and_then(|resume| serde_json::from_value(resume).ok());
    let result = progress.map_or_else(|| Err(nothing_changed()), |progress| resume_one(agent, &progress));
    agent.operations.finish(id, result);
}

fn nothing_changed() -> ApiError {
    ApiError::new(ErrorCode::Failed, "the agent was stopped before it changed anything").hint("run the same command again")
}

fn resume_one(agent: &Agent, progress: &Progress) -> Result<(), ApiError> {
    let view = agent.view();
    let known = view.cluster().record(Table::Volumes, progress.id).is_some();
    let desired = super::volumes(&view).into_values().find(|volume| volume.id == progress.id);
    let is_done = match &progress.change {
        Change::Create(_) | Change::Clone(_) | Change::Import(_) => known,
        // Exports have ended with the agent that had them.
        Change::Export(_) => false,
        // It finds again what is left to do.
        Change::Sync => false,
        Change::Unexport => true,
        Change::Remove | Change::RemoveWithSnapshots | Change::Forget => !known,
        Change::Snapshot(name) => desired.as_ref().is_some_and(|volume| snapshot::is_made(agent, volume, name, progress.operation)),
        Change::RemoveSnapshot(name) => desired.as_ref().is_none_or(|volume| snapshot::one(agent, volume, name).is_err()),
        Change::Restore(_) => desired.as_ref().is_some_and(|volume| volume.restored == progress.operation),
        Change::Move(request) => desired.as_ref().is_none_or(|volume| volume.pool == request.pool),
        Change::Resize(request) => desired.as_ref().is_some_and(|volume| volume.size_bytes == request.size_bytes),
        // A VM that runs is told when its guest is next heard of.
        Change::Set(request) => desired.as_ref().is_some_and(|volume| rules::check_set(volume, request) == Ok(volume.limits)),
        Change::Attach(request) => {
            let vm = crate::desired::vm_named(&view, &request.vm);
            vm.is_some_and(|vm| of_vm(&view, &vm.id).iter().any(|volume| volume.id == progress.id))
        }
        Change::Detach(_) => desired.as_ref().is_some_and(|volume| volume.attached.is_none()),
    };
    let _turn = agent.volume_turn();
    let pool = agent.store.pool(&progress.pool).map_err(|error| store_error(&error))?;
    let pool = &*pool;
    if is_done {
        return settle(pool, progress, None);
    }
    if let Change::Move(request) = &progress.change {
        let target = agent.store.pool(&request.pool).map_err(|error| store_error(&error))?;
        target.hold(&progress.id).and_then(|held| target.remove(held)).map_err(|error| store_error(&error))?;
    }
    if let (Change::Restore(_), Some(operation)) = (&progress.change, &progress.operation) {
        pool.drop_restore(&progress.id, operation).map_err(|error| store_error(&error))?;
    }
    if matches!(progress.change, Change::Create(_) | Change::Clone(_) | Change::Import(_)) {
        pool.hold(&progress.id).and_then(|held| pool.remove(held)).map_err(|error| store_error(&error))?;
    }
    Err(nothing_changed())
}

/// Whether the pools have room for what a deploy asks for, and files of these sizes.
fn can_hold(agent: &Agent, deployed: &rules::Deployed) -> Result<(), ApiError> {
    let store = |error: StoreError| store_error(&error);
    let local = form_store::local_pool();
    let mut more: BTreeMap<&Name, u64> = BTreeMap::new();
    for size in deployed.new.values() {
        agent.store.pool(&local).and_then(|pool| pool.can_hold(VolumeFormat::Raw, *size)).map_err(store)?;
        *more.entry(&local).or_default() += size;
    }
    for (volume, size) in &deployed.grown {
        agent.store.pool(&volume.pool).and_then(|pool| pool.can_hold(volume.format, *size)).map_err(store)?;
        *more.entry(&volume.pool).or_default() += size - volume.size_bytes;
    }
    for (name, bytes) in more {
        let pool = agent.store.pool(name).map_err(store)?;
        pool::has_room(&pool)?;
        pool::may_promise(agent, &pool, bytes)?;
    }
    Ok(())
}

/// Whether a new VM can have these volumes.
///
/// # Errors
/// When one is not there, or somebody has it.
pub fn of_create(agent: &Agent, given: &[GivenVolume], name: &Name) -> Result<(), ApiError> {
    let volumes = rules::check_given(given, name, &agent.host_id(), &agent.view()).map_err(rules::VolumeFault::into_api)?;
    volumes.iter().try_for_each(|volume| {
        not_exported(agent, volume, "be attached", Whatever)?;
        not_held(agent, volume, "be attached")
    })
}

/// What a deploy would do to the volumes of its Formfile.
///
/// # Errors
/// When another VM has one of them, or a path is taken.
pub fn of_deploy(agent: &Agent, request: &form_api::deploy::DeployRequest) -> Result<rules::Deployed, ApiError> {
    let view = agent.view();
    let vm = crate::desired::vm_named(&view, &request.spec.name);
    let host = vm.as_ref().map_or_else(|| agent.host_id(), |vm| vm.host);
    let deployed = rules::deployed(request, vm.as_ref().map(|vm| &vm.id), &host, &view).map_err(rules::VolumeFault::into_api)?;
    can_hold(agent, &deployed)?;
    for volume in deployed.taken.iter().chain(deployed.grown.iter().map(|(volume, _)| volume)) {
        not_exported(agent, volume, "be attached or resized", Whatever)?;
    }
    // One that was detached from a VM that still runs with it.
    for volume in &deployed.taken {
        let holder = agent.vms_on_disk().into_iter().find(|id| describe::held_by(agent, id).contains(&volume.id));
        if holder.is_some() && holder != vm.as_ref().map(|vm| vm.id) {
            not_held(agent, volume, "be attached")?;
        }
    }
    Ok(deployed)
}
