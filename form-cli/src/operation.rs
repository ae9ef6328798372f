//! Waiting for an operation, with its steps shown as they happen.

use form_api::{
    ErrorCode,
    client::{Client, ClientError},
    event::{EventKind, EventsQuery},
    operation::{Operation, OperationStatus, OperationsQuery, WaitQuery},
    vm::LogsQuery,
};
use form_types::{Name, OperationId};

use crate::{
    failure::{Failure, Outcome},
    session::Session,
    signals,
    ui::Step,
};

/// How many lines of a guest's log explain a failure.
const TAIL: usize = 20;

/// Waits until the operation is final and shows its steps; with `--no-wait` says how to watch it and gives it back as it is. Ctrl-C leaves
/// it going and ends the program.
///
/// # Errors
/// When it failed, with the log's tail where it is about a VM; when `--timeout` is over; when the host cannot be asked.
pub async fn settle(session: &Session, client: &Client, operation: Operation) -> Result<Operation, Failure> {
    if session.global.no_wait && !operation.status.is_final() {
        session.terminal.note(format!("{} goes on; wait for it with `form op wait {}`", operation.kind.as_str(), operation.id));
        return Ok(operation);
    }
    session.note(&operation);
    let settled = if operation.status.is_final() { operation } else { follow(session, client, operation.id).await? };
    session.note(&settled);
    match settled.status {
        OperationStatus::Failed => Err(failure(client, settled).await),
        _ => Ok(settled),
    }
}

async fn follow(session: &Session, client: &Client, id: OperationId) -> Result<Operation, Failure> {
    let mut interrupts = signals::interrupts()?;
    tokio::select! {
        settled = client.wait_operation(&id, session.deadline()) => settled.map_err(|error| still_going(error, id)),
        // It shows steps and never ends before the operation does; without events the wait goes on all the same.
        never = show_steps(session, client, id) => match never {},
        _ = interrupts.recv() => session.leave().await,
    }
}

fn still_going(error: ClientError, id: OperationId) -> Failure {
    match error {
        ClientError::TimedOut { .. } => Failure::new(ErrorCode::TimedOut, "the time is over, the operation goes on")
            .hint(format!("watch it with `form op wait {id}`, or give it longer with --timeout"))
            .operation(id),
        other => Failure::from(other).operation(id),
    }
}

async fn show_steps(session: &Session, client: &Client, id: OperationId) -> std::convert::Infallible {
    let query = EventsQuery { tail: Some(100), follow: true, operation: Some(id), ..EventsQuery::default() };
    let mut current: Option<Step<'_>> = None;
    if let Ok(mut events) = client.events(&query).await {
        while let Some(Ok(event)) = events.next().await {
            if event.kind == EventKind::OperationStep {
                if let Some(step) = current.take() {
                    step.done("");
                }
                current = Some(session.terminal.step(event.message));
            } else if matches!(event.kind, EventKind::OperationCompleted | EventKind::OperationFailed) {
                if let Some(step) = current.take().filter(|_| event.kind == EventKind::OperationCompleted) {
                    step.done("");
                }
                break;
            }
        }
    }
    std::future::pending().await
}

/// Why it failed, with the last lines of the guest's log.
async fn failure(client: &Client, operation: Operation) -> Failure {
    let id = operation.id;
    let error = match operation.error {
        Some(error) => Failure::from(error),
        None => Failure::failed(format!("{} of {} failed", operation.kind.as_str(), operation.subject)),
    };
    let error = error.operation(id);
    match operation.subject.strip_prefix("vm/").and_then(|name| name.parse().ok()) {
        Some(name) => with_log(client, &name, error).await,
        None => error,
    }
}

/// Adds the last lines of a VM's log to a failure: of its service, or of its console when the service never said anything.
pub async fn with_log(client: &Client, name: &Name, failure: Failure) -> Failure {
    for console in [false, true] {
        let lines = last_lines(client, name, console).await;
        if !lines.is_empty() {
            let what = if console { "console" } else { "log" };
            return failure.tail(format!("last lines of {name}'s {what}"), lines);
        }
    }
    failure
}

