//! Measuring this host: `form-agent bench` as a process of its own, so that what it needs is not counted with the agent, and an
//! operation, so that there is one at a time.

use std::{process::Stdio, sync::Arc};

use axum::{
    extract::{Request, State},
    response::Response,
};
use form_api::{
    ApiError, ErrorCode,
    bench::{BenchRequest, BenchRow, MAX_RUNS},
    operation::OperationKind,
    server::{ndjson, read_json},
};
use form_types::OperationId;
use futures_util::stream;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    sync::mpsc,
};

use super::{
    Shared, changing,
    openapi::{ChangeHeaders, InTheWay, Refused, Unreadable},
};
use crate::{
    agent::{Agent, internal},
    operation::{Begun, Opening},
};

type Line = Result<BenchRow, ApiError>;

/// Measures the host, which takes minutes.
#[utoipa::path(
    post,
    path = "/v1/bench",
    operation_id = "bench_host",
    tag = "hosts",
    params(ChangeHeaders),
    request_body(content = BenchRequest, description = "What to measure, and how often"),
    responses((status = 200, description = "One JSON object a line, as they come. An error in the middle is the last line, as `{\"error\": …}`", body = BenchRow, content_type = "application/x-ndjson"), Refused, Unreadable, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn measure(State(agent): State<Shared>, request: Request) -> Result<Response, ApiError> {
    let (caller, body) = changing(&agent, request).await?;
    let wanted: BenchRequest = read_json(&body)?;
    if !(1..=MAX_RUNS).contains(&wanted.runs) {
        return Err(ApiError::new(ErrorCode::Invalid, format!("{} runs are not possible: give 1 to {MAX_RUNS}", wanted.runs)));
    }
    let opening = Opening {
        kind: OperationKind::Bench,
        vm: None,
        subject: format!("bench/{}", agent.name()),
        actor: caller.actor,
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    let id = match agent.operations.begin(opening)? {
        Begun::New(id) => id,
        Begun::Repeated(_) => return Err(ApiError::new(ErrorCode::Conflict, "this was measured already: ask anew")),
    };
    let child = match start(&agent, &wanted) {
        Ok(child) => child,
        Err(error) => {
            agent.operations.finish(id, Err(error.clone()));
            return Err(error);
        }
    };
    let (lines, received) = mpsc::channel(16);
    tokio::spawn(follow(agent, id, child, lines));
    Ok(ndjson(stream::unfold(received, |mut received| async { Some((received.recv().await?, received)) })))
}

fn start(agent: &Agent, wanted: &BenchRequest) -> Result<Child, ApiError> {
    let program = std::env::current_exe().map_err(|error| internal(&error))?;
    let mut command = Command::new(program);
    command.arg("--root").arg(agent.paths().root()).args(["bench", "--json", "--runs", &wanted.runs.to_string()]);
    for measurement in &wanted.only {
        command.args(["--only", measurement.as_str()]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    command.spawn().map_err(|error| internal(&format!("cannot start the measuring: {error}")))
}

/// Hands over each row, and finishes the operation when the process has ended. A client that goes away ends it.
async fn follow(agent: Arc<Agent>, id: OperationId, mut child: Child, lines: mpsc::Sender<Line>) {
    let result = rows(&mut child, &lines).await;
    if result.is_err() {
        end(&mut child).await;
    }
    if let Err(error) = &result {
        let _ = lines.send(Err(error.clone())).await;
    }
    agent.operations.finish(id, result);
}

async fn rows(child: &mut Child, lines: &mpsc::Sender<Line>) -> Result<(), ApiError> {
    let failed = |message: String| ApiError::new(ErrorCode::Failed, message);
    let output = child.stdout.take().ok_or_else(|| internal(&"the measuring has no output"))?;
    let mut output = BufReader::new(output).lines();
    loop {
        let line = tokio::select! {
            line = output.next_line() => line.map_err(|error| internal(&error))?,
            () = lines.closed() => return Err(failed("the client went away".to_owned())),
        };
        let Some(line) = line else { break };
        let row = serde_json::from_str(&line).map_err(|error| internal(&error))?;
        if lines.send(Ok(row)).await.is_err() {
            return Err(failed("the client went away".to_owned()));
        }
    }
    let status = child.wait().await.map_err(|error| internal(&error))?;
    // 1 says that something is over its budget, which the rows say too.
    match status.code() {
        Some(0 | 1) => {}
        _ => return Err(failed(format!("the measuring ended with {status}"))),
    }
    let mut words = String::new();
    if let Some(mut errors) = child.stderr.take() {
        let _ = errors.read_to_string(&mut words).await;
    }
    if words.is_empty() { Ok(()) } else { Err(failed(words.trim().to_owned())) }
}

/// Lets it remove what it has made.
async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid as i32)) {
        // Not collected yet, so the pid is still this child's.
        let _ = kill_process(pid, Signal::TERM);
    }
    let _ = child.wait().await;
}
