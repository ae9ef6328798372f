use std::{path::PathBuf, sync::Arc};

use axum::{
    Json,
    extract::{Path, Request, State},
    http::StatusCode,
    response::Response,
};
use form_api::{
    ApiError, ErrorCode,
    operation::Operation,
    server::{ndjson, read_json},
    vm::{LogLine, LogStream, LogsQuery, RenameRequest, Vm, VmDetail, VmState},
};
use form_types::Name;
use futures_util::stream;
use jiff::Timestamp;
use tokio::sync::watch;

use super::{Shared, accepted, blocking, changing, no_body, parsed, query, reading};
use crate::{
    action::{self, Action},
    agent::{Agent, internal},
    authorise::Caller,
    desired,
    driver::process::RuntimeDirectory,
    lifecycle::{self, Change},
    logs::Reader,
};

pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Vm>>, ApiError> {
    reading(&agent, request).await?;
    let mut vms: Vec<Vm> = desired::vms(&agent.view()).values().map(|vm| agent.vm(vm)).collect();
    vms.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(Json(vms))
}

pub async fn show(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Result<Json<VmDetail>, ApiError> {
    reading(&agent, request).await?;
    let desired = agent.vm_named(&parsed(&name)?)?;
    let guest = agent.fleet.observed(&desired.id).and_then(|observed| observed.guest);
    Ok(Json(VmDetail { vm: agent.vm(&desired), desired: desired.request, guest }))
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

pub async fn start(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    change(agent, name, request, Change::Start).await
}

pub async fn stop(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    change(agent, name, request, Change::Stop).await
}

pub async fn restart(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    change(agent, name, request, Change::Restart).await
}

pub async fn pause(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    change(agent, name, request, Change::Pause).await
}

pub async fn resume(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    change(agent, name, request, Change::Resume).await
}

pub async fn reset(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    change(agent, name, request, Change::Reset).await
}

pub async fn rename(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let RenameRequest { name: new } = read_json(&body)?;
    begin(agent, caller, &name, Change::Rename(new)).await
}

pub async fn set(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let change = Change::Set(read_json(&body)?);
    begin(agent, caller, &name, change).await
}

pub async fn destroy(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Accepted {
    change(agent, name, request, Change::Destroy).await
}

pub async fn logs(State(agent): State<Shared>, Path(name): Path<String>, request: Request) -> Result<Response, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let name: Name = parsed(&name)?;
    let vm = agent.vm_named(&name)?;
    let state = agent.fleet.observed(&vm.id).map_or(VmState::Pending, |observed| observed.state);
    action::check(Action::Logs, state, &name)?;
    let wanted: LogsQuery = query(&parts)?;
    if wanted.console {
        let directory = RuntimeDirectory::new(&agent.paths().vm_runtime(), &vm.id);
        let kept = agent.log_directory(&vm.id).join("console.log");
        let lines = blocking(move || console_lines(&directory, kept, wanted.tail)).await?;
        return Ok(ndjson(stream::iter(lines.into_iter().map(Ok))));
    }
    let directory = agent.log_directory(&vm.id);
    let follower = blocking(move || Follower::new(&agent, vm.id, directory, wanted)).await?;
    Ok(ndjson(stream::unfold(follower, |mut follower| async {
        let next = follower.next().await.transpose()?;
        Some((next, follower))
    })))
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
    let line = |line: &&str| LogLine { at: Timestamp::now(), stream: LogStream::Console, line: line.trim_end_matches('\r').to_owned() };
    Ok(lines[skip..].iter().map(line).collect())
}

/// Reads the files of a log, and goes on as they grow.
struct Follower {
    reader: Reader,
    query: LogsQuery,
    changed: watch::Receiver<u64>,
    /// Lines to pass over, so that `tail` are left.
    skip: usize,
    agent: Arc<Agent>,
    vm: form_types::VmId,
}

impl Follower {
    fn new(agent: &Arc<Agent>, vm: form_types::VmId, directory: PathBuf, query: LogsQuery) -> Result<Self, ApiError> {
        let failed = |error: std::io::Error| ApiError::new(ErrorCode::Internal, format!("the log cannot be read: {error}"));
        // Subscribed before the files are read, so nothing falls between.
        let changed = agent.log_changes(&vm).subscribe();
        let mut skip = 0;
        if let Some(tail) = query.tail {
            let mut count = Reader::new(&directory);
            let mut lines = 0_usize;
            while let Some(kept) = count.next().map_err(failed)? {
                lines += usize::from(query.since.is_none_or(|since| kept.line.at >= since));
            }
            skip = lines.saturating_sub(tail);
        }
        Ok(Self { reader: Reader::new(&directory), query, changed, skip, agent: Arc::clone(agent), vm })
    }

    async fn next(&mut self) -> Result<Option<LogLine>, ApiError> {
        loop {
            self.changed.borrow_and_update();
            // Lines are short and the files are in the page cache: not worth a thread each.
            while let Some(kept) = self.reader.next().map_err(|error| internal(&error))? {
                if self.query.since.is_some_and(|since| kept.line.at < since) {
                    continue;
                }
                if self.skip > 0 {
                    self.skip -= 1;
                    continue;
                }
                return Ok(Some(kept.line));
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
