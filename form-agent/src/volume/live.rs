//! Volumes that come to a VM that runs, grow in it, and leave it. What should be is in the state; this makes it so without a restart.

use std::{os::fd::AsFd, path::Path, sync::PoisonError, time::Duration};

use form_api::{
    ApiError, ErrorCode,
    vm::{GuestDevice, VmState},
};
use form_guest::protocol::{DeviceReport, ErrorKind as GuestErrorKind, Reply, Request};
use form_types::{Failpoint, VmId, VolumeId, failpoint::reach};
use form_vmm::{
    config::Fd,
    control::{Client, ClientError, ErrorKind},
};
use jiff::Timestamp;

use super::{DesiredVolume, attach, of_vm};
use crate::{
    agent::{Agent, internal},
    driver::{
        guest::{GuestError, ask},
        let_go,
        process::RuntimeDirectory,
    },
    limits,
};

/// A guest waits ten seconds for a device, and may then make a file system.
const GUEST_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest's kernel may take to let a device go.
const GONE_LIMIT: Duration = Duration::from_secs(30);

/// Whether the guest of a VM can take volumes and give them back now.
pub fn is_possible(agent: &Agent, vm: &VmId) -> bool {
    agent.fleet.observed(vm).is_some_and(|observed| observed.state == VmState::Running && observed.ready)
}

pub fn directory(agent: &Agent, vm: &VmId) -> RuntimeDirectory {
    RuntimeDirectory::new(&agent.paths().vm_runtime(), vm)
}

/// What the VM process knows the volume's disk by.
pub fn disk_id(volume: &DesiredVolume) -> String {
    format!("volume/{}", volume.name)
}

/// One request to the guest from a thread that may block.
pub(super) fn ask_guest(control: &Path, request: &Request) -> Result<Reply, GuestError> {
    tokio::runtime::Handle::current().block_on(ask(control, request, GUEST_LIMIT))
}

pub(super) fn failed(volume: &DesiredVolume, what: &str, error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Failed, format!("volume/{}: {what}: {error}", volume.name))
}

/// Gives a volume, which the state says it has, to the VM `vm`, whose guest mounts it. Nothing is left of one that could not be given.
/// Under the VM's turn for volumes.
///
/// # Errors
/// When it cannot be opened, the VM has no room for it, or the guest does not find or mount it.
pub fn plug(agent: &Agent, vm: &VmId, volume: DesiredVolume) -> Result<(), ApiError> {
    let directory = directory(agent, vm);
    let held = directory.held_volumes();
    if held.contains(&volume.id) {
        return Ok(());
    }
    let ready = {
        let _turn = agent.volume_turn();
        attach::open_one(agent, volume).map_err(|error| ApiError::new(ErrorCode::Conflict, error.to_string()))?
    };
    let volume = ready.volume.clone();
    // First: what may be in the VM is on record.
    directory.set_held_volumes(held.iter().copied().chain([volume.id]).collect()).map_err(|error| internal(&error))?;
    let control = directory.control();
    let client = connect(&control, &volume)?;
    let plugged = client.plug(&ready.disk().config(Fd(0)), &[ready.open.file.as_fd()]);
    let mount = ready.mount();
    // From here on its lock is the VM process's.
    drop(ready);
    let mounted = plugged.map_err(|error| failed(&volume, "the VM does not take it", &error)).and_then(|()| {
        reach(Failpoint::VolumePlugged);
        match ask_guest(&control, &Request::Mount(mount)) {
            Ok(Reply::Mounted(device)) => Ok(device),
            Ok(_) => Err(failed(&volume, "the guest", &"answered something else")),
            Err(error) => Err(failed(&volume, "the guest does not take it", &error)),
        }
    });
    match mounted {
        Ok(device) => {
            note(agent, vm, &volume.id, Some(device));
            Ok(())
        }
        Err(error) => {
            // It is told why it failed, not that what is left over could not be taken back: the VM's next start has it then.
            if let Err(stays) = let_go(agent, vm, &volume, &client, true) {
                tracing::warn!(%vm, "{stays}");
            }
            Err(error)
        }
    }
}

fn connect(control: &Path, volume: &DesiredVolume) -> Result<Client, ApiError> {
    Client::connect(control).map_err(|error| failed(volume, "the VM process", &error))
}

/// Takes a volume from the VM `vm`, whose guest unmounts it before. Under the VM's turn for volumes.
///
/// # Errors
/// `conflict` while something in the guest uses it, unless with `force`; when the guest does not let it go.
pub fn unplug(agent: &Agent, vm: &VmId, volume: &DesiredVolume, force: bool) -> Result<(), ApiError> {
    let directory = directory(agent, vm);
    if !directory.held_volumes().contains(&volume.id) {
        return Ok(());
    }
    let client = connect(&directory.control(), volume)?;
    let_go(agent, vm, volume, &client, force)
}

