//! Following a log past an agent that breaks off, goes away and comes back.

use std::{io, path::Path, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Query,
    response::Response,
    routing::get,
};
use form_api::{
    ApiError, ErrorCode,
    client::{Client, Timeouts},
    server::{self, CancellationToken, Limits, Serving},
    vm::{LOG_CURSOR_HEADER, LogCursor, LogLine, LogStream, LogsQuery},
};
use futures_util::{StreamExt, stream};
use jiff::Timestamp;

const LAST: u64 = 10;

fn cursor(sequence: u64) -> LogCursor {
    LogCursor { run: Timestamp::UNIX_EPOCH, sequence }
}

/// A log of the lines 1 to [`LAST`]. An answer breaks off after two of them; the first one, which asks for no cursor, before any.
async fn logs(Query(query): Query<LogsQuery>) -> Response {
    let after = query.after.map_or(4, |cursor| cursor.sequence);
    let (first, count) = (after + 1, if query.after.is_some() { 2 } else { 0 });
    let line = |sequence: u64| {
        let line =
            LogLine { at: Timestamp::UNIX_EPOCH, stream: LogStream::Stdout, line: sequence.to_string(), cursor: Some(cursor(sequence)) };
        Bytes::from(format!("{}\n", serde_json::to_string(&line).unwrap()))
    };
    let lines: Vec<io::Result<Bytes>> = (first..=LAST).take(count).map(|sequence| Ok(line(sequence))).collect();
    let end = stream::iter((after < LAST).then_some(())).then(|()| async {
        // Not before what precedes it has left.
        tokio::time::sleep(Duration::from_millis(50)).await;
        Err(io::Error::other("broken on purpose"))
    });
    let mut response = Response::new(Body::from_stream(stream::iter(lines).chain(end)));
    response.headers_mut().insert(LOG_CURSOR_HEADER, cursor(after).to_string().parse().unwrap());
    response
}

async fn refused() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "there is no vm/gone")
}

fn serve(socket: &Path, stop: &CancellationToken) -> Serving {
    let router = Router::new().route("/v1/vms/web/logs", get(logs)).route("/v1/vms/gone/logs", get(refused));
    server::unix(socket, router, Limits::default(), stop.clone()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_comes_once_although_the_agent_is_restarted() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let stop = CancellationToken::new();
    let first = serve(&socket, &stop);
    let client = Client::unix(&socket, Timeouts::default());
    let query = LogsQuery { follow: true, tail: Some(0), ..LogsQuery::default() };
    let mut lines = client.follow_logs(&"web".parse().unwrap(), &query).await.unwrap();
    let (mut seen, mut breaks) = (Vec::new(), 0);
    seen.push(lines.next(|_| breaks += 1).await.unwrap().unwrap().line);
    stop.cancel();
    first.finished().await;
    let again = tokio::spawn({
        let socket = socket.clone();
        async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            serve(&socket, &CancellationToken::new())
        }
    });
    while let Some(line) = lines.next(|_| breaks += 1).await {
        seen.push(line.unwrap().line);
    }
    // The first answer broke off before any line: what it would have begun after is known all the same.
    assert_eq!(seen, ["5", "6", "7", "8", "9", "10"]);
    assert_eq!(breaks, 4, "once without lines, and after each two");
    drop(again);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_followed_or_never_was_there_is_not_asked_for_again() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let _serving = serve(&socket, &CancellationToken::new());
    let client = Client::unix(&socket, Timeouts::default());
    let error = client.follow_logs(&"gone".parse().unwrap(), &LogsQuery { follow: true, ..LogsQuery::default() }).await.err().unwrap();
    assert_eq!(error.to_api().code, ErrorCode::NotFound);
    let mut lines = client.follow_logs(&"web".parse().unwrap(), &LogsQuery::default()).await.unwrap();
    assert!(lines.next(|_| panic!("nobody waits")).await.unwrap().unwrap_err().is_unreachable());
}
