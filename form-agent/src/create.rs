//! VMs that are made without a Formfile: of an image, with a copy of another VM's disk, or going on from its snapshot. They take the way of
//! a deploy; what is different is here.

use std::{fs, io, sync::PoisonError};

use form_api::{
    ApiError, ErrorCode,
    deploy::{CreateVmRequest, DeployRequest, ForkOf, GivenVolume, RollbackRequest},
    operation::OperationKind,
    vm::VmState,
};
use form_bundle::pvh;
use form_store::{KernelEntry, StoreError};
use form_types::{Digest, Failpoint, Name, VmId, failpoint::reach};

use crate::{
    action::{self, Action},
    agent::{Agent, internal},
    authorise::SignedRequest,
    desired::{self, DesiredVm},
    driver::launch,
    identity::write_atomically,
    kept,
    serve::store_error,
    snapshot::{Details, restore},
    volume,
};

/// Where versions come from, for who finds none.
const NOTHING_KEPT: &str = "a version is kept when another one has become healthy after it; deploy what you want with `form deploy`";

/// What somebody wants to run, and how it comes to be.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub request: DeployRequest,
    pub how: How,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// The VM is made, or changed when it is there.
    Deploy,
    /// The VM becomes again what it was.
    Rollback,
    /// The VM is new.
    Create { start: bool, origin: Origin },
}

/// What a new VM begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Image,
    /// The disk of a stopped VM.
    Disk(Name),
    /// Another VM as it was.
    Snapshot(ForkOf),
    /// A kernel of its own, and disks.
    Kernel(Vec<GivenVolume>),
}

impl Wanted {
    pub const fn deploy(request: DeployRequest) -> Self {
        Self { request, how: How::Deploy }
    }

    pub fn rollback(rollback: RollbackRequest) -> Self {
        Self { request: rollback.to, how: How::Rollback }
    }

    /// # Errors
    /// When it asks for two things that exclude each other.
    pub fn create(create: CreateVmRequest) -> Result<Self, ApiError> {
        let invalid = |text: &str, hint: &str| Err(ApiError::new(ErrorCode::Invalid, text).hint(hint));
        if create.vm.has_guest() && !create.volumes.is_empty() {
            return invalid("`volumes` are for a VM that runs a kernel of its own", "attach them when the VM is there");
        }
        let origin = match (create.disk_of, create.fork_of) {
            (None, None) if create.vm.has_guest() => Origin::Image,
            (None, None) => Origin::Kernel(create.volumes),
            _ if !create.volumes.is_empty() => return invalid("a copy is made without volumes", "leave `volumes` out"),
            (Some(source), None) => Origin::Disk(source),
            (None, Some(_)) if !create.start => return invalid("a VM that goes on from a snapshot is started", "leave `start` out"),
            (None, Some(fork)) => Origin::Snapshot(fork),
            (Some(_), Some(_)) => return invalid("a VM is a copy of a disk or of a snapshot", "give `disk_of` or `fork_of`"),
        };
        Ok(Self { request: create.vm, how: How::Create { start: create.start, origin } })
    }

    /// What a recorded request asked for.
    pub fn read(signed: &SignedRequest) -> Option<Self> {
        // Each refuses what the other has.
        let deploy = || serde_json::from_str(&signed.body).ok().map(Self::deploy);
        let create = || serde_json::from_str(&signed.body).ok().and_then(|create| Self::create(create).ok());
        let rollback = || serde_json::from_str(&signed.body).ok().map(Self::rollback);
        create().or_else(deploy).or_else(rollback)
    }

    pub const fn name(&self) -> &Name {
        &self.request.spec.name
    }

    pub const fn is_started(&self) -> bool {
        matches!(self.how, How::Deploy | How::Rollback | How::Create { start: true, .. })
    }

    /// What of another VM it begins with.
    pub const fn origin(&self) -> &Origin {
        match &self.how {
            How::Create { origin, .. } => origin,
            How::Deploy | How::Rollback => &Origin::Image,
        }
    }

    pub const fn kind(&self) -> OperationKind {
        match &self.how {
            How::Deploy => OperationKind::Deploy,
            How::Rollback => OperationKind::VmRollback,
            How::Create { origin: Origin::Image | Origin::Kernel(_), .. } => OperationKind::VmCreate,
            How::Create { origin: Origin::Disk(_), .. } => OperationKind::VmClone,
            How::Create { origin: Origin::Snapshot(_), .. } => OperationKind::VmFork,
        }
    }
}

