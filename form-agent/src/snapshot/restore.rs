//! Going back to a snapshot: what may be gone back to, and the note that it was done.
//!
//! The state says from which start of the VM on it is another's memory (`restore`, `restore_starts`); the driver does it. A restore is done
//! once: a VM whose process is killed later starts from its disk, as every VM does. The note of that is beside the disk.

use std::{
    fs,
    path::{Path, PathBuf},
};

use form_api::{ApiError, ErrorCode, deploy::DeployRequest};
use form_store::{SavedMemory, compressed::Unfolded};
use form_types::{Digest, Name, VmId};
use form_vmm::machine;
use serde::{Deserialize, Serialize};

use super::{Details, find, volumes};
use crate::{
    agent::{Agent, internal},
    desired::{DesiredVm, Restore},
    headroom,
    interface::name_of,
    plan,
    serve::store_error,
};

/// How the last restore went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// The start that it was for ([`DesiredVm::starts`]).
    starts: u64,
    fault: Option<String>,
}

fn file(agent: &Agent, vm: &VmId) -> PathBuf {
    agent.vm_directory(vm).join("restored.json")
}

fn read(agent: &Agent, vm: &VmId) -> Option<Note> {
    serde_json::from_slice(&fs::read(file(agent, vm)).ok()?).ok()
}

/// The snapshot that the present start of the VM is from, as long as it has not been tried.
pub fn due<'a>(agent: &Agent, vm: &'a DesiredVm) -> Option<&'a Name> {
    let Restore { snapshot, starts } = vm.restore.as_ref()?;
    (*starts == vm.starts && read(agent, &vm.id).is_none_or(|note| note.starts != *starts)).then_some(snapshot)
}

/// Why the restore that was last asked for was not done.
pub fn fault(agent: &Agent, vm: &DesiredVm) -> Option<String> {
    read(agent, &vm.id).filter(|note| note.starts == vm.starts)?.fault
}

/// Notes that it was done, or why it cannot be: the VM then is what it is without it.
///
/// # Errors
/// When the note cannot be written: it would be done again.
pub fn note(agent: &Agent, vm: &VmId, starts: u64, fault: Option<String>) -> std::io::Result<()> {
    fs::create_dir_all(agent.vm_directory(vm))?;
    let json = serde_json::to_vec(&Note { starts, fault })?;
    crate::identity::write_atomically(&file(agent, vm), 0o600, &json)
}

/// Whether `vm` can go back to its snapshot `name`: looked at before anything is changed, and again before the VM that runs is ended.
///
/// # Errors
/// Not found, damaged, of another release; the VM has changed since, or the host cannot run what was saved.
pub fn check(agent: &Agent, vm: &DesiredVm, name: &Name) -> Result<(Option<SavedMemory>, Details), ApiError> {
    let (entry, details) = find(agent, &vm.id, name)?;
    fits(&details.request, &vm.request, entry.saved.is_some(), &|image| agent.root_of(image)).map_err(|reason| {
        ApiError::new(ErrorCode::Conflict, format!("vm/{} has changed since the snapshot `{name}` was made: {reason}", vm.name()))
            .hint("make it what it was (`form vm set`, or a deploy), and restore it then")
    })?;
    if let Some(saved) = &entry.saved {
        same_interfaces(vm, name, &details)?;
        check_saved(agent, saved, &details.request, name)?;
    }
    volumes::check_restore(agent, vm, name, &details.volumes)?;
    Ok((entry.saved, details))
}

/// Whether a new VM that is to be `request` can go on from the snapshot `name` of `source`. Ports are led by the host, and a guest learns its
/// name anew.
///
/// # Errors
/// As [`check`].
pub fn check_fork(agent: &Agent, source: &DesiredVm, name: &Name, request: &DeployRequest) -> Result<Details, ApiError> {
    let conflict = |text: String, hint: &str| Err(ApiError::new(ErrorCode::Conflict, text).hint(hint));
    if !request.spec.volumes.is_empty() {
        return conflict("a VM that goes on from a snapshot has no volumes".to_owned(), "attach volumes to it later");
    }
    if !source.request.has_guest() {
        return Err(crate::action::no_guest(source.name(), "and a copy of it would not learn that it is another machine")
            .hint("make another one with `form vm create --kernel`"));
    }
    let (entry, details) = find(agent, &source.id, name)?;
    if let Some(had) = details.volumes.first() {
        let text = format!("vm/{} had volume/{} when the snapshot `{name}` was made, and a fork has no volumes", source.name(), had.name);
        return conflict(text, "detach its volumes, and fork it then");
    }
    let mut then = details.request.clone();
    then.spec.ports.clone_from(&request.spec.ports);
    if let Err(reason) = fits(&then, request, entry.saved.is_some(), &|image| agent.root_of(image)) {
        let text = format!("vm/{} cannot go on from the snapshot `{name}` of vm/{}: {reason}", request.spec.name, source.name());
        return conflict(text, "leave out what differs, and change it in the new VM");
    }
    if let Some(saved) = &entry.saved {
        // It gets as many as the other one has, with the same names.
        same_interfaces(source, name, &details)?;
        check_saved(agent, saved, &details.request, name)?;
    }
    Ok(details)
}

