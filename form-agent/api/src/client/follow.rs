//! Long answers that go on where they were when the agent has been away: it is restarted or upgraded.

use std::time::Duration;

use form_types::Name;
use http::HeaderMap;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{Client, ClientError, Lines, call::Call};
use crate::{
    ErrorCode,
    event::{EVENT_CURSOR_HEADER, Event, EventsQuery},
    vm::{LOG_CURSOR_HEADER, LogLine, LogsQuery},
};

/// How long an agent may be away while somebody follows: a host that is restarted takes minutes.
const PATIENCE: Duration = Duration::from_secs(5 * 60);

/// Between two tries to reach it again.
const RETRY: Duration = Duration::from_millis(300);

/// What can be followed: lines with a cursor, and a query that can begin after one.
pub trait Followed: DeserializeOwned {
    type Query;
    /// Says after which line the answer begins.
    const CURSOR_HEADER: &'static str;

    fn path(query: &Self::Query) -> String;

    /// Makes `query` ask for what comes after this line.
    fn resume(&self, query: &mut Self::Query);

    /// Makes `query` ask for what comes after this cursor.
    fn resume_after(cursor: &str, query: &mut Self::Query);

    fn follows(query: &Self::Query) -> bool;
}

impl Followed for LogLine {
    type Query = (Name, LogsQuery);
    const CURSOR_HEADER: &'static str = LOG_CURSOR_HEADER;

    fn path((name, query): &Self::Query) -> String {
        super::calls::logs_path(name, query)
    }

    fn resume(&self, (_, query): &mut Self::Query) {
        query.after = self.cursor.or(query.after);
    }

    fn resume_after(cursor: &str, (_, query): &mut Self::Query) {
        query.after = cursor.parse().ok().or(query.after);
    }

    fn follows((_, query): &Self::Query) -> bool {
        query.follow
    }
}

impl Followed for Event {
    type Query = EventsQuery;
    const CURSOR_HEADER: &'static str = EVENT_CURSOR_HEADER;

    fn path(query: &EventsQuery) -> String {
        super::calls::events_path(query)
    }

    fn resume(&self, query: &mut EventsQuery) {
        query.after = Some(self.cursor);
    }

    fn resume_after(cursor: &str, query: &mut EventsQuery) {
        query.after = cursor.parse().ok().or(query.after);
    }

    fn follows(query: &EventsQuery) -> bool {
        query.follow
    }
}

/// Lines as they come, each once, over restarts of the agent.
pub struct Follower<T: Followed> {
    client: Client,
    query: T::Query,
    lines: Lines<T>,
}

impl<T: Followed> Follower<T> {
    /// Asks for the first time: what goes wrong here is not tried again.
    pub(super) async fn begin(client: Client, mut query: T::Query) -> Result<Self, ClientError> {
        let lines = open(&client, &mut query).await?;
        Ok(Self { client, query, lines })
    }

    /// The next line; `None` when there will be no more. `interrupted` is told once for each time that the connection breaks.
    ///
    /// # Errors
    /// What the agent says, or that it has been away for too long. Nothing follows an error.
    pub async fn next(&mut self, mut interrupted: impl FnMut(&ClientError)) -> Option<Result<T, ClientError>> {
        loop {
            let error = match self.lines.next().await? {
                Ok(line) => {
                    line.resume(&mut self.query);
                    return Some(Ok(line));
                }
                Err(error) => error,
            };
            if !error.is_unreachable() || !T::follows(&self.query) {
                return Some(Err(error));
            }
            interrupted(&error);
            match self.reopen(error).await {
                Ok(lines) => self.lines = lines,
                // It was removed while the agent was away, which ends what can be followed.
                Err(ClientError::Api(error)) if error.code == ErrorCode::NotFound => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }

    async fn reopen(&mut self, mut last: ClientError) -> Result<Lines<T>, ClientError> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            self.client.reconnect().await;
            match open(&self.client, &mut self.query).await {
                Ok(lines) => return Ok(lines),
                Err(error) if error.is_unreachable() => last = error,
                Err(error) => return Err(error),
            }
            tokio::time::sleep(RETRY).await;
        }
        Err(last)
    }
}

async fn open<T: Followed>(client: &Client, query: &mut T::Query) -> Result<Lines<T>, ClientError> {
    let response = client.send(&Call::get(T::path(query))).await?;
    if let Some(cursor) = cursor(response.headers(), T::CURSOR_HEADER) {
        T::resume_after(&cursor, query);
    }
    Ok(Lines::new(response.into_body(), client.target()))
}

fn cursor(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}
