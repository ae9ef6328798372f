//! One snapshot: the guest quiesced, the VM paused, everything written, the VM let go on.

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use form_api::{ApiError, ErrorCode, snapshot::Consistency, vm::VmState};
use form_guest::protocol::{Reply, Request};
use form_store::{SnapshotDraft, StoreError};
use form_types::{Failpoint, Name, OperationId, VmId, failpoint::reach};
use form_vmm::{
    control::{Aside, Client, ClientError, ErrorKind, SaveHow, VmState as ProcessState},
    machine::Saved as ProcessSaved,
};
use jiff::Timestamp;

use super::{
    Details, KeptMemory,
    base::{self, Base},
    operate::on_disk,
    precopy,
    volumes::{self, Drafts, KeptVolume},
};
use crate::{
    agent::{Agent, internal},
    cgroup::Twice,
    desired::DesiredVm,
    driver::{guest, live, process::RuntimeDirectory},
    headroom,
    interface::describe::numbers,
    machine, memory,
    serve::store_error,
    volume::snapshot::PartDetails,
};

/// How long a guest may take to quiesce its file systems.
const QUIESCE: Duration = Duration::from_secs(10);
/// After this the guest lets them go on by itself. Its clock stands while it is paused.
const FREEZE_LIMIT: Duration = Duration::from_secs(20);
/// For a short question.
const ANSWER: Duration = Duration::from_secs(3);
/// What a host keeps, in MiB, beside the memory that a copy of a VM's process may come to hold.
const SPARE_MIB: u64 = 256;
/// Tries to let the VM go on. After these its driver tries.
const RESUMES: u32 = 3;

/// # Errors
/// No room, the VM ended meanwhile, or it cannot be saved. It goes on as it was, and nothing is left.
pub async fn take(
    agent: &Arc<Agent>,
    id: OperationId,
    vm: &DesiredVm,
    name: &Name,
    state: VmState,
    compress: bool,
) -> Result<(), ApiError> {
    let result = make(agent, id, vm, name, state, compress).await;
    if result.is_err() {
        // It is told why it failed; what stays of it is logged.
        let _ = on_disk(agent, move |agent| Ok(volumes::remove_made_by(agent, id))).await;
    }
    result
}

async fn make(agent: &Arc<Agent>, id: OperationId, vm: &DesiredVm, name: &Name, state: VmState, compress: bool) -> Result<(), ApiError> {
    let (vm_id, of) = (vm.id, name.clone());
    let mut draft = on_disk(agent, move |agent| agent.store.draft_snapshot(&vm_id, &of)).await?;
    if !vm.request.has_guest() {
        draft.has_no_disk();
    }
    let mut details = Details {
        operation: id,
        created_at: Timestamp::now(),
        consistency: Consistency::Stopped,
        request: vm.request.clone(),
        pause_ms: None,
        next_log_sequence: 0,
        is_shared: false,
        memory: None,
        volumes: Vec::new(),
        interfaces: Vec::new(),
    };
    if matches!(state, VmState::Running | VmState::Paused) {
        let running = Running { agent, vm: &vm_id, directory: RuntimeDirectory::new(&agent.paths().vm_runtime(), &vm_id) };
        details.request = running.started_from().unwrap_or(details.request);
        let runs = state == VmState::Running;
        agent.operations.step(id, if runs { "copying memory while the VM runs" } else { "making room for its memory" });
        let memory_mib = memory::held_mib(agent, &vm_id, details.request.spec.resources.memory_mib);
        let prepared = running.prepare(draft, memory_mib, runs, compress).await?;
        let can_quiesce = runs && vm.request.has_guest();
        if can_quiesce {
            agent.operations.step(id, "quiescing the guest's file systems");
            details.next_log_sequence = running.next_log_sequence().await;
        }
        let frozen = can_quiesce && running.freeze().await;
        details.consistency = if frozen { Consistency::Quiesced } else { Consistency::Crash };
        agent.operations.step(id, "saving memory, devices and disks");
        let part = part(&details, vm_id);
        let saved = running.save(prepared, vm.clone(), name.clone(), part).await;
        if can_quiesce {
            running.thaw(frozen).await;
        }
        let saved = saved?;
        details.created_at = Timestamp::now();
        details.volumes = saved.volumes;
        details.interfaces = saved.interfaces;
        details.pause_ms = Some(u64::try_from(saved.pause.as_millis()).unwrap_or(u64::MAX));
        let mut memory = saved.memory;
        if let Some(writing) = saved.writing {
            agent.operations.step(id, "writing memory");
            let left = on_disk(agent, move |agent| Ok(writing.wait(agent))).await??;
            memory.written_bytes = left.map(|left| saved.copied_bytes + left);
        }
        details.memory = Some(memory);
        draft = saved.draft;
    } else {
        agent.operations.step(id, "copying its disks");
        let (vm, name, part) = (vm.clone(), name.clone(), part(&details, vm_id));
        let copied = on_disk(agent, move |agent| {
            let mut copy = || -> Result<Vec<KeptVolume>, ApiError> {
                let drafts = Drafts::begin(agent, &vm, &name, false)?;
                draft.copy_disk(&agent.store, &vm_id).map_err(|error| store_error(&error))?;
                drafts.copy()?;
                drafts.publish(&part)
            };
            let volumes = copy();
            Ok(volumes.map(|volumes| (draft, volumes)))
        });
        (draft, details.volumes) = copied.await??;
    }
    let details = serde_json::to_value(&details).map_err(|error| internal(&error))?;
    on_disk(agent, move |_| draft.publish(details)).await?;
    reach(Failpoint::SnapshotNamed);
    Ok(())
}