fn let_go(agent: &Agent, vm: &VmId, volume: &DesiredVolume, client: &Client, force: bool) -> Result<(), ApiError> {
    let directory = directory(agent, vm);
    match ask_guest(&directory.control(), &Request::Unmount { serial: volume.id.serial(), force }) {
        Ok(_) => {}
        Err(GuestError::Refused(refusal)) if refusal.kind == GuestErrorKind::InUse => {
            return Err(ApiError::new(ErrorCode::Conflict, format!("volume/{} cannot be detached: {}", volume.name, refusal.message))
                .hint("end what uses it and try again, or take it away with --force: who uses it then gets errors"));
        }
        // Its kernel may still answer.
        Err(error) if force => tracing::warn!(%vm, "volume/{} is taken away without its guest's word: {error}", volume.name),
        Err(error) => return Err(failed(volume, "the guest does not unmount it", &error)),
    }
    match client.unplug(&disk_id(volume)) {
        Ok(gone) if let_go::within(&gone, GONE_LIMIT) => {}
        Ok(_) => {
            let text = format!("the kernel of its guest did not let it go within {} s", GONE_LIMIT.as_secs());
            return Err(failed(volume, "it is unmounted, but", &text).hint("try again, or stop the VM"));
        }
        Err(ClientError::Refused { kind: ErrorKind::NotFound, .. }) => {}
        Err(error) => return Err(failed(volume, "the VM does not give it back", &error)),
    }
    reach(Failpoint::VolumeUnplugged);
    let held = directory.held_volumes().into_iter().filter(|held| *held != volume.id).collect();
    directory.set_held_volumes(held).map_err(|error| internal(&error))?;
    note(agent, vm, &volume.id, None);
    Ok(())
}

/// Makes the disk that a VM has of a volume as large as the volume, and its file system. One that only reads, or does not have it, sees
/// that at its next start. Under the VM's turn for volumes.
///
/// # Errors
/// When the VM process or the guest cannot.
pub fn grow(agent: &Agent, vm: &VmId, volume: &DesiredVolume) -> Result<(), ApiError> {
    let (directory, size_bytes) = (directory(agent, vm), volume.size_bytes);
    let reads = volume.attached.as_ref().is_none_or(|attached| attached.read_only);
    if reads || !directory.held_volumes().contains(&volume.id) {
        return Ok(());
    }
    let client = connect(&directory.control(), volume)?;
    client.grow(&disk_id(volume), size_bytes).map_err(|error| failed(volume, "the VM cannot make its disk larger", &error))?;
    let pool = agent.store.pool(&volume.pool).map_err(|error| crate::serve::store_error(&error))?;
    pool.note_grown(&volume.id, size_bytes).map_err(|error| crate::serve::store_error(&error))?;
    match ask_guest(&directory.control(), &Request::Grow { serial: volume.id.serial(), size_bytes }) {
        Ok(Reply::Mounted(device)) => {
            note(agent, vm, &volume.id, Some(device));
            Ok(())
        }
        Ok(_) => Err(failed(volume, "the guest", &"answered something else")),
        Err(error) => Err(failed(volume, "it is larger, but the guest has not taken that up", &error)),
    }
}

/// What the guest says of the volume from now on.
fn note(agent: &Agent, vm: &VmId, volume: &VolumeId, device: Option<DeviceReport>) {
    let serial = volume.serial();
    agent.fleet.update(vm, |observed| {
        let Some(guest) = &mut observed.guest else { return };
        guest.devices.retain(|device| device.serial != serial);
        guest.devices.extend(device.map(|device| GuestDevice {
            serial: device.serial,
            path: device.path,
            size_bytes: device.size_bytes,
            reported_at: Some(Timestamp::now()),
        }));
    });
}

/// The guest has just answered for the volume, and all is as it was.
pub(super) fn note_synced(agent: &Agent, vm: &VmId, volume: &VolumeId) {
    let serial = volume.serial();
    agent.fleet.update(vm, |observed| {
        let devices = observed.guest.iter_mut().flat_map(|guest| &mut guest.devices);
        for device in devices.filter(|device| device.serial == serial) {
            device.reported_at = Some(Timestamp::now());
        }
    });
}

/// What may be left to do with a volume that a VM has, as it should: its guest was not told of it, or not of its size.
fn finish(agent: &Agent, vm: &VmId, volume: &DesiredVolume) -> Result<(), ApiError> {
    let serial = volume.id.serial();
    let devices = agent.fleet.observed(vm).and_then(|observed| observed.guest).map(|guest| guest.devices).unwrap_or_default();
    match devices.into_iter().find(|device| device.serial == serial) {
        Some(device) if device.size_bytes < volume.size_bytes => grow(agent, vm, volume),
        Some(_) => Ok(()),
        None => {
            unplug(agent, vm, volume, false)?;
            plug(agent, vm, volume.clone())
        }
    }
}

