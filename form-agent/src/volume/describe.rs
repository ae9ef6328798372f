//! Volumes and pools as a client sees them.

use form_api::{
    ApiError, ErrorCode,
    vm::VmState,
    volume::{Attachment, AttachmentState, Pool, PoolKind, Volume},
};
use form_store::{Space, StoreError};
use form_types::{Name, VmId, VolumeId};

use super::{Attached, DesiredVolume, rules, volumes};
use crate::{agent::Agent, driver::process::RuntimeDirectory, serve::store_error};

/// # Errors
/// When there is no volume of this name.
pub fn volume_named(agent: &Agent, name: &Name) -> Result<DesiredVolume, ApiError> {
    rules::existing(name, &agent.view()).map_err(|fault| fault.into_api())
}

/// The volumes that a VM process has.
pub fn held_by(agent: &Agent, vm: &VmId) -> Vec<VolumeId> {
    let running = agent.fleet.observed(vm).is_some_and(|observed| observed.state != VmState::Stopped);
    if running { RuntimeDirectory::new(&agent.paths().vm_runtime(), vm).held_volumes() } else { Vec::new() }
}

pub fn volume(agent: &Agent, volume: &DesiredVolume) -> Volume {
    let entry = agent.store.pool(&volume.pool).and_then(|pool| pool.volume(&volume.id));
    let snapshots = agent.store.pool(&volume.pool).and_then(|pool| pool.snapshots(&volume.id)).unwrap_or_default();
    let (allocated_bytes, fault) = match entry {
        Ok(entry) => (Some(entry.allocated_bytes), None),
        // It is made when it is first needed.
        Err(StoreError::NoVolume(_)) => (None, None),
        Err(error) => (None, Some(error.to_string())),
    };
    Volume {
        id: volume.id,
        name: volume.name.clone(),
        host: volume.host,
        host_name: agent.name().to_owned(),
        pool: volume.pool.clone(),
        format: volume.format,
        size_bytes: volume.size_bytes,
        allocated_bytes,
        serial: volume.id.serial(),
        limits: volume.limits,
        attachment: volume.attached.as_ref().and_then(|attached| attachment(agent, &volume.id, attached)),
        snapshots: u32::try_from(snapshots.len()).unwrap_or(u32::MAX),
        export: agent.exports.of(&volume.id),
        created_at: volume.created_at,
        fault,
    }
}

fn attachment(agent: &Agent, id: &VolumeId, attached: &Attached) -> Option<Attachment> {
    let vm = agent.desired(&attached.vm)?;
    let guest = agent.fleet.observed(&attached.vm).and_then(|observed| observed.guest);
    let serial = id.serial();
    let device = guest.and_then(|guest| guest.devices.into_iter().find(|device| device.serial == serial));
    let is_running = RuntimeDirectory::new(&agent.paths().vm_runtime(), &attached.vm).read_record().is_some();
    let state = match (is_running, held_by(agent, &attached.vm).contains(id), &device) {
        (false, ..) => AttachmentState::Waiting,
        (true, false, _) => AttachmentState::NeedsRestart,
        (true, true, None) if vm.request.has_guest() => AttachmentState::Starting,
        // That its process has it is all that can be known of a VM without our guest.
        (true, true, None) => AttachmentState::Attached,
        (true, true, Some(_)) => AttachmentState::Attached,
    };
    Some(Attachment {
        vm: vm.name().clone(),
        path: attached.path.clone(),
        read_only: attached.read_only,
        by_formfile: attached.by_formfile,
        state,
        device_size_bytes: device.as_ref().map(|device| device.size_bytes),
        synced_at: device.as_ref().and_then(|device| device.reported_at),
        device: device.map(|device| device.path),
    })
}

/// # Errors
/// When there is no pool of this name.
pub fn pool_named(agent: &Agent, name: &Name) -> Result<Pool, ApiError> {
    agent.store.pool(name).map(|pool| self::pool(agent, &pool)).map_err(|error| store_error(&error))
}

