use std::{
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
    response::Response,
};
use form_api::{
    ApiError, ErrorCode,
    operation::Operation,
    server::{ndjson, read_json},
    snapshot::RestoreRequest,
    vm::{LOG_CURSOR_HEADER, LogCursor, LogLine, LogStream, LogsQuery, RenameRequest, SetRequest, Vm, VmDetail, VmState},
};
use form_types::Name;
use futures_util::stream;
use jiff::Timestamp;
use tokio::sync::watch;

use super::{
    Segment, Shared, accepted, begins_after, blocking, changing, no_body,
    openapi::{ChangeHeaders, Impossible, InTheWay, Missing, NoRoom, Refused, Unreadable},
    parsed, query, reading,
};
use crate::{
    action::{self, Action},
    agent::{Agent, internal},
    authorise::Caller,
    desired,
    driver::process::RuntimeDirectory,
    interface,
    lifecycle::{self, Change},
    logs::{KeptLine, Reader},
};

/// All VMs, by name.
#[utoipa::path(
    get,
    path = "/v1/vms",
    operation_id = "list_vms",
    tag = "vms",
    responses((status = 200, description = "The VMs", body = Vec<Vm>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Vm>>, ApiError> {
    reading(&agent, request).await?;
    let mut vms: Vec<Vm> = desired::vms(&agent.view()).values().map(|vm| agent.vm(vm)).collect();
    vms.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(Json(vms))
}

/// One VM in full: as it is, as it was asked for, and as its guest found it.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}",
    operation_id = "show_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM")),
    responses((status = 200, description = "The VM", body = VmDetail), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<VmDetail>, ApiError> {
    reading(&agent, request).await?;
    let desired = agent.vm_named(&parsed(&name)?)?;
    let observed = agent.fleet.observed(&desired.id);
    let memory_present_mib = observed.as_ref().and_then(|observed| observed.memory_mib);
    let guest = observed.and_then(|observed| observed.guest);
    let interfaces = interface::describe::of_vm(&agent, &desired);
    Ok(Json(VmDetail { vm: agent.vm(&desired), limits: desired.limits, memory_present_mib, desired: desired.request, interfaces, guest }))
}

async fn change(agent: Shared, name: String, request: Request, change: Change) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    no_body(&body)?;
    begin(agent, caller, &name, change).await
}

async fn begin(agent: Shared, caller: Caller, name: &str, change: Change) -> Accepted {
    let name = parsed(name)?;
    let runtime = tokio::runtime::Handle::current();
    blocking(move || {
        // The drivers that it wakes are tasks of this runtime.
        let _entered = runtime.enter();
        lifecycle::begin(&agent, &caller, &name, change)
    })
    .await
    .map(accepted)
}

type Accepted = Result<(StatusCode, Json<Operation>), ApiError>;

/// Starts a VM.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/start",
    operation_id = "start_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn start(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, name, request, Change::Start).await
}

/// Stops a VM: its guest is asked to shut down, and ended when it does not.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/stop",
    operation_id = "stop_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn stop(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, name, request, Change::Stop).await
}

/// Stops a VM and starts it again.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/restart",
    operation_id = "restart_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn restart(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, name, request, Change::Restart).await
}

/// Stops the processors of a VM; everything else stays as it is.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/pause",
    operation_id = "pause_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn pause(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, name, request, Change::Pause).await
}

/// Lets a paused VM go on.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/resume",
    operation_id = "resume_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn resume(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, name, request, Change::Resume).await
}

/// Starts a VM again at once, as with the reset button: its guest is not asked.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/reset",
    operation_id = "reset_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn reset(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, name, request, Change::Reset).await
}

/// Gives a VM another name.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/rename",
    operation_id = "rename_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    request_body(content = RenameRequest, description = "The new name"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn rename(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let RenameRequest { name: new } = read_json(&body)?;
    begin(agent, caller, &name, Change::Rename(new)).await
}

/// Changes a VM without a Formfile; what is left out stays.
#[utoipa::path(
    patch,
    path = "/v1/vms/{name}",
    operation_id = "set_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    request_body(content = SetRequest, description = "What to change"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn set(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let wanted: SetRequest = read_json(&body)?;
    begin(agent, caller, &name, Change::Set(wanted)).await
}

