//! Sends what `/metrics` shows, and each operation that has ended, to a collector of OpenTelemetry's protocol over HTTP (OTLP 1.x,
//! opentelemetry.io/docs/specs/otlp: binary protobuf to `/v1/metrics` and `/v1/traces`), when `agent.yaml` names one.

mod collector;
mod messages;

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use form_api::event::{Event, EventKind, EventsQuery};
use form_types::OperationId;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::{agent::Agent, config::OpenTelemetry, metrics};
use collector::{Collector, Refusal};

/// Operations that have ended and wait for a collector that does not answer. The oldest go first.
const MAX_WAITING: usize = 2048;
/// Operations under way whose steps are remembered.
const MAX_UNDER_WAY: usize = 1024;
/// How long the end of the agent waits for the last export.
const LAST_EXPORT: Duration = Duration::from_secs(5);

/// How the last export went.
#[derive(Debug, Default)]
pub struct Status(Mutex<Option<Result<(), String>>>);

impl Status {
    /// `None` when nothing was exported yet.
    pub fn last(&self) -> Option<Result<(), String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Said once, and not at every export.
    fn set(&self, now: Result<(), String>) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*last, &now) {
            (None | Some(Ok(())), Err(error)) => tracing::warn!("the OpenTelemetry collector: {error}"),
            (Some(Err(_)), Ok(())) => tracing::info!("the OpenTelemetry collector takes what it is sent again"),
            _ => {}
        }
        *last = Some(now);
    }
}

/// Exports until `stop`, and what there is by then.
pub async fn export(agent: Arc<Agent>, settings: OpenTelemetry, stop: CancellationToken) {
    let collector = match Collector::new(&settings) {
        Ok(collector) => Arc::new(collector),
        Err(error) => return agent.telemetry.set(Err(error)),
    };
    let mut spans = Spans { cursor: *agent.events.subscribe().borrow(), ..Spans::default() };
    let mut interval = tokio::time::interval(Duration::from_secs(settings.interval_seconds.get()));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let stopping = tokio::select! {
            _ = interval.tick() => false,
            () = stop.cancelled() => true,
        };
        if stopping {
            let _ = tokio::time::timeout(LAST_EXPORT, once(&agent, &collector, &mut spans)).await;
            return;
        }
        once(&agent, &collector, &mut spans).await;
    }
}

async fn once(agent: &Arc<Agent>, collector: &Arc<Collector>, spans: &mut Spans) {
    agent.events.settled().await;
    spans.gather(agent);
    let metrics = match metrics::of(agent).await {
        Ok(families) => send(collector, "/v1/metrics", messages::metrics(agent, &families).encode_to_vec()).await,
        Err(error) => Err(Refusal { message: error.to_string(), again: true }),
    };
    let mut traces = Ok(());
    // Some take nothing but traces. One that does not answer is not asked twice.
    if is_settled(&metrics) && !spans.ended.is_empty() {
        traces = send(collector, "/v1/traces", messages::traces(agent, spans.ended.iter().cloned()).encode_to_vec()).await;
        // What it will never take is not kept.
        if is_settled(&traces) {
            spans.ended.clear();
        }
    }
    agent.telemetry.set(metrics.and(traces).map_err(|refusal| refusal.message));
}

/// Whether trying again would change nothing.
fn is_settled(sent: &Result<(), Refusal>) -> bool {
    sent.as_ref().map_or_else(|refusal| !refusal.again, |()| true)
}

async fn send(collector: &Arc<Collector>, path: &'static str, body: Vec<u8>) -> Result<(), Refusal> {
    let collector = Arc::clone(collector);
    let sent = tokio::task::spawn_blocking(move || collector.post(path, &body)).await;
    sent.unwrap_or_else(|error| Err(Refusal { message: error.to_string(), again: true }))
}

/// Operations on their way to the collector.
#[derive(Default)]
struct Spans {
    /// Of the last event that was looked at.
    cursor: u64,
    under_way: HashMap<OperationId, Vec<Event>>,
    ended: VecDeque<Span>,
}

impl Spans {
    /// Follows the events since the last look.
    fn gather(&mut self, agent: &Agent) {
        loop {
            let page = agent.events.page(self.cursor, &EventsQuery::default());
            let Ok((events, last)) = page.inspect_err(|error| tracing::warn!("events for OpenTelemetry: {error}")) else { return };
            if last == self.cursor {
                return;
            }
            self.cursor = last;
            for event in events {
                self.see(agent, event);
            }
        }
    }

    fn see(&mut self, agent: &Agent, event: Event) {
        let Some(id) = event.operation else { return };
        match event.kind {
            EventKind::OperationStep if self.under_way.len() < MAX_UNDER_WAY || self.under_way.contains_key(&id) => {
                self.under_way.entry(id).or_default().push(event);
            }
            EventKind::OperationCompleted | EventKind::OperationFailed => {
                let steps = self.under_way.remove(&id).unwrap_or_default();
                let Ok(operation) = agent.operations.get(id) else { return };
                if self.ended.len() == MAX_WAITING {
                    self.ended.pop_front();
                }
                self.ended.push_back(messages::span(&operation, &steps));
            }
            _ => {}
        }
    }
}