/// What was saved has its devices, and cannot go on with others.
fn same_interfaces(vm: &DesiredVm, name: &Name, details: &Details) -> Result<(), ApiError> {
    let names = |numbers: &mut dyn Iterator<Item = u8>| -> Vec<String> { [0].into_iter().chain(numbers).map(name_of).collect() };
    let mut then = details.interfaces.clone();
    then.sort_unstable();
    let (then, now) = (names(&mut then.into_iter()), names(&mut vm.interfaces.keys().copied()));
    if then == now {
        return Ok(());
    }
    let text = format!(
        "vm/{} has changed since the snapshot `{name}` was made: it had the network interfaces {} and has {}",
        vm.name(),
        then.join(", "),
        now.join(", ")
    );
    Err(ApiError::new(ErrorCode::Conflict, text).hint("attach or detach interfaces until it has those (`form net`), and try again then"))
}

fn check_saved(agent: &Agent, saved: &SavedMemory, request: &DeployRequest, name: &Name) -> Result<(), ApiError> {
    let open = |path: &PathBuf| fs::File::open(path).map_err(|error| internal(&format!("{}: {error}", path.display())));
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm").map_err(|error| internal(&format!("/dev/kvm: {error}")))?;
    let memory = agent.store.open_end_of_memory(saved, name).map_err(|error| nothing_changed(store_error(&error)))?;
    let size = machine::check_saved(&open(&saved.state)?, &memory, kvm.into()).map_err(|error| {
        ApiError::new(ErrorCode::Failed, format!("the snapshot `{name}` cannot be restored here: {}", machine::explain(&error)))
            .hint("nothing was changed; another snapshot may do: `form vm snapshot ls`")
    })?;
    if saved.is_touched {
        verify(saved, name)?;
    }
    if let Some(unfolded) = saved.compressed {
        let space = agent.store.space().map_err(|error| store_error(&error))?;
        room_to_unfold(unfolded, space.free, agent.store.root(), name)?;
    }
    let resources = &request.spec.resources;
    if (size.vcpus, size.memory_mib) == (resources.vcpus as usize, resources.memory_mib) {
        return Ok(());
    }
    let text = format!(
        "the snapshot `{name}` is of a VM with {} vCPUs and {} MiB, and its record says {} and {} MiB",
        size.vcpus, size.memory_mib, resources.vcpus, resources.memory_mib
    );
    Err(ApiError::new(ErrorCode::Failed, text).hint("its files were mixed up: remove it with `form vm snapshot rm`"))
}

fn nothing_changed(error: ApiError) -> ApiError {
    error.hint("nothing was changed; another snapshot may do: `form vm snapshot ls`")
}

/// Reads the saved memory, and compares it with its checksums.
///
/// # Errors
/// Damaged, or of a release that kept none.
pub fn verify(saved: &SavedMemory, name: &Name) -> Result<(), ApiError> {
    let (file, compressed) = saved.open(name).map_err(|error| store_error(&error))?;
    if compressed.is_some() {
        return saved.verify_compressed(name).map_err(|error| nothing_changed(store_error(&error)));
    }
    machine::verify_memory(&file)
        .map_err(|error| nothing_changed(ApiError::new(ErrorCode::Failed, format!("the snapshot `{name}` cannot be restored: {error}"))))
}