async fn last_lines(client: &Client, name: &Name, console: bool) -> Vec<String> {
    let query = LogsQuery { tail: Some(TAIL), console, ..LogsQuery::default() };
    let mut found = Vec::new();
    // No log is no second failure.
    if let Ok(mut lines) = client.logs(name, &query).await {
        while let Some(Ok(line)) = lines.next().await {
            found.push(line.line);
        }
    }
    found
}

/// The operation whose id begins with `text`.
///
/// # Errors
/// When there is none, or several.
pub async fn find(client: &Client, text: &str) -> Result<Operation, Failure> {
    if let Ok(id) = text.parse::<OperationId>() {
        return Ok(client.operation(&id, &WaitQuery::default()).await?);
    }
    let text = text.to_ascii_lowercase();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Failure::usage(format!("`{text}` is no operation's id")).hint("`form op ls` lists them"));
    }
    let operations = client.operations(&OperationsQuery { limit: Some(1000) }).await?;
    let mut found: Vec<Operation> = operations.into_iter().filter(|operation| operation.id.to_string().starts_with(&text)).collect();
    match (found.pop(), found.is_empty()) {
        (Some(operation), true) => Ok(operation),
        (Some(_), false) => Err(Failure::usage(format!("several operations begin with `{text}`")).hint("write more of the id")),
        (None, _) => Err(Failure::not_found(format!("no operation begins with `{text}`")).hint("`form op ls` lists them")),
    }
}

/// Does one thing to each name. When some fail and some do not, the work is partly done: exit 7.
///
/// # Errors
/// The failure, when there is one name; otherwise failures are shown as they come and summed up.
pub async fn each<T, F>(session: &Session, names: &[T], action: impl FnMut(T) -> F) -> Outcome
where
    T: Clone,
    F: Future<Output = Result<(), Failure>>,
{
    each_of(session, names.to_vec(), action).await
}

/// As [`each`], with all asked for before the first is waited for: what a guest takes its time for takes it once, and not once for each.
/// A name that is given twice is asked for once. Ctrl-C leaves all of them going, and says which they are.
///
/// # Errors
/// As [`each`].
pub async fn each_at_once<T, A, F>(
    session: &Session,
    names: &[T],
    mut ask: impl FnMut(T) -> A,
    mut finish: impl FnMut(T, Operation) -> F,
) -> Outcome
where
    T: Clone + PartialEq,
    A: Future<Output = Result<Operation, Failure>>,
    F: Future<Output = Result<(), Failure>>,
{
    let mut interrupts = signals::interrupts()?;
    let mut asked: Vec<(T, Result<Operation, Failure>)> = Vec::new();
    for name in names {
        if asked.iter().any(|(other, _)| other == name) {
            continue;
        }
        let answer = tokio::select! {
            answer = ask(name.clone()) => answer,
            _ = interrupts.recv() => session.leave().await,
        };
        if let Ok(operation) = &answer {
            session.note(operation);
        }
        asked.push((name.clone(), answer));
    }
    let finished = each_of(session, asked, |(name, answer)| {
        let finished = answer.map(|operation| finish(name, operation));
        async { finished?.await }
    });
    tokio::select! {
        outcome = finished => outcome,
        _ = interrupts.recv() => session.leave().await,
    }
}

async fn each_of<T, F>(session: &Session, all: Vec<T>, mut action: impl FnMut(T) -> F) -> Outcome
where
    F: Future<Output = Result<(), Failure>>,
{
    let count = all.len();
    let mut codes = Vec::new();
    for one in all {
        match action(one).await {
            Ok(()) => {}
            Err(failure) if count == 1 => return Err(failure),
            Err(failure) => {
                session.terminal.failure(&failure);
                codes.push(failure.exit_code());
            }
        }
    }
    match codes.as_slice() {
        [] => Ok(0),
        [first, ..] if codes.len() == count => Ok(*first),
        _ => Ok(7),
    }
}