/// Whether a VM can be started with that kernel alone.
///
/// # Errors
/// Invalid, with what to do.
pub fn check_kernel(kernel: &KernelEntry) -> Result<(), ApiError> {
    let content = fs::read(&kernel.vmlinux).map_err(|error| internal(&error))?;
    if pvh::has_entry(&content) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::Invalid, "the kernel is no ELF file with a PVH entry, and cannot be started here").hint(pvh::WHAT_TO_DO))
}

/// Whether it can be asked for now.
///
/// # Errors
/// A conflict that says what to do: the name is taken, or the VM to copy is not stopped.
pub fn check(agent: &Agent, wanted: &Wanted) -> Result<(), ApiError> {
    let (view, name) = (agent.view(), wanted.name());
    let there = desired::vm_named(&view, name);
    if matches!(wanted.how, How::Deploy | How::Rollback) && !wanted.request.has_guest() {
        return Err(ApiError::new(ErrorCode::Invalid, "a VM that runs a kernel of its own is made, and not deployed")
            .hint("make it with `form vm create --kernel`"));
    }
    if wanted.how == How::Deploy {
        let Some(vm) = there else { return Ok(()) };
        return action::check_vm(Action::Deploy, state(agent, &vm.id), &vm).map(drop);
    }
    if wanted.how == How::Rollback {
        let vm = agent.vm_named(name)?;
        action::check_vm(Action::Deploy, state(agent, &vm.id), &vm)?;
        return was_so(agent, &vm, &wanted.request);
    }
    is_new(there.as_ref())?;
    match wanted.origin() {
        Origin::Image => Ok(()),
        Origin::Kernel(volumes) => volume::operate::of_create(agent, volumes, name),
        Origin::Disk(source) => {
            let source = here(agent, source)?;
            action::check_vm(Action::Clone, state(agent, &source.id), &source)?;
            fits(agent, &source, &wanted.request)
        }
        Origin::Snapshot(fork) => restore::check_fork(agent, &here(agent, &fork.vm)?, &fork.snapshot, &wanted.request).map(drop),
    }
}

/// Whether the VM was healthy as `request` says, and can be so again.
fn was_so(agent: &Agent, vm: &DesiredVm, request: &DeployRequest) -> Result<(), ApiError> {
    let name = vm.name();
    let versions = kept::versions(agent, vm);
    let conflict = |text: String, hint: String| Err(ApiError::new(ErrorCode::Conflict, text).hint(hint));
    if vm.request == *request {
        conflict(format!("vm/{name} is that version already"), format!("see what it can go back to with `form rollback {name} --list`"))
    } else if versions.is_empty() {
        conflict(format!("there is nothing that vm/{name} could go back to"), NOTHING_KEPT.to_owned())
    } else if versions.iter().all(|version| version.request != *request) {
        conflict(
            format!("vm/{name} was never healthy as that, or it is too long ago"),
            format!("see what it can go back to with `form rollback {name} --list`"),
        )
    } else {
        Ok(())
    }
}

/// A VM of this host.
fn here(agent: &Agent, name: &Name) -> Result<DesiredVm, ApiError> {
    let vm = agent.vm_named(name)?;
    if vm.host == agent.host_id() {
        return Ok(vm);
    }
    Err(ApiError::new(ErrorCode::Conflict, format!("vm/{name} is on another host, and so is its disk")).hint("ask its host"))
}

/// # Errors
/// A conflict, when there is a VM of that name.
pub fn is_new(there: Option<&DesiredVm>) -> Result<(), ApiError> {
    let Some(vm) = there else { return Ok(()) };
    let name = vm.name();
    Err(ApiError::new(ErrorCode::Conflict, format!("there is a vm/{name} already")).hint(format!(
        "choose another name, change that one with `form vm set {name}` or `form deploy`, or remove it with `form vm rm {name}`"
    )))
}

fn state(agent: &Agent, vm: &VmId) -> VmState {
    agent.fleet.observed(vm).map_or(VmState::Pending, |observed| observed.state)
}

/// Whether the disk of `source` is one that the request could have made.
fn fits(agent: &Agent, source: &DesiredVm, request: &DeployRequest) -> Result<(), ApiError> {
    let conflict = |text: String, hint: String| Err(ApiError::new(ErrorCode::Conflict, text).hint(hint));
    let made_from = match fs::read(launch::made_from(agent, &source.id)) {
        Ok(json) => serde_json::from_slice::<DeployRequest>(&json).map_err(|error| internal(&error))?,
        // Never started.
        Err(error) if error.kind() == io::ErrorKind::NotFound => source.request.clone(),
        Err(error) => return Err(internal(&error)),
    };
    if made_from.image().map(|image| agent.root_of(image)) != request.image().map(|image| agent.root_of(image)) {
        let name = source.name();
        return conflict(
            format!("the disk of vm/{name} was not made from the image {}", request.image().map(Digest::short).unwrap_or_default()),
            format!("name the image that `form vm show {name} -o wide` shows"),
        );
    }
    let (has, wanted) = (made_from.spec.resources.disk_gib, request.spec.resources.disk_gib);
    if wanted < has {
        return conflict(
            format!("the disk of vm/{} has {has} GiB, a copy of it cannot have {wanted}", source.name()),
            format!("ask for {has}"),
        );
    }
    Ok(())
}