/// Whether what is unfolded leaves the host what it needs to go on. With `free` bytes below `root`.
fn room_to_unfold(unfolded: Unfolded, free: u64, root: &Path, name: &Name) -> Result<(), ApiError> {
    if free >= unfolded.data.saturating_add(headroom::LOW) {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let text = format!(
        "the snapshot `{name}` is compressed: a restore unfolds {} MiB of memory first and leaves {} MiB, and {} MiB are free under {}",
        mib(unfolded.data),
        mib(headroom::LOW),
        free >> 20,
        root.display()
    );
    Err(ApiError::new(ErrorCode::NoRoom, text).hint("nothing was changed; remove snapshots with `form vm snapshot rm`, or images and VMs"))
}

/// What a restore has to unfold first, in bytes.
pub fn to_unfold(agent: &Agent, vm: &VmId, name: &Name) -> Option<u64> {
    Some(find(agent, vm, name).ok()?.0.saved?.compressed?.data)
}

/// What keeps a VM that should be `now` from being what it was. A saved memory holds all that the VM was started from; a disk only has to
/// fit its image and size.
fn fits(then: &DeployRequest, now: &DeployRequest, has_memory: bool, root: &impl Fn(&Digest) -> Digest) -> Result<(), String> {
    let (old, new) = (&then.spec.resources, &now.spec.resources);
    if then.image().map(root) != now.image().map(root) {
        return Err("it runs another image".to_owned());
    }
    if new.disk_gib < old.disk_gib {
        return Err(format!("its disk had {} GiB and has {}", old.disk_gib, new.disk_gib));
    }
    if !has_memory {
        return Ok(());
    }
    if old.vcpus != new.vcpus {
        return Err(format!("it had {} vCPUs and has {}", old.vcpus, new.vcpus));
    }
    if old.memory_mib != new.memory_mib {
        return Err(format!("it had {} MiB of memory and has {}", old.memory_mib, new.memory_mib));
    }
    if crate::desired::same_boot(then, now) {
        return Ok(());
    }
    let changes = plan::plan(Some(then), now, root).vms.into_iter().flat_map(|vm| vm.changes).map(|change| change.field);
    let fields: Vec<String> = changes.collect();
    Err(if fields.is_empty() { "it was deployed otherwise".to_owned() } else { format!("another {}", fields.join(", ")) })
}

#[cfg(test)]
mod tests {
    use form_api::deploy::Boot;

    use super::*;
    use crate::testing::request;

    #[test]
    fn a_saved_memory_goes_on_with_the_interfaces_that_it_had_alone() {
        let mut web = crate::testing::vm("web");
        let details = |interfaces: Vec<u8>| Details {
            operation: form_types::OperationId::from_bytes([1; 16]),
            created_at: jiff::Timestamp::UNIX_EPOCH,
            consistency: form_api::snapshot::Consistency::Crash,
            request: request("web"),
            pause_ms: None,
            next_log_sequence: 0,
            is_shared: false,
            memory: None,
            volumes: Vec::new(),
            interfaces,
        };
        let name: Name = "one".parse().unwrap();
        let check = |vm: &DesiredVm, then: Vec<u8>| same_interfaces(vm, &name, &details(then)).map_err(|error| error.message);
        assert_eq!(check(&web, vec![]), Ok(()));
        assert!(check(&web, vec![1]).unwrap_err().ends_with("it had the network interfaces eth0, eth1 and has eth0"));
        web.interfaces = [(1, [10, 64, 0, 3].into()), (3, [10, 64, 0, 4].into())].into();
        assert_eq!(check(&web, vec![3, 1]), Ok(()));
        assert!(check(&web, vec![1]).is_err());
    }

    #[test]
    fn what_is_compressed_needs_room_to_be_unfolded() {
        let name: Name = "one".parse().unwrap();
        let room = |data: u64, free: u64| {
            room_to_unfold(Unfolded { length: 1 << 40, data }, free, Path::new("/srv/form/var/lib/formation"), &name)
        };
        room(93 << 20, (93 + 64) << 20).unwrap();
        let error = room((93 << 20) - 1, (93 + 63) << 20).unwrap_err();
        assert_eq!(error.code, ErrorCode::NoRoom);
        assert!(
            error
                .message
                .contains("unfolds 93 MiB of memory first and leaves 64 MiB, and 156 MiB are free under /srv/form/var/lib/formation"),
            "{error:?}"
        );
        assert!(room(u64::MAX, u64::MAX - 1).is_err());
    }

    #[test]
    fn what_has_changed_since_is_named() {
        let then = request("web");
        let root = |image: &Digest| *image;
        let refusal = |change: fn(&mut DeployRequest), has_memory: bool| {
            let mut now = then.clone();
            change(&mut now);
            fits(&then, &now, has_memory, &root).err().unwrap_or_default()
        };
        assert_eq!(refusal(|_| {}, true), "");
        for has_memory in [true, false] {
            assert!(refusal(|now| now.boot = Boot::Image(Digest::of(b"other")), has_memory).contains("another image"));
            assert!(refusal(|now| now.spec.resources.disk_gib = 4, has_memory).contains("5 GiB and has 4"));
        }
        assert!(refusal(|now| now.spec.resources.vcpus = 2, true).contains("1 vCPUs and has 2"));
        assert!(refusal(|now| now.spec.resources.memory_mib = 256, true).contains("512 MiB of memory and has 256"));
        assert!(refusal(|now| now.spec.ports.clear(), true).contains("ports"));
        assert!(refusal(|now| now.kernel = Digest::of(b"newer"), true).contains("kernel"));
        // Larger, and the guest would not know.
        assert!(refusal(|now| now.spec.resources.disk_gib = 9, true).contains("disk"));
        // A start from the disk takes all that; and what changes in a running VM is no change.
        assert_eq!(refusal(|now| now.spec.resources.vcpus = 2, false), "");
        assert_eq!(refusal(|now| now.spec.resources.disk_gib = 9, false), "");
        assert_eq!(refusal(|now| now.spec.name = "app".parse().unwrap(), true), "");
        assert_eq!(refusal(|now| drop(now.spec.labels.insert("a".to_owned(), "b".to_owned())), true), "");
    }
}
