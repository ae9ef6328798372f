//! VMs that are made without a Formfile: of an image, or with a copy of another VM's disk. They take the way of a deploy; what is different
//! is here.

use std::{fs, io, sync::PoisonError};

use form_api::{
    ApiError, ErrorCode,
    deploy::{CreateVmRequest, DeployRequest},
    operation::OperationKind,
    vm::VmState,
};
use form_store::StoreError;
use form_types::{Failpoint, Name, VmId, failpoint::reach};

use crate::{
    action::{self, Action},
    agent::{Agent, internal},
    authorise::SignedRequest,
    desired::{self, DesiredVm},
    driver::launch,
    identity::write_atomically,
    serve::store_error,
};

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
    /// The VM is new.
    Create { start: bool, disk_of: Option<Name> },
}

impl Wanted {
    pub const fn deploy(request: DeployRequest) -> Self {
        Self { request, how: How::Deploy }
    }

    pub fn create(create: CreateVmRequest) -> Self {
        Self { request: create.vm, how: How::Create { start: create.start, disk_of: create.disk_of } }
    }

    /// What a recorded request asked for.
    pub fn read(signed: &SignedRequest) -> Option<Self> {
        // Each refuses what the other has.
        let deploy = || serde_json::from_str(&signed.body).ok().map(Self::deploy);
        serde_json::from_str(&signed.body).ok().map(Self::create).or_else(deploy)
    }

    pub const fn name(&self) -> &Name {
        &self.request.spec.name
    }

    pub const fn is_started(&self) -> bool {
        matches!(self.how, How::Deploy | How::Create { start: true, .. })
    }

    /// The VM whose disk is copied.
    pub const fn source(&self) -> Option<&Name> {
        match &self.how {
            How::Create { disk_of: Some(source), .. } => Some(source),
            _ => None,
        }
    }

    pub const fn kind(&self) -> OperationKind {
        match &self.how {
            How::Deploy => OperationKind::Deploy,
            How::Create { disk_of: None, .. } => OperationKind::VmCreate,
            How::Create { disk_of: Some(_), .. } => OperationKind::VmClone,
        }
    }
}

/// Whether it can be asked for now.
///
/// # Errors
/// A conflict that says what to do: the name is taken, or the VM to copy is not stopped.
pub fn check(agent: &Agent, wanted: &Wanted) -> Result<(), ApiError> {
    let (view, name) = (agent.view(), wanted.name());
    let there = desired::vm_named(&view, name);
    if wanted.how == How::Deploy {
        let Some(vm) = there else { return Ok(()) };
        return action::check(Action::Deploy, state(agent, &vm.id), name).map(drop);
    }
    is_new(there.as_ref())?;
    let Some(source) = wanted.source() else { return Ok(()) };
    let source = agent.vm_named(source)?;
    if source.host != agent.host_id() {
        let text = format!("vm/{} is on another host, and so is its disk", source.name());
        return Err(ApiError::new(ErrorCode::Conflict, text).hint("ask its host"));
    }
    action::check(Action::Clone, state(agent, &source.id), source.name())?;
    fits(agent, &source, &wanted.request)
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
    if agent.root_of(&made_from.image) != agent.root_of(&request.image) {
        let name = source.name();
        return conflict(
            format!("the disk of vm/{name} was not made from the image {}", request.image.short()),
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
    action::check(Action::Clone, state(agent, &source.id), source.name())?;
    fits(agent, &source, request)?;
    agent.being_made().insert(vm);
    let made = Made { agent, vm, kept: false };
    let record = serde_json::to_vec(request).map_err(|error| internal(&error))?;
    let noted = fs::create_dir_all(agent.vm_directory(&vm))
        .and_then(|()| write_atomically(&marker(agent, &vm), 0o600, b""))
        .and_then(|()| write_atomically(&launch::made_from(agent, &vm), 0o600, &record));
    noted.map_err(|error| ApiError::new(ErrorCode::Failed, format!("the new VM's directory: {error}")))?;
    match agent.store.clone_disk(&source.id, &vm) {
        // Of a VM that was never started there is nothing to copy: the clone's disk is made at its own first start.
        Ok(_) | Err(StoreError::NoDisk(_)) => {}
        Err(error) => return Err(store_error(&error)),
    }
    reach(Failpoint::CloneMade);
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
