//! The volumes of a VM in its snapshots.
//!
//! Of each volume that the VM can write to there is a snapshot of the volume, in its own pool and under the same name: a *part* of the VM's.
//! Parts get their names before the VM's snapshot does and lose them after it has: what a killed agent leaves are parts of nothing, which
//! nobody goes back to. A volume that the VM can only read is not kept, and has to be as it was.

use std::{collections::BTreeSet, sync::Arc, time::SystemTime};

use form_api::{ApiError, ErrorCode};
use form_store::{Hold, Pool, VolumeSnapshotDraft};
use form_types::{Name, OperationId, VmId, VolumeId};
use serde::{Deserialize, Serialize};

use crate::{
    agent::{Agent, internal},
    desired::DesiredVm,
    driver::process::RuntimeDirectory,
    serve::store_error,
    volume::{
        DesiredVolume,
        attach::{self, Ready},
        describe, of_vm,
        operate::{Exported, not_exported},
        pool,
        snapshot::{self, Part, PartDetails},
        volumes,
    },
};

/// A volume that a VM had when its snapshot was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptVolume {
    pub id: VolumeId,
    pub name: Name,
    /// Where its guest had it mounted.
    pub path: Option<String>,
    pub size_bytes: u64,
    /// Of one that the VM could only read: when it was last written to. It is not in the snapshot.
    pub read_only: Option<SystemTime>,
}

impl KeptVolume {
    /// Whether what it held is in the snapshot.
    pub const fn is_kept(&self) -> bool {
        self.read_only.is_none()
    }
}

fn conflict(text: String, hint: String) -> ApiError {
    ApiError::new(ErrorCode::Conflict, text).hint(hint)
}

fn pool_of(agent: &Agent, volume: &DesiredVolume) -> Result<Arc<Pool>, ApiError> {
    agent.store.pool(&volume.pool).map_err(|error| store_error(&error))
}

fn is_read_only(volume: &DesiredVolume) -> bool {
    volume.attached.as_ref().is_some_and(|attached| attached.read_only)
}

/// Whether the volumes of a VM can be kept under this name now.
///
/// # Errors
/// A name that is taken, no room, a pool that cannot share blocks while the VM runs, a volume that is exported for writing.
pub fn check_create(agent: &Agent, vm: &DesiredVm, name: &Name, runs: bool) -> Result<(), ApiError> {
    if runs {
        agree(agent, vm)?;
    }
    for volume in of_vm(&agent.view(), &vm.id).iter().filter(|volume| !is_read_only(volume)) {
        let taken = pool_of(agent, volume)?.snapshots(&volume.id).map_err(|error| store_error(&error))?;
        if taken.contains(name) {
            let text = format!("volume/{} has a snapshot `{name}` of its own", volume.name);
            return Err(conflict(text, "give the snapshot of the VM another name: `--name`".to_owned()));
        }
        snapshot::check_create(agent, volume, name)?;
    }
    Ok(())
}

/// A VM that runs has the volumes that it should have, and no other.
fn agree(agent: &Agent, vm: &DesiredVm) -> Result<(), ApiError> {
    let desired = of_vm(&agent.view(), &vm.id);
    let held: BTreeSet<VolumeId> = RuntimeDirectory::new(&agent.paths().vm_runtime(), &vm.id).held_volumes().into_iter().collect();
    let name = vm.name();
    if let Some(missing) = desired.iter().find(|volume| !held.contains(&volume.id)) {
        let text = format!("vm/{name} runs without volume/{}, which it should have", missing.name);
        return Err(conflict(text, format!("have it mended with `form volume sync {}`, or `form vm restart {name}`", missing.name)));
    }
    if held.len() > desired.len() {
        let text = format!("vm/{name} still has a volume that was taken from it");
        return Err(conflict(text, "try again in a moment; `form doctor` says which one it is".to_owned()));
    }
    Ok(())
}

/// Parts that are being made. Dropped before [`Drafts::publish`] they are gone.
pub struct Drafts {
    drafts: Vec<VolumeSnapshotDraft>,
    volumes: Vec<KeptVolume>,
}