/// What the snapshot of a volume says that is made with the VM's.
const fn part(details: &Details, vm: VmId) -> PartDetails {
    let Details { operation, created_at, consistency, .. } = *details;
    PartDetails { operation, created_at, consistency, pause_ms: None, part_of: Some(vm) }
}

/// A VM with a process.
pub(super) struct Running<'a> {
    pub(super) agent: &'a Arc<Agent>,
    pub(super) vm: &'a VmId,
    pub(super) directory: RuntimeDirectory,
}

impl Running<'_> {
    /// What is in its memory may be older than what it should be now.
    fn started_from(&self) -> Option<form_api::deploy::DeployRequest> {
        self.directory.read_record().map(|record| record.request)
    }

    async fn next_log_sequence(&self) -> u64 {
        match guest::ask(&self.directory.control(), &Request::Status, ANSWER).await {
            Ok(Reply::Status(status)) => status.next_log_sequence,
            _ => 0,
        }
    }

    /// Whether the guest holds back writes now.
    pub(super) async fn freeze(&self) -> bool {
        let limit_ms = u64::try_from(FREEZE_LIMIT.as_millis()).unwrap_or(u64::MAX);
        match guest::ask(&self.directory.control(), &Request::Freeze { limit_ms }, QUIESCE).await {
            Ok(Reply::Done) => true,
            Ok(_) => false,
            Err(error) => {
                tracing::warn!(vm = %self.vm, "its file systems are not quiesced, the snapshot's disk is as after a loss of power: {error}");
                false
            }
        }
    }

    /// Also when the freeze was not answered: it may have come to pass. A guest that does not hear thaws by itself.
    pub(super) async fn thaw(&self, frozen: bool) {
        let control = self.directory.control();
        if let Err(error) = guest::ask(&control, &Request::Thaw, ANSWER).await
            && frozen
        {
            tracing::warn!(vm = %self.vm, "its file systems go on by themselves in a moment: {error}");
        }
        let (agent, vm) = (Arc::clone(self.agent), *self.vm);
        tokio::spawn(async move {
            if let Err(error) = live::resumed(&control, &agent, &vm).await {
                tracing::debug!(vm = %vm, "the guest was not told that it stood still: {error}");
            }
        });
    }

    /// Makes the files, and has the most of the memory of a VM that `runs` copied to its own.
    async fn prepare(&self, mut draft: SnapshotDraft, memory_mib: u64, runs: bool, compress: bool) -> Result<Prepared, ApiError> {
        let (agent, vm, control) = (Arc::clone(self.agent), *self.vm, self.directory.control());
        let done = tokio::task::spawn_blocking(move || {
            let client = Client::connect(&control).map_err(|error| process_error(&error))?;
            let mut base = base::prepare(&agent, &vm, &client, &mut draft, compress).map_err(|error| full(&agent, error))?;
            let mut twice = None;
            if runs {
                twice = room_for_copy(&agent, &vm, memory_mib);
                precopy::precopy(&vm, &client, &mut draft, &mut base).map_err(|error| full(&agent, error))?;
            }
            Ok(Prepared { client, draft, base, twice })
        });
        done.await.map_err(|error| internal(&error))?
    }

    /// Pauses it, saves it with its volumes, lets it go on if it ran.
    async fn save(&self, prepared: Prepared, desired: DesiredVm, name: Name, mut part: PartDetails) -> Result<Saved, ApiError> {
        let (agent, vm, directory) = (Arc::clone(self.agent), *self.vm, self.directory.clone());
        let done = tokio::task::spawn_blocking(move || {
            // No volume comes or goes meanwhile.
            let turn = agent.volumes_of(&vm);
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let volumes = Drafts::begin(&agent, &desired, &name, true)?;
            // An agent that is killed now leaves a VM that stands: the next one finds the mark and lets it go on.
            directory.mark_saving().map_err(|error| internal(&error))?;
            let result = stand_and_save(&agent, &vm, &directory.control(), prepared, &volumes);
            if !matches!(result, Err(Fault::Stands(_))) {
                directory.unmark_saving();
            }
            let mut saved = result.map_err(Fault::into_api)?;
            part.created_at = Timestamp::now();
            part.pause_ms = Some(u64::try_from(saved.pause.as_millis()).unwrap_or(u64::MAX));
            match volumes.publish(&part) {
                Ok(kept) => saved.volumes = kept,
                Err(error) => {
                    // As in `stand_and_save`.
                    let _ = saved.writing.map(|writing| writing.wait(&agent));
                    return Err(full(&agent, error));
                }
            }
            Ok(saved)
        });
        done.await.map_err(|error| internal(&error))?
    }
}

