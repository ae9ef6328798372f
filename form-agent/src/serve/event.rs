use std::{collections::VecDeque, sync::Arc};

use axum::{
    extract::{Request, State},
    response::Response,
};
use form_api::{
    ApiError, ErrorCode,
    event::{EVENT_CURSOR_HEADER, Event, EventsQuery},
    server::ndjson,
};
use futures_util::stream;
use tokio::sync::watch;

use super::{Shared, begins_after, openapi::Refused, query, reading};
use crate::{agent::Agent, event::Events};

struct Follower {
    events: Arc<Events>,
    query: EventsQuery,
    newest: watch::Receiver<u64>,
    cursor: u64,
    page: VecDeque<Event>,
}

impl Follower {
    fn new(agent: &Agent, query: EventsQuery) -> Self {
        // Subscribed before the first page is read, so nothing falls between.
        let newest = agent.events.subscribe();
        let cursor = agent.events.start(&query);
        Self { events: Arc::clone(&agent.events), query, newest, cursor, page: VecDeque::new() }
    }

    /// The next event; none when there are no more and nobody waits for them.
    async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        loop {
            if let Some(event) = self.page.pop_front() {
                return Ok(Some(event));
            }
            self.newest.borrow_and_update();
            let before = self.cursor;
            let (page, cursor) =
                self.events.page(self.cursor, &self.query).map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
            self.page = page.into();
            self.cursor = cursor;
            if cursor != before {
                continue;
            }
            if !self.query.follow || self.newest.changed().await.is_err() {
                return Ok(None);
            }
        }
    }
}

/// What happened on the host, in order.
///
/// A follower whose connection breaks goes on with `after` and the cursor of the last event it got.
#[utoipa::path(
    get,
    path = "/v1/events",
    operation_id = "list_events",
    tag = "events",
    params(EventsQuery),
    responses((status = 200, description = "One JSON object a line, as they come. An error in the middle is the last line, as `{\"error\": …}`", body = Event, content_type = "application/x-ndjson", headers(("form-event-cursor" = u64, description = "The cursor that the answer begins after"))), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Response, ApiError> {
    let (parts, _) = reading(&agent, request).await?;
    let query = query(&parts.uri)?;
    agent.events.settled().await;
    let follower = Follower::new(&agent, query);
    let start = follower.cursor.to_string();
    let events = ndjson(stream::unfold(follower, |mut follower| async {
        let next = follower.next().await.transpose()?;
        Some((next, follower))
    }));
    Ok(begins_after(events, EVENT_CURSOR_HEADER, Some(start)))
}