impl Drafts {
    /// Begins them: all that may take time or fail is done now. `runs`: the VM has its volumes open, and will be kept from writing; the caller
    /// has its turn for volumes. Else each is locked against writers.
    ///
    /// # Errors
    /// As [`check_create`]; that a volume is in use.
    pub fn begin(agent: &Agent, vm: &DesiredVm, name: &Name, runs: bool) -> Result<Self, ApiError> {
        if runs {
            agree(agent, vm)?;
        }
        let _turn = agent.volume_turn();
        let mut all = Self { drafts: Vec::new(), volumes: Vec::new() };
        for volume in of_vm(&agent.view(), &vm.id) {
            let pool = pool_of(agent, &volume)?;
            let failed = |error: form_store::StoreError| match error {
                error @ form_store::StoreError::VolumeInUse { .. } => {
                    conflict(format!("volume/{}: {error}", volume.name), "end what uses it, and try again".to_owned())
                }
                error => store_error(&error),
            };
            pool::has_room(&pool)?;
            if !runs {
                pool.settle_restore(&volume.id, volume.restored.as_ref()).map_err(failed)?;
                pool.ensure(&volume.id, volume.format, volume.size_bytes).map_err(failed)?;
            }
            let mut kept = KeptVolume {
                id: volume.id,
                name: volume.name.clone(),
                path: volume.attached.as_ref().and_then(|attached| attached.path.clone()),
                size_bytes: volume.size_bytes,
                read_only: None,
            };
            if is_read_only(&volume) {
                kept.read_only = Some(pool.written_at(&volume.id).map_err(failed)?);
            } else {
                if runs {
                    snapshot::shares(agent, &pool, &volume, &vm.id)?;
                }
                let draft = pool.draft_snapshot(&volume.id, name, runs).map_err(failed)?;
                kept.size_bytes = draft.size_bytes();
                all.drafts.push(draft);
            }
            all.volumes.push(kept);
        }
        Ok(all)
    }

    /// At the instant at which the VM stands still; takes no time.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn share(&self) -> Result<(), ApiError> {
        self.drafts.iter().try_for_each(VolumeSnapshotDraft::share).map_err(|error| store_error(&error))
    }

    /// Of a VM that does not run.
    ///
    /// # Errors
    /// No room.
    pub fn copy(&self) -> Result<(), ApiError> {
        self.drafts.iter().try_for_each(VolumeSnapshotDraft::copy).map_err(|error| store_error(&error))
    }

    /// Gives them their names. Who gets an error takes back what has one already: [`remove_made_by`].
    ///
    /// # Errors
    /// No room, those of the file system.
    pub fn publish(self, details: &PartDetails) -> Result<Vec<KeptVolume>, ApiError> {
        let json = serde_json::to_value(details).map_err(|error| internal(&error))?;
        for draft in self.drafts {
            draft.publish(json.clone()).map_err(|error| store_error(&error))?;
        }
        Ok(self.volumes)
    }
}