/// Everything that can be done before a VM stands.
struct Prepared {
    client: Client,
    draft: SnapshotDraft,
    base: Base,
    twice: Option<Twice>,
}

struct Saved {
    draft: SnapshotDraft,
    /// Of which there are snapshots now.
    volumes: Vec<KeptVolume>,
    /// The numbers of those that it has beside the first one.
    interfaces: Vec<u8>,
    /// How long it stood still.
    pause: Duration,
    memory: KeptMemory,
    /// What was written of it before.
    copied_bytes: u64,
    /// What is left to do for the draft to be whole.
    writing: Option<Writing>,
}

/// Memory that is being written while its VM goes on.
struct Writing {
    aside: Aside,
    /// Until then it is allowed.
    _twice: Twice,
}

impl Writing {
    /// Gives the bytes of pages written.
    fn wait(self, agent: &Agent) -> Result<Option<u64>, ApiError> {
        self.aside.wait().map_err(|error| full(agent, process_error(&error)))
    }
}

pub(super) enum Fault {
    /// The VM is as it was.
    Api(ApiError),
    /// It could not be let go on.
    Stands(ApiError),
}

impl Fault {
    pub(super) fn into_api(self) -> ApiError {
        match self {
            Self::Api(error) | Self::Stands(error) => error,
        }
    }
}

fn stand_and_save(
    agent: &Agent,
    vm: &VmId,
    control: &Path,
    Prepared { client, mut draft, base, twice }: Prepared,
    volumes: &Drafts,
) -> Result<Saved, Fault> {
    let networks = client.metrics().map_err(|error| Fault::Api(process_error(&error)))?.networks;
    let ran = match client.status() {
        Ok((state, _)) => state == ProcessState::Running,
        Err(error) => return Err(Fault::Api(process_error(&error))),
    };
    let twice = twice.filter(|_| ran);
    let begun = Instant::now();
    let mut aside = None;
    let saved = pause(&client, ran).and_then(|()| {
        reach(Failpoint::SnapshotPaused);
        let memory = write(agent, vm, &client, &mut draft, base, volumes, twice.is_some().then_some(&mut aside))?;
        reach(Failpoint::SnapshotSaved);
        Ok(memory)
    });
    let resumed = if ran { go_on(control) } else { Ok(()) };
    let pause = begun.elapsed();
    if (saved.is_err() || resumed.is_err())
        && let Some(aside) = aside.take()
    {
        // Its memory counts as the VM's, whose limit goes down when this returns: a VM over its limit would be killed.
        let _ = aside.wait();
    }
    match (saved, resumed) {
        (Ok((memory, copied_bytes)), Ok(())) => {
            let writing = aside.zip(twice).map(|(aside, twice)| Writing { aside, _twice: twice });
            Ok(Saved { draft, volumes: Vec::new(), interfaces: numbers(&networks), pause, memory, copied_bytes, writing })
        }
        (Err(error), Ok(())) => Err(Fault::Api(full(agent, error))),
        (_, Err(error)) => Err(Fault::Stands(error)),
    }
}