/// A VM with something on the disk that the state does not know yet. Unless it is kept, that is removed again.
pub struct Made<'a> {
    agent: &'a Agent,
    vm: VmId,
    kept: bool,
}

impl Made<'_> {
    /// The state knows the VM.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = remove(self.agent, &self.vm)
        {
            tracing::warn!(vm = %self.vm, "what was made of it stays until the agent is started again: {error}");
        }
        self.agent.being_made().remove(&self.vm);
    }
}

fn remove(agent: &Agent, vm: &VmId) -> Result<(), String> {
    agent.store.remove_disk(vm).map_err(|error| error.to_string())?;
    agent.store.remove_snapshots(vm).map_err(|error| error.to_string())?;
    match fs::remove_dir_all(agent.vm_directory(vm)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// Gives `vm`, which the state does not know, a copy of the disk of the VM that is called `source`. Starts of that one wait meanwhile.
///
/// # Errors
/// The source is gone or not stopped any more, or what the disk's file system says. Nothing is left behind then.
pub fn copy_disk<'a>(agent: &'a Agent, source: &Name, vm: VmId, request: &DeployRequest) -> Result<Made<'a>, ApiError> {
    let source = agent.vm_named(source)?;
    let turn = agent.disk_turn(&source.id);
    let _held = turn.lock().unwrap_or_else(PoisonError::into_inner);
    // Its driver says that it starts before it takes the turn.
    action::check_vm(Action::Clone, state(agent, &source.id), &source)?;
    fits(agent, &source, request)?;
    let made = begin(agent, vm, request)?;
    match agent.store.clone_disk(&source.id, &vm) {
        // Of a VM that was never started there is nothing to copy: the clone's disk is made at its own first start.
        Ok(_) | Err(StoreError::NoDisk(_)) => {}
        Err(error) => return Err(store_error(&error)),
    }
    reach(Failpoint::CloneMade);
    Ok(made)
}

/// Gives `vm`, which the state does not know, what it needs to go on from a snapshot of another one: the files are shared until it has.
///
/// # Errors
/// The snapshot is gone, cannot be gone on from, or what its file system says. Nothing is left behind then.
pub fn share_snapshot<'a>(agent: &'a Agent, fork: &ForkOf, vm: VmId, request: &DeployRequest) -> Result<Made<'a>, ApiError> {
    let source = here(agent, &fork.vm)?;
    let details = restore::check_fork(agent, &source, &fork.snapshot, request)?;
    let details = Details { request: request.clone(), is_shared: true, ..details };
    let details = serde_json::to_value(details).map_err(|error| internal(&error))?;
    let made = begin(agent, vm, request)?;
    agent.store.share_snapshot(&source.id, &fork.snapshot, &vm, details).map_err(|error| store_error(&error))?;
    reach(Failpoint::ForkShared);
    Ok(made)
}

/// The directory of a VM that becomes a copy.
fn begin<'a>(agent: &'a Agent, vm: VmId, request: &DeployRequest) -> Result<Made<'a>, ApiError> {
    agent.being_made().insert(vm);
    let made = Made { agent, vm, kept: false };
    let record = serde_json::to_vec(request).map_err(|error| internal(&error))?;
    let noted = fs::create_dir_all(agent.vm_directory(&vm))
        .and_then(|()| write_atomically(&marker(agent, &vm), 0o600, b""))
        .and_then(|()| write_atomically(&launch::made_from(agent, &vm), 0o600, &record));
    noted.map_err(|error| ApiError::new(ErrorCode::Failed, format!("the new VM's directory: {error}")))?;
    Ok(made)
}

fn marker(agent: &Agent, vm: &VmId) -> std::path::PathBuf {
    agent.vm_directory(vm).join("new-identity")
}

/// Whether its disk is a copy on which no guest has run: the first one makes anew what two machines must not share.
pub fn is_new_clone(agent: &Agent, vm: &VmId) -> bool {
    marker(agent, vm).exists()
}

/// A guest has run on its disk.
pub fn is_itself(agent: &Agent, vm: &VmId) {
    match fs::remove_file(marker(agent, vm)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(vm = %vm, "its next start gives it a new machine-id and new host keys again: {error}");
        }
        _ => {}
    }
}