fn remove(agent: &Agent, which: impl Fn(&Part) -> bool) -> Result<(), ApiError> {
    let mut failed = None;
    for part in snapshot::parts(agent).into_iter().filter(|part| which(part)) {
        let removed = pool_of(agent, &part.volume)
            .and_then(|pool| pool.remove_snapshot(&part.volume.id, &part.name).map_err(|error| store_error(&error)));
        if let Err(error) = removed {
            tracing::warn!("the snapshot {} of volume/{} stays until `form doctor --fix`: {error}", part.name, part.volume.name);
            failed = Some(error);
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Takes back what an operation that failed has made.
///
/// # Errors
/// Those of the file system; the rest is removed.
pub fn remove_made_by(agent: &Agent, operation: OperationId) -> Result<(), ApiError> {
    remove(agent, |part| part.details.operation == operation)
}

/// Removes the parts of a VM's snapshot that is gone.
///
/// # Errors
/// Those of the file system; the rest is removed.
pub fn remove_of(agent: &Agent, vm: &VmId, name: &Name) -> Result<(), ApiError> {
    remove(agent, |part| part.is_of(vm) && part.name == *name)
}

/// Of all snapshots of a VM that is gone.
///
/// # Errors
/// Those of the file system; the rest is removed.
pub fn remove_of_vm(agent: &Agent, vm: &VmId) -> Result<(), ApiError> {
    remove(agent, |part| part.is_of(vm))
}

/// Parts of snapshots that do not exist, and that nobody is making: volume and name. For `form doctor`.
pub fn left_over(agent: &Agent) -> Vec<(Name, Name)> {
    let found = snapshot::parts(agent).into_iter().filter(|part| snapshot::whole_of(agent, part).is_none());
    found.map(|part| (part.volume.name, part.name)).collect()
}

/// Removes such a one.
///
/// # Errors
/// Those of the file system.
pub fn remove_left_over(agent: &Agent, volume: &Name, name: &Name) -> Result<(), ApiError> {
    remove(agent, |part| part.volume.name == *volume && part.name == *name && snapshot::whole_of(agent, part).is_none())
}

/// Why a snapshot with these volumes can never be gone back to again: one of them is gone, or its part is.
pub fn fault(agent: &Agent, vm: &VmId, name: &Name, then: &[KeptVolume]) -> Option<ApiError> {
    let all = volumes(&agent.view());
    then.iter().find_map(|kept| {
        let Some(now) = all.values().find(|volume| volume.id == kept.id) else {
            return Some(conflict(
                format!("volume/{}, which the VM had when the snapshot `{name}` was made, was removed", kept.name),
                "another snapshot may do: `form vm snapshot ls`".to_owned(),
            ));
        };
        if kept.is_kept() { snapshot::check_part(agent, now, name, vm, kept.size_bytes).err() } else { None }
    })
}

/// Whether the volumes of a VM can go back to what they were when the snapshot `name` was made: it has the same ones, in the same places.
///
/// # Errors
/// A conflict that names the volume, and says what to do.
pub fn check_restore(agent: &Agent, vm: &DesiredVm, name: &Name, then: &[KeptVolume]) -> Result<(), ApiError> {
    if let Some(fault) = fault(agent, &vm.id, name, then) {
        return Err(fault);
    }
    let all = volumes(&agent.view());
    for kept in then {
        let Some(now) = all.values().find(|volume| volume.id == kept.id) else { continue };
        let holder = now.attached.as_ref().map(|attached| describe::vm_name(agent, &attached.vm));
        if let Err((what, hint)) = differs(kept, now, &vm.id, vm.name(), holder.as_deref(), name) {
            return Err(conflict(
                format!("volume/{}, which vm/{} had when the snapshot `{name}` was made, {what}", kept.name, vm.name()),
                hint,
            ));
        }
        match kept.read_only {
            None => not_exported(agent, now, "be restored", Exported::Whatever)?,
            Some(then) => {
                let written = pool_of(agent, now)?.written_at(&now.id).map_err(|error| store_error(&error))?;
                if written != then {
                    let text =
                        format!("volume/{}, which vm/{} could only read, was written to since the snapshot `{name}`", kept.name, vm.name());
                    return Err(conflict(
                        text,
                        "its guest remembers what it held; another snapshot may do: `form vm snapshot ls`".to_owned(),
                    ));
                }
            }
        }
    }
    match of_vm(&agent.view(), &vm.id).iter().find(|now| !then.iter().any(|kept| kept.id == now.id)) {
        None => Ok(()),
        Some(more) => {
            let text = format!("volume/{} was attached to vm/{} after the snapshot `{name}` was made", more.name, vm.name());
            Err(conflict(text, format!("take it away first: `form volume detach {}`", more.name)))
        }
    }
}

/// What has become of a volume, and what to do about it.
fn differs(
    then: &KeptVolume,
    now: &DesiredVolume,
    vm: &VmId,
    vm_name: &Name,
    holder: Option<&str>,
    snapshot: &Name,
) -> Result<(), (String, String)> {
    let name = &then.name;
    let path = then.path.as_ref().map_or_else(String::new, |path| format!(" {path}"));
    let flag = if then.is_kept() { "" } else { " --read-only" };
    let attach = format!("`form volume attach {name} {vm_name}{path}{flag}`");
    let Some(attached) = &now.attached else {
        return Err(("is detached".to_owned(), format!("attach it as it was: {attach}")));
    };
    if attached.vm != *vm {
        let holder = holder.unwrap_or("another VM");
        return Err((format!("is attached to vm/{holder}"), format!("`form volume detach {name}`, and attach it as it was: {attach}")));
    }
    let again = format!("`form volume detach {name}`, and attach it as it was: {attach}");
    if attached.path != then.path {
        let place = |path: &Option<String>| path.clone().unwrap_or_else(|| "no path".to_owned());
        return Err((format!("was at {} and is at {}", place(&then.path), place(&attached.path)), again));
    }
    if attached.read_only == then.is_kept() {
        let how = if attached.read_only {
            "could be written to, and now can only be read"
        } else {
            "could only be read, and now can be written to"
        };
        return Err((how.to_owned(), again));
    }
    if now.size_bytes != then.size_bytes {
        let what = format!("had {} bytes and has {}", then.size_bytes, now.size_bytes);
        let hint = if then.is_kept() {
            format!("stop the VM, and give the volume its size of then first: `form volume snapshot restore {name} {snapshot}`")
        } else {
            "another snapshot may do: `form vm snapshot ls`".to_owned()
        };
        return Err((what, hint));
    }
    Ok(())
}

/// What the volumes of a VM will be when it has gone back, beside them. Dropped before [`Restored::settle`] it is gone.
pub struct Restored {
    operation: OperationId,
    name: Name,
    then: Vec<KeptVolume>,
    drafts: Vec<(Arc<Pool>, VolumeId)>,
}

impl Drop for Restored {
    fn drop(&mut self) {
        for (pool, id) in &self.drafts {
            if let Err(error) = pool.drop_restore(id, &self.operation) {
                tracing::warn!("what a volume was to go back to stays until it is used again: {error}");
            }
        }
    }
}

impl Restored {
    /// Makes it, while the VM may still run. `operation` is the one that made the snapshot: no restore of a volume alone bears its id.
    ///
    /// # Errors
    /// No room; a part that is gone or damaged.
    pub fn draft(agent: &Agent, name: &Name, operation: OperationId, then: Vec<KeptVolume>) -> Result<Self, ApiError> {
        let mut restored = Self { operation, name: name.clone(), then, drafts: Vec::new() };
        let all = volumes(&agent.view());
        for kept in restored.then.iter().filter(|kept| kept.is_kept()) {
            let gone = || conflict(format!("volume/{} was removed just now", kept.name), "another snapshot may do".to_owned());
            let volume = all.values().find(|volume| volume.id == kept.id).ok_or_else(gone)?;
            let pool = pool_of(agent, volume)?;
            pool::has_room(&pool)?;
            // Of an earlier try, which somebody may have written to.
            pool.drop_restore(&kept.id, &operation).map_err(|error| store_error(&error))?;
            restored.drafts.push((Arc::clone(&pool), kept.id));
            pool.draft_restore(&kept.id, name, &operation).map_err(|error| store_error(&error))?;
        }
        Ok(restored)
    }

    /// All that the VM had, also those that are not in the snapshot.
    pub fn ids(&self) -> Vec<VolumeId> {
        self.then.iter().map(|kept| kept.id).collect()
    }

    /// Opens what the VM will have, and keeps everybody else from the volumes. Under the volumes' turn, when the VM that ran is gone.
    ///
    /// # Errors
    /// When one is not as it was any more, or in use.
    pub fn hold(&self, agent: &Agent, vm: &DesiredVm) -> Result<Held, ApiError> {
        check_restore(agent, vm, &self.name, &self.then)?;
        let mut held = Held { ready: Vec::new(), holds: Vec::new() };
        for volume in of_vm(&agent.view(), &vm.id) {
            if is_read_only(&volume) {
                held.ready.push(attach::open_one(agent, volume).map_err(|error| conflict(error.to_string(), "try again".to_owned()))?);
                continue;
            }
            let pool = pool_of(agent, &volume)?;
            let lock = pool
                .hold(&volume.id)
                .map_err(|error| conflict(format!("volume/{}: {error}", volume.name), "end what uses it, and try again".to_owned()))?;
            if !pool.has_restore(&volume.id, &self.operation) {
                return Err(conflict(format!("volume/{} was used just now", volume.name), "run the same command again".to_owned()));
            }
            let open = pool.open_restore(&volume.id, &self.operation).map_err(|error| store_error(&error))?;
            held.holds.push((pool, lock));
            let path = volume.attached.as_ref().and_then(|attached| attached.path.clone());
            held.ready.push(Ready { volume, open, read_only: false, path });
        }
        Ok(held)
    }

    /// Has all of them take the places of what the volumes were, whose files are closed before they are removed (NFS keeps those that are open).
    ///
    /// # Errors
    /// Those of the file system.
    pub fn settle(&self, held: &mut Held) -> form_store::Result<()> {
        held.holds.drain(..).try_for_each(|(pool, lock)| pool.settle_held(lock, Some(&self.operation)))
    }
}

/// The volumes of a VM between what they were and what they go back to.
pub struct Held {
    /// What the VM process gets, in the order of the ids.
    pub ready: Vec<Ready>,
    /// The files of before, locked.
    holds: Vec<(Arc<Pool>, Hold)>,
}

#[cfg(test)]
mod tests {
    use form_types::{DiskLimits, HostId, VolumeFormat};
    use jiff::Timestamp;

    use super::*;
    use crate::volume::Attached;

    const VM: VmId = VmId::from_bytes([1; 16]);
    const OTHER: VmId = VmId::from_bytes([2; 16]);

    fn kept() -> KeptVolume {
        KeptVolume {
            id: VolumeId::from_bytes([7; 16]),
            name: "data".parse().unwrap(),
            path: Some("/data".to_owned()),
            size_bytes: 16 << 20,
            read_only: None,
        }
    }

    fn now(attached: Option<Attached>) -> DesiredVolume {
        DesiredVolume {
            id: kept().id,
            name: kept().name,
            host: HostId::from_bytes([3; 16]),
            pool: "local".parse().unwrap(),
            format: VolumeFormat::Raw,
            size_bytes: 16 << 20,
            created_at: Timestamp::UNIX_EPOCH,
            limits: DiskLimits::default(),
            restored: None,
            attached,
        }
    }

    fn attached(vm: VmId) -> Attached {
        Attached { vm, path: Some("/data".to_owned()), read_only: false, by_formfile: false }
    }

    #[test]
    fn what_has_become_of_a_volume_is_said_with_what_to_do() {
        let refusal = |then: &KeptVolume, now: &DesiredVolume| {
            let (vm, snapshot) = ("web".parse().unwrap(), "before".parse().unwrap());
            differs(then, now, &VM, &vm, Some("other"), &snapshot).err().unwrap_or_default()
        };
        let says = |then: &KeptVolume, now: &DesiredVolume, what: &str, hint: &str| {
            let (said, hinted) = refusal(then, now);
            assert!(said.contains(what) && hinted.contains(hint), "{what}: {said}; {hinted}");
        };
        assert_eq!(refusal(&kept(), &now(Some(attached(VM)))).0, "");
        says(&kept(), &now(None), "is detached", "`form volume attach data web /data`");
        says(&kept(), &now(Some(attached(OTHER))), "is attached to vm/other", "form volume detach data");
        let elsewhere = Attached { path: None, ..attached(VM) };
        says(&kept(), &now(Some(elsewhere)), "was at /data and is at no path", "attach data web /data");
        let reads = Attached { read_only: true, ..attached(VM) };
        says(&kept(), &now(Some(reads.clone())), "now can only be read", "attach data web /data`");
        let grown = DesiredVolume { size_bytes: 32 << 20, ..now(Some(attached(VM))) };
        says(&kept(), &grown, "had 16777216 bytes and has 33554432", "form volume snapshot restore data before");
        let only_read = KeptVolume { read_only: Some(SystemTime::UNIX_EPOCH), ..kept() };
        assert_eq!(refusal(&only_read, &now(Some(reads))).0, "");
        says(&only_read, &now(Some(attached(VM))), "now can be written to", "attach data web /data --read-only`");
    }
}