/// What a running VM really has.
struct Really {
    /// The volumes whose disks its process has.
    held: Vec<DesiredVolume>,
    on_record: Vec<VolumeId>,
    /// Those that it should have.
    desired: Vec<DesiredVolume>,
}

impl Really {
    /// None of one that does not run, or does not answer.
    fn look(agent: &Agent, vm: &VmId) -> Option<Self> {
        let directory = directory(agent, vm);
        let metrics = Client::connect(&directory.control()).and_then(|client| client.metrics()).ok()?;
        let has = |volume: &DesiredVolume| metrics.disks.iter().any(|disk| disk.id == disk_id(volume));
        let view = agent.view();
        let held = super::volumes(&view).into_values().filter(has).collect();
        Some(Self { held, on_record: directory.held_volumes(), desired: of_vm(&view, vm) })
    }

    fn holds(&self, volume: &DesiredVolume) -> bool {
        self.held.iter().any(|held| held.id == volume.id)
    }

    fn wrongly_recorded(&self) -> bool {
        self.held.len() != self.on_record.len() || self.held.iter().any(|held| !self.on_record.contains(&held.id))
    }

    fn too_many(&self, vm: &VmId) -> impl Iterator<Item = &DesiredVolume> {
        self.held.iter().filter(move |volume| !volume.is_of(vm))
    }

    fn missing(&self) -> impl Iterator<Item = &DesiredVolume> {
        self.desired.iter().filter(|volume| !self.holds(volume))
    }
}

/// Where a VM that runs and the state do not agree, in words. Nothing is said of one whose volumes are being changed.
pub fn drift(agent: &Agent, vm: &VmId) -> Vec<String> {
    let turn = agent.volumes_of(vm);
    let Ok(_turn) = turn.try_lock() else { return Vec::new() };
    differences(agent, vm)
}

/// Whether the process of a VM has the disk of a volume, whatever is on record.
pub fn has(agent: &Agent, vm: &VmId, volume: &DesiredVolume) -> bool {
    directory(agent, vm).read_record().is_some() && Really::look(agent, vm).is_some_and(|really| really.holds(volume))
}

/// As [`drift`], under the VM's turn for volumes.
pub fn differences(agent: &Agent, vm: &VmId) -> Vec<String> {
    let Some(really) = Really::look(agent, vm).filter(|_| is_possible(agent, vm)) else { return Vec::new() };
    let devices = agent.fleet.observed(vm).and_then(|observed| observed.guest).map(|guest| guest.devices).unwrap_or_default();
    let unseen = |volume: &&DesiredVolume| really.holds(volume) && !devices.iter().any(|device| device.serial == volume.id.serial());
    let mut found: Vec<String> =
        really.missing().map(|volume| format!("it runs without volume/{}, which it should have", volume.name)).collect();
    found.extend(really.too_many(vm).map(|volume| format!("it has volume/{}, which it should not have", volume.name)));
    found.extend(really.desired.iter().filter(unseen).map(|volume| format!("its guest has not found volume/{}", volume.name)));
    if really.wrongly_recorded() {
        found.push("the record of the volumes that it has is not true".to_owned());
    }
    found
}

/// Brings a VM whose guest answers in line with the state: an agent that was killed may have left it with a volume that it should not
/// have, or without one that it should, and so may somebody's hand. What cannot be done is logged, and `form doctor` shows it. Blocks.
pub fn reconcile(agent: &Agent, vm: &VmId) {
    let turn = agent.volumes_of(vm);
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(really) = Really::look(agent, vm) else { return };
    if really.wrongly_recorded()
        && let Err(error) = directory(agent, vm).set_held_volumes(really.held.iter().map(|volume| volume.id).collect())
    {
        tracing::warn!(%vm, "its record of volumes is not true: {error}");
        return;
    }
    let taken = really.too_many(vm).map(|volume| {
        tracing::info!(%vm, "volume/{} is left over in it, and taken away", volume.name);
        unplug(agent, vm, volume, false)
    });
    let finished = really.desired.iter().filter(|volume| really.holds(volume)).map(|volume| finish(agent, vm, volume));
    let given = really.missing().map(|volume| {
        tracing::info!(%vm, "volume/{} is missing in it, and given to it", volume.name);
        plug(agent, vm, volume.clone())
    });
    for error in taken.chain(finished).chain(given).filter_map(Result::err) {
        tracing::warn!(%vm, "{error}");
    }
    limits::of_all(agent, vm);
}
