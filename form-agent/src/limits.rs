//! Limits of what VMs do in a second, told to their processes while they run. What should be is in the state, and a VM is started with it;
//! one whose process was not told, because the agent died before, is told when its guest is next heard of.

use form_api::{ApiError, ErrorCode};
use form_types::VmId;
use form_vmm::control::{Client, ClientError, ErrorKind};

use crate::{
    agent::Agent,
    desired::DesiredVm,
    vm,
    volume::{DesiredVolume, live, of_vm},
};

/// Has the process of a VM that runs or stands still hold its root disk and network interfaces to their limits.
///
/// # Errors
/// When it does not take them; it has them from its next start on.
pub fn of_vm_itself(agent: &Agent, vm: &DesiredVm) -> Result<(), ApiError> {
    let Some(client) = reach(agent, &vm.id) else { return Ok(()) };
    if vm.request.has_guest() {
        let told = client.limit_disk(vm::ROOT_DISK, vm::disk_limits(vm.limits.disk));
        taken(told, &format!("vm/{}", vm.name()))?;
    }
    let rate = vm::rate(vm.limits.net_bytes_per_second);
    let of_interface = |link: &vm::Link| taken(client.limit_network(&link.name, rate), &format!("vm/{}", vm.name()));
    agent.links(vm).iter().try_for_each(of_interface)
}

/// The same for a volume that it has.
///
/// # Errors
/// As [`of_vm_itself`].
pub fn of_volume(agent: &Agent, vm: &VmId, volume: &DesiredVolume) -> Result<(), ApiError> {
    let Some(client) = reach(agent, vm) else { return Ok(()) };
    taken(client.limit_disk(&live::disk_id(volume), vm::disk_limits(volume.limits)), &format!("volume/{}", volume.name))
}

/// The same for everything that a VM has. What it does not take is logged.
pub fn of_all(agent: &Agent, vm: &VmId) {
    let itself = agent.desired(vm).map(|desired| of_vm_itself(agent, &desired));
    let volumes = of_vm(&agent.view(), vm).into_iter().map(|volume| of_volume(agent, vm, &volume));
    for error in itself.into_iter().chain(volumes).filter_map(Result::err) {
        tracing::warn!(%vm, "{error}");
    }
}

/// None when there is no process: the next one is started with the limits.
fn reach(agent: &Agent, vm: &VmId) -> Option<Client> {
    let directory = live::directory(agent, vm);
    directory.read_record().filter(|record| record.booted)?;
    Client::connect(&directory.control()).ok()
}

fn taken(told: Result<(), ClientError>, what: &str) -> Result<(), ApiError> {
    match told {
        // It has ended meanwhile, or does not have that volume (yet): what comes is started with them.
        Ok(()) | Err(ClientError::Gone | ClientError::Refused { kind: ErrorKind::NotFound | ErrorKind::WrongState, .. }) => Ok(()),
        Err(error) => {
            Err(ApiError::new(ErrorCode::Failed, format!("{what}: the limits are noted, but the VM process does not take them: {error}"))
                .hint("restart the VM: it has them from its next start on"))
        }
    }
}