pub fn pool(agent: &Agent, pool: &form_store::Pool) -> Pool {
    let here = super::pool::volumes_in(agent, pool.name());
    // Of a pool that is not there nothing else is asked.
    let space = pool.space();
    let settings = pool.settings();
    let of_volumes = here.iter().filter_map(|volume| pool.volume(&volume.id).ok()).map(|entry| entry.allocated_bytes);
    let of_snapshots = here.iter().map(|volume| pool.snapshot_bytes(&volume.id));
    let allocated = of_volumes.chain(of_snapshots).fold(0, u64::saturating_add);
    let snapshots = here.iter().filter_map(|volume| pool.snapshots(&volume.id).ok()).map(|names| names.len()).sum::<usize>();
    let silent = matches!(&space, Err(StoreError::PoolSilent { .. }));
    let (space, fault) = match space {
        Ok(space) => (space, None),
        Err(error) => (Space { total: 0, free: 0 }, Some(error.to_string())),
    };
    let options = pool.export().map(form_store::NfsExport::options).filter(|options| !options.is_empty());
    Pool {
        name: pool.name().clone(),
        kind: if pool.export().is_some() { PoolKind::Nfs } else { PoolKind::Local },
        host: agent.host_id(),
        host_name: agent.name().to_owned(),
        path: pool.directory().to_owned(),
        source: pool.export().map(form_store::NfsExport::source),
        options,
        total_bytes: space.total,
        free_bytes: space.free,
        provisioned_bytes: super::pool::promised(pool, &here),
        allocated_bytes: allocated,
        volumes: u32::try_from(here.len()).unwrap_or(u32::MAX),
        snapshots: u32::try_from(snapshots).unwrap_or(u32::MAX),
        reserve_bytes: settings.reserve_bytes,
        limit_bytes: settings.limit_bytes,
        labels: settings.labels,
        removable: pool.was_made(),
        silent,
        fault,
    }
}

impl rules::VolumeFault {
    /// With the code by which programs tell what is wrong, and what to do.
    pub fn into_api(self) -> ApiError {
        let (code, hint) = match &self {
            Self::NoVolume(_) => (ErrorCode::NotFound, "list them with `form volume ls`".to_owned()),
            Self::NoVm(_) => (ErrorCode::NotFound, "list them with `form ps`".to_owned()),
            Self::NameTaken(_) => (ErrorCode::Conflict, "choose another name".to_owned()),
            Self::Held { volume, holder } => (
                ErrorCode::Conflict,
                format!("stop it with `form vm stop {holder}`, and take the volume with `form volume detach {volume}`"),
            ),
            Self::NotAttached(_) => (ErrorCode::Conflict, "list them with `form volume ls`".to_owned()),
            Self::There { .. } => (ErrorCode::Conflict, "choose another pool: `form pool ls`".to_owned()),
            Self::PathTaken { .. } => (ErrorCode::Conflict, "choose another path".to_owned()),
            Self::Elsewhere { .. } => (ErrorCode::Conflict, "take a volume of that host, or another name".to_owned()),
            Self::NotYours(_) => (ErrorCode::NotAllowed, "ask its own host".to_owned()),
            Self::TooMany => (ErrorCode::Conflict, "detach one that is not needed".to_owned()),
            Self::Path(_) => (ErrorCode::Invalid, "write a path like /var/lib/data".to_owned()),
            Self::Shrinks { .. } => (ErrorCode::Invalid, "make a smaller volume, and copy what it shall hold".to_owned()),
            Self::Limit(_) => (ErrorCode::Invalid, "write `none` for no limit".to_owned()),
            Self::CloneSize => (ErrorCode::Invalid, "name the snapshot, or make the clone larger with `form volume resize`".to_owned()),
            Self::Size(_) => (ErrorCode::Invalid, "write a size like 512M, 20G or 20971520".to_owned()),
        };
        ApiError::new(code, self.to_string()).hint(hint)
    }
}

/// What is wrong with the volumes of this host, for `form doctor`.
pub fn faults(agent: &Agent) -> Vec<(String, String)> {
    let view = agent.view();
    let all = volumes(&view);
    let mut found: Vec<(String, String)> = all
        .values()
        .filter(|volume| volume.host == agent.host_id())
        .filter_map(|desired| Some((format!("volume/{}", desired.name), volume(agent, desired).fault?)))
        .collect();
    found.extend(super::snapshot::faults(agent));
    // Of two that claimed one name at once the loser is in the state, and has no name.
    let pool_of = |id: &VolumeId| view.cluster().record(form_state::Table::Volumes, *id)?.get("pool")?.as_text().map(str::to_owned);
    for pool in agent.store.pools() {
        let Ok(there) = pool.volumes() else { continue };
        found.extend(there.iter().filter(|id| pool_of(id).as_deref() != Some(pool.name().as_str())).map(|id| {
            let place = pool.directory().join(id.to_string());
            (
                format!("pool/{}/{id}", pool.name()),
                format!("{} is a volume that nobody knows; look at it, and remove it by hand", place.display()),
            )
        }));
    }
    found
}

/// The VM that a process was started for, by name.
pub fn vm_name(agent: &Agent, vm: &VmId) -> String {
    agent.desired(vm).map_or_else(|| vm.to_string(), |vm| vm.name().to_string())
}