/// Room for the VM's memory a second time: what its process writes counts as its own until the disk has it, and so does the memory of a copy of the
/// process. Without that the VM stands until what is left is written.
fn room_for_copy(agent: &Agent, vm: &VmId, memory_mib: u64) -> Option<Twice> {
    let available = machine::available_memory_mib().ok()?;
    if available < memory_mib + SPARE_MIB {
        tracing::info!(vm = %vm, available, "it stands until what is left of its memory is written: the host has too little to hold it twice");
        return None;
    }
    match Twice::allow(&agent.host_id().mark(), vm, memory_mib) {
        Ok(twice) => Some(twice),
        Err(error) => {
            tracing::warn!(vm = %vm, %error, "it stands until what is left of its memory is written: its limit cannot be raised");
            None
        }
    }
}

pub(super) fn pause(client: &Client, ran: bool) -> Result<(), ApiError> {
    match if ran { client.pause() } else { Ok(()) } {
        Ok(()) => Ok(()),
        Err(error) => Err(process_error(&error)),
    }
}

/// Everything at one instant: nothing of the VM moves.
/// With `aside` the VM may have its memory twice, and that may be written later: there it is then, also when something else fails.
fn write(
    agent: &Agent,
    vm: &VmId,
    client: &Client,
    draft: &mut SnapshotDraft,
    base: Base,
    volumes: &Drafts,
    aside: Option<&mut Option<Aside>>,
) -> Result<(KeptMemory, u64), ApiError> {
    let store = |error: StoreError| store_error(&error);
    let (state, memory) = draft.saved().ok_or_else(|| internal(&"the snapshot has no files"))?;
    let mut begun = None;
    if let Some(aside) = aside {
        let copied = save_aside(client, vm, state.as_fd(), memory.as_fd(), base.how).map_err(|error| process_error(&error))?;
        begun = copied.map(|(writing, saved)| {
            *aside = Some(writing);
            saved
        });
    }
    let saved = match begun {
        Some(saved) => saved,
        None => client.save(state.as_fd(), memory.as_fd(), base.how).map_err(|error| process_error(&error))?,
    };
    draft.copy_disk(&agent.store, vm).map_err(store)?;
    volumes.share()?;
    // Its process may have been killed meanwhile, and another one started on the disk that was being copied.
    still_stands(client)?;
    Ok(base.kept(saved))
}