/// Puts a VM back to what it was when a snapshot was made, and lets it go on from there.
///
/// What it did since is lost. The snapshot stays. The volumes that it holds go back as well. A VM whose image, size, settings or
/// volumes have changed since is refused.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/restore",
    operation_id = "restore_vm",
    tag = "snapshots",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    request_body(content = RestoreRequest, description = "The snapshot"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, Impossible, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn restore(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let wanted: RestoreRequest = read_json(&body)?;
    begin(agent, caller, &name, Change::Restore(wanted)).await
}

/// Destroys a VM, with its disk, its snapshots and its log.
#[utoipa::path(
    delete,
    path = "/v1/vms/{name}",
    operation_id = "destroy_vm",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn destroy(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, name, request, Change::Destroy).await
}

/// What a VM's service wrote, or its console.
///
/// A follower whose connection breaks goes on with `after` and the cursor of the last line it got.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/logs",
    operation_id = "vm_logs",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM"), LogsQuery),
    responses((status = 200, description = "One JSON object a line, as they come. An error in the middle is the last line, as `{\"error\": …}`", body = LogLine, content_type = "application/x-ndjson", headers(("form-log-cursor" = LogCursor, description = "The cursor of the line before the first one; absent when there is none"))), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn logs(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Response, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let name: Name = parsed(&name)?;
    let vm = agent.vm_named(&name)?;
    let state = agent.fleet.observed(&vm.id).map_or(VmState::Pending, |observed| observed.state);
    let wanted: LogsQuery = query(&parts.uri)?;
    if !wanted.console {
        action::check_vm(Action::Logs, state, &vm)?;
    }
    if wanted.console {
        let directory = RuntimeDirectory::new(&agent.paths().vm_runtime(), &vm.id);
        let kept = agent.log_directory(&vm.id).join("console.log");
        let lines = blocking(move || console_lines(&directory, kept, wanted.tail)).await?;
        return Ok(ndjson(stream::iter(lines.into_iter().map(Ok))));
    }
    let directory = agent.log_directory(&vm.id);
    let follower = blocking(move || Follower::new(&agent, vm.id, directory, wanted)).await?;
    let start = follower.start.map(|cursor| cursor.to_string());
    let lines = ndjson(stream::unfold(follower, |mut follower| async {
        let next = follower.next().await.transpose()?;
        Some((next, follower))
    }));
    Ok(begins_after(lines, LOG_CURSOR_HEADER, start))
}

/// The serial console's last output: of the running VM, or of its last run.
fn console_lines(directory: &RuntimeDirectory, kept: PathBuf, tail: Option<usize>) -> Result<Vec<LogLine>, ApiError> {
    let bytes = match std::fs::File::open(directory.console()) {
        Ok(file) => {
            let ring = form_vmm::log_ring::Reader::open(file).map_err(|error| internal(&error))?;
            let capacity = usize::try_from(ring.capacity()).unwrap_or(usize::MAX);
            ring.tail(capacity).map_err(|error| internal(&error))?.bytes
        }
        Err(_) => std::fs::read(kept).unwrap_or_default(),
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let skip = tail.map_or(0, |tail| lines.len().saturating_sub(tail));
    let line = |line: &&str| LogLine {
        at: Timestamp::now(),
        stream: LogStream::Console,
        line: line.trim_end_matches('\r').to_owned(),
        cursor: None,
    };
    Ok(lines[skip..].iter().map(line).collect())
}

/// Reads the files of a log, and goes on as they grow.
struct Follower {
    reader: Reader,
    query: LogsQuery,
    changed: watch::Receiver<u64>,
    /// The last line that was passed over.
    start: Option<LogCursor>,
    agent: Arc<Agent>,
    vm: form_types::VmId,
}

impl Follower {
    fn new(agent: &Arc<Agent>, vm: form_types::VmId, directory: PathBuf, query: LogsQuery) -> Result<Self, ApiError> {
        // Subscribed before the files are read, so nothing falls between.
        let changed = agent.log_changes(&vm).subscribe();
        let failed = |error: std::io::Error| ApiError::new(ErrorCode::Internal, format!("the log cannot be read: {error}"));
        let (reader, start) = seek(&directory, &query).map_err(failed)?;
        Ok(Self { reader, query, changed, start, agent: Arc::clone(agent), vm })
    }

    async fn next(&mut self) -> Result<Option<LogLine>, ApiError> {
        loop {
            self.changed.borrow_and_update();
            // Lines are short and the files are in the page cache: not worth a thread each.
            while let Some(kept) = self.reader.next().map_err(|error| internal(&error))? {
                if self.query.since.is_none_or(|since| kept.at >= since) {
                    return Ok(Some(kept.into()));
                }
            }
            if !self.query.follow || self.changed.changed().await.is_err() {
                return Ok(None);
            }
            // A VM that was destroyed has said its last.
            if self.agent.desired(&self.vm).is_none() {
                return Ok(None);
            }
        }
    }
}

/// A reader that stands where the query's answer begins, and the cursor of the line before.
fn seek(directory: &FilePath, query: &LogsQuery) -> std::io::Result<(Reader, Option<LogCursor>)> {
    let wanted = |kept: &KeptLine| query.since.is_none_or(|since| kept.at >= since);
    let (mut lines, mut holds_after) = (0_usize, false);
    if query.after.is_some() || query.tail.is_some() {
        let mut count = Reader::new(directory);
        while let Some(kept) = count.next()? {
            lines += usize::from(wanted(&kept));
            holds_after |= query.after == Some(kept.cursor());
        }
    }
    let mut skip = match (query.after, query.tail) {
        (None, Some(tail)) => lines.saturating_sub(tail),
        _ => 0,
    };
    let (mut reader, mut start) = (Reader::new(directory), None);
    while skip > 0 || (holds_after && start != query.after) {
        let Some(kept) = reader.next()? else { break };
        skip = skip.saturating_sub(usize::from(wanted(&kept)));
        start = Some(kept.cursor());
    }
    Ok((reader, start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::Writer;

    fn sequences(directory: &FilePath, query: &LogsQuery) -> (Vec<u64>, Option<u64>) {
        let (mut reader, start) = seek(directory, query).unwrap();
        let rest = std::iter::from_fn(|| reader.next().unwrap()).map(|kept| kept.sequence).collect();
        (rest, start.map(|cursor| cursor.sequence))
    }

    #[test]
    fn an_answer_begins_where_the_query_says() {
        let directory = tempfile::tempdir().unwrap();
        // Two files of some lines each; the oldest lines are gone.
        let mut writer = Writer::open(directory.path(), 1000, watch::Sender::new(0)).unwrap();
        let run = Timestamp::UNIX_EPOCH;
        for sequence in 0..30 {
            let at = Timestamp::from_second(i64::try_from(sequence).unwrap()).unwrap();
            writer.append(&KeptLine { at, stream: LogStream::Stdout, line: "x".to_owned(), run, sequence }).unwrap();
        }
        let (all, start) = sequences(directory.path(), &LogsQuery::default());
        let first = all[0];
        assert!(first > 0 && start.is_none() && all == (first..30).collect::<Vec<_>>(), "{all:?}");
        let after = |sequence| LogsQuery { after: Some(LogCursor { run, sequence }), ..LogsQuery::default() };
        assert_eq!(sequences(directory.path(), &after(27)), (vec![28, 29], Some(27)));
        assert_eq!(sequences(directory.path(), &after(29)), (vec![], Some(29)));
        assert_eq!(sequences(directory.path(), &after(first)).0.len(), all.len() - 1);
        // That line is gone: everything after it that is still there.
        assert_eq!(sequences(directory.path(), &after(0)), (all.clone(), None));
        let tail = |tail| LogsQuery { tail: Some(tail), ..LogsQuery::default() };
        assert_eq!(sequences(directory.path(), &tail(2)), (vec![28, 29], Some(27)));
        assert_eq!(sequences(directory.path(), &tail(0)), (vec![], Some(29)));
        assert_eq!(sequences(directory.path(), &tail(99)), (all, None));
    }
}
