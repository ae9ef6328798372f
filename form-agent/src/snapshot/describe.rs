//! Snapshots as a client sees them.

use form_api::{
    ApiError, ErrorCode,
    snapshot::{MemoryKind, Snapshot},
};
use form_types::Name;
use form_vmm::{machine, memory::image::ImageError};

use super::{
    find,
    volumes::{self, KeptVolume},
};
use crate::{
    agent::Agent,
    desired::{self, DesiredVm},
    serve::store_error,
};

/// The snapshots of one VM, the oldest first.
///
/// # Errors
/// When the directory cannot be read.
pub fn of_vm(agent: &Agent, vm: &DesiredVm) -> Result<Vec<Snapshot>, ApiError> {
    let names = agent.store.snapshots(&vm.id).map_err(|error| store_error(&error))?;
    let mut all: Vec<Snapshot> = names.iter().map(|name| described(agent, vm, name)).collect();
    all.sort_by(|one, other| (one.created_at, &one.name).cmp(&(other.created_at, &other.name)));
    Ok(all)
}

/// Those of all VMs, by VM.
///
/// # Errors
/// When a directory cannot be read.
pub fn all(agent: &Agent) -> Result<Vec<Snapshot>, ApiError> {
    let mut vms: Vec<DesiredVm> = desired::vms(&agent.view()).into_values().filter(|vm| vm.host == agent.host_id()).collect();
    vms.sort_by(|one, other| one.name().cmp(other.name()));
    let mut all = Vec::new();
    for vm in &vms {
        all.extend(of_vm(agent, vm)?);
    }
    Ok(all)
}

/// One; with its fault, when it cannot be used.
///
/// # Errors
/// When there is none of this name.
pub fn one(agent: &Agent, vm: &DesiredVm, name: &Name) -> Result<Snapshot, ApiError> {
    let names = agent.store.snapshots(&vm.id).map_err(|error| store_error(&error))?;
    if names.contains(name) {
        return Ok(described(agent, vm, name));
    }
    Err(not_there(vm, name))
}

fn not_there(vm: &DesiredVm, name: &Name) -> ApiError {
    store_error(&form_store::StoreError::NoSnapshot(name.clone())).hint(format!("list them with `form vm snapshot ls {}`", vm.name()))
}

/// As [`one`], after a reading of its memory: what is damaged is its fault.
///
/// # Errors
/// As [`one`]; that an earlier release made it, which kept no checksums.
pub fn verified(agent: &Agent, vm: &DesiredVm, name: &Name) -> Result<Snapshot, ApiError> {
    let mut snapshot = one(agent, vm, name)?;
    if snapshot.fault.is_some() {
        return Ok(snapshot);
    }
    let Some(saved) = find(agent, &vm.id, name)?.0.saved else { return Ok(snapshot) };
    let (file, compressed) = saved.open(name).map_err(|error| store_error(&error))?;
    if compressed.is_some() {
        snapshot.fault = saved.verify_compressed(name).err().map(|error| error.to_string());
        return Ok(snapshot);
    }
    match machine::verify_memory(&file) {
        Ok(()) => {}
        Err(error @ ImageError::NoChecksums) => {
            return Err(ApiError::new(ErrorCode::Failed, format!("the snapshot `{name}`: {error}")).hint("make a new one"));
        }
        Err(error) => snapshot.fault = Some(error.to_string()),
    }
    Ok(snapshot)
}

fn described(agent: &Agent, vm: &DesiredVm, name: &Name) -> Snapshot {
    let mut snapshot = Snapshot {
        name: name.clone(),
        vm: vm.name().clone(),
        vm_id: vm.id,
        host: vm.host,
        host_name: agent.name().to_owned(),
        created_at: None,
        consistency: None,
        memory_mib: None,
        vcpus: None,
        disk_bytes: None,
        allocated_bytes: None,
        memory_kind: None,
        based_on: None,
        written_bytes: None,
        compressed: false,
        unfolded_bytes: None,
        volumes: Vec::new(),
        pause_ms: None,
        image_digest: None,
        fault: None,
    };
    match find(agent, &vm.id, name) {
        Ok((entry, details)) => {
            let resources = &details.request.spec.resources;
            snapshot.created_at = Some(details.created_at);
            snapshot.consistency = Some(details.consistency);
            snapshot.memory_mib = entry.saved.is_some().then_some(resources.memory_mib);
            snapshot.vcpus = Some(resources.vcpus);
            snapshot.disk_bytes = Some(entry.disk_bytes);
            snapshot.allocated_bytes = Some(entry.allocated_bytes);
            snapshot.pause_ms = details.pause_ms;
            if let Some(memory) = details.memory {
                snapshot.memory_kind = Some(if memory.base.is_some() { MemoryKind::Incremental } else { MemoryKind::Full });
                snapshot.based_on = memory.base;
                snapshot.written_bytes = memory.written_bytes;
            }
            snapshot.unfolded_bytes = entry.saved.and_then(|saved| saved.compressed).map(|unfolded| unfolded.data);
            snapshot.compressed = snapshot.unfolded_bytes.is_some();
            snapshot.image_digest = details.request.image().copied();
            snapshot.fault = volumes::fault(agent, &vm.id, name, &details.volumes).map(|error| error.message);
            snapshot.volumes = details.volumes.into_iter().filter(KeptVolume::is_kept).map(|volume| volume.name).collect();
            snapshot.volumes.sort();
        }
        Err(error) => snapshot.fault = Some(error.message),
    }
    snapshot
}