/// None when the process cannot be copied, or is of a release that does not know how: a longer pause is better than no snapshot.
fn save_aside(
    client: &Client,
    vm: &VmId,
    state: BorrowedFd<'_>,
    memory: BorrowedFd<'_>,
    how: SaveHow,
) -> Result<Option<(Aside, ProcessSaved)>, ClientError> {
    match client.save_aside(state, memory, how) {
        Ok(aside) => Ok(Some(aside)),
        Err(ClientError::Refused { kind: ErrorKind::System | ErrorKind::Invalid, message }) => {
            tracing::info!(vm = %vm, message, "it stands until what is left of its memory is written: its process cannot be copied");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Asked of the very process that was saved.
pub(super) fn still_stands(client: &Client) -> Result<(), ApiError> {
    match client.status() {
        Ok((ProcessState::Paused, _)) => Ok(()),
        Ok(_) => Err(ApiError::new(ErrorCode::Conflict, "somebody let the VM go on while it was being saved").hint("try again")),
        Err(error) => Err(process_error(&error)),
    }
}

/// On a connection of its own: that of the save is used up when the save has failed.
pub(super) fn go_on(control: &Path) -> Result<(), ApiError> {
    let mut last = None;
    for _ in 0..RESUMES {
        match Client::connect(control).and_then(|client| client.resume()) {
            Ok(()) | Err(ClientError::Refused { kind: ErrorKind::WrongState, .. }) => return Ok(()),
            // Then there is nothing that stands.
            Err(ClientError::Gone | ClientError::Connect(_)) => return Ok(()),
            Err(error) => last = Some(error),
        }
    }
    let words = last.map_or_else(String::new, |error| error.to_string());
    Err(ApiError::new(ErrorCode::Failed, format!("the VM was paused to be saved and does not go on: {words}"))
        .hint("start it again with `form vm reset`"))
}

pub(super) fn process_error(error: &ClientError) -> ApiError {
    match error {
        ClientError::Gone | ClientError::Connect(_) => {
            ApiError::new(ErrorCode::Conflict, "the VM ended while it was being saved").hint("see `form ps`, and try again when it runs")
        }
        other => ApiError::new(ErrorCode::Failed, format!("the VM cannot be saved: {other}")).hint("see the agent's log"),
    }
}

/// A full disk is told as such, whoever met it. The draft still takes its room.
fn full(agent: &Agent, error: ApiError) -> ApiError {
    match agent.store.space() {
        Ok(space) if space.free < headroom::LOW => ApiError::new(ErrorCode::NoRoom, format!("the host's disk is full: {}", error.message))
            .hint("the VM runs on, and nothing is kept; remove snapshots with `form vm snapshot rm`, or images and VMs"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use form_vmm::control::{ControlReply, ControlRequest, channel::Channel, launch};

    use super::*;

    /// A VM process that answers each request as `answer` says, at a socket.
    fn process(directory: &Path, answer: impl Fn(&ControlRequest) -> ControlReply + Send + 'static) -> PathBuf {
        let path = directory.join("control.sock");
        let listener = launch::listen(&path).unwrap();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(1));
                let flags = rustix::net::SocketFlags::NONBLOCK;
                let Ok(socket) = rustix::net::accept_with(&listener, flags) else { continue };
                let channel = Channel::new(socket);
                while let Ok(Some((request, _))) = channel.receive::<ControlRequest>(Instant::now() + Duration::from_secs(5)) {
                    channel.send(&answer(&request), &[], Instant::now() + Duration::from_secs(5)).unwrap();
                }
            }
        });
        path
    }

    #[test]
    fn a_disk_that_was_copied_while_its_vm_moved_is_no_snapshots() {
        let status = |state| move |_: &ControlRequest| ControlReply::Status { state, pid: 1 };
        let asked = |state| {
            let directory = tempfile::tempdir().unwrap();
            still_stands(&Client::connect(&process(directory.path(), status(state))).unwrap())
        };
        asked(ProcessState::Paused).unwrap();
        assert_eq!(asked(ProcessState::Running).unwrap_err().code, ErrorCode::Conflict);
        // The process is gone; one that was started after it is not asked.
        let (mine, its) = Channel::pair().unwrap();
        drop(its);
        let error = still_stands(&Client::new(mine)).unwrap_err();
        assert!(error.message.contains("ended while it was being saved"), "{error:?}");
    }

    #[test]
    fn a_vm_goes_on_or_it_is_said_that_it_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let control = process(directory.path(), |request| match request {
            ControlRequest::Resume => ControlReply::Done,
            _ => ControlReply::Error { kind: ErrorKind::System, message: "no".to_owned() },
        });
        go_on(&control).unwrap();

        // It runs already: somebody else was faster.
        let directory = tempfile::tempdir().unwrap();
        let wrong = |_: &ControlRequest| ControlReply::Error { kind: ErrorKind::WrongState, message: "running".to_owned() };
        go_on(&process(directory.path(), wrong)).unwrap();

        let directory = tempfile::tempdir().unwrap();
        let fails = |_: &ControlRequest| ControlReply::Error { kind: ErrorKind::System, message: "no thread".to_owned() };
        let error = go_on(&process(directory.path(), fails)).unwrap_err();
        assert!(error.message.contains("no thread") && error.hint.unwrap().contains("reset"));
        go_on(Path::new("/nonexistent/socket")).unwrap();
    }
}
