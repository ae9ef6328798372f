//! What is sent: metrics with the names of `/metrics`, and one span an operation.

use form_api::{
    event::Event,
    operation::{Operation, OperationStatus},
};
use jiff::Timestamp;
use opentelemetry_proto::tonic::{
    collector::{metrics::v1::ExportMetricsServiceRequest, trace::v1::ExportTraceServiceRequest},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    metrics::v1::{AggregationTemporality, Gauge, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, metric, number_data_point},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span, Status, span, status::StatusCode},
};

use crate::{
    agent::Agent,
    metrics::{Family, Kind, Sample},
};

fn attribute(key: &str, value: impl Into<String>) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(Value::StringValue(value.into())) }), ..KeyValue::default() }
}

/// The host, by the semantic conventions.
fn resource(agent: &Agent) -> Resource {
    let attributes = vec![
        attribute("service.name", "form-agent"),
        attribute("service.version", env!("CARGO_PKG_VERSION")),
        attribute("service.instance.id", agent.host_id().to_string()),
        attribute("host.name", agent.name()),
    ];
    Resource { attributes, ..Resource::default() }
}

fn scope() -> InstrumentationScope {
    InstrumentationScope { name: "form-agent".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned(), ..InstrumentationScope::default() }
}

/// Nanoseconds since 1970.
fn nanoseconds(at: Timestamp) -> u64 {
    u64::try_from(at.as_nanosecond()).unwrap_or_default()
}

pub fn metrics(agent: &Agent, families: &[Family]) -> ExportMetricsServiceRequest {
    let now = nanoseconds(Timestamp::now());
    let metrics = families.iter().map(|family| metric(family, now)).collect();
    let scope_metrics = vec![ScopeMetrics { scope: Some(scope()), metrics, ..ScopeMetrics::default() }];
    let of_host = ResourceMetrics { resource: Some(resource(agent)), scope_metrics, ..ResourceMetrics::default() };
    ExportMetricsServiceRequest { resource_metrics: vec![of_host] }
}

fn metric(family: &Family, now: u64) -> Metric {
    let point = |sample: &Sample| NumberDataPoint {
        attributes: sample.labels.iter().map(|(label, value)| attribute(label, value)).collect(),
        // Without a start: a counter of a VM begins anew with each start of it, which its becoming smaller shows.
        time_unix_nano: now,
        value: Some(number_data_point::Value::AsDouble(sample.value)),
        ..NumberDataPoint::default()
    };
    let data_points = family.samples.iter().map(point).collect();
    let data = match family.kind {
        Kind::Gauge => metric::Data::Gauge(Gauge { data_points }),
        Kind::Counter => {
            metric::Data::Sum(Sum { data_points, aggregation_temporality: AggregationTemporality::Cumulative.into(), is_monotonic: true })
        }
    };
    let base = family.name.trim_end_matches("_total");
    let unit = [("_bytes", "By"), ("_seconds", "s")].into_iter().find(|(end, _)| base.ends_with(end)).map_or("", |(_, unit)| unit);
    Metric {
        name: family.name.to_owned(),
        description: family.help.to_owned(),
        unit: unit.to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

pub fn traces(agent: &Agent, spans: impl Iterator<Item = Span>) -> ExportTraceServiceRequest {
    let scope_spans = vec![ScopeSpans { scope: Some(scope()), spans: spans.collect(), ..ScopeSpans::default() }];
    let of_host = ResourceSpans { resource: Some(resource(agent)), scope_spans, ..ResourceSpans::default() };
    ExportTraceServiceRequest { resource_spans: vec![of_host] }
}

/// An operation is a trace of its own, with its id: who has one finds the other.
pub fn span(operation: &Operation, steps: &[Event]) -> Span {
    let id = operation.id.as_bytes();
    let begun = operation.started_at.unwrap_or(operation.created_at);
    let event = |step: &Event| span::Event { time_unix_nano: nanoseconds(step.at), name: step.message.clone(), ..span::Event::default() };
    let mut attributes = vec![attribute("form.subject", &operation.subject), attribute("form.actor", &operation.actor)];
    if let Some(request) = &operation.request {
        attributes.push(attribute("http.request.method", &request.method));
        attributes.push(attribute("url.path", &request.path));
    }
    let status = match &operation.error {
        None if operation.status == OperationStatus::Completed => Status { code: StatusCode::Ok.into(), message: String::new() },
        error => Status { code: StatusCode::Error.into(), message: error.as_ref().map(ToString::to_string).unwrap_or_default() },
    };
    Span {
        trace_id: id.to_vec(),
        span_id: id[..8].to_vec(),
        name: operation.kind.as_str().to_owned(),
        kind: span::SpanKind::Server.into(),
        start_time_unix_nano: nanoseconds(begun),
        end_time_unix_nano: nanoseconds(operation.finished_at.unwrap_or(begun)),
        attributes,
        events: steps.iter().map(event).collect(),
        status: Some(status),
        ..Span::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_keep_their_names_kinds_and_labels() {
        let samples = vec![Sample { labels: vec![("vm", "web".to_owned())], value: 1.5 }];
        let counter = metric(&Family { kind: Kind::Counter, name: "form_vm_cpu_seconds_total", help: "Time.", samples }, 7);
        assert_eq!((counter.name.as_str(), counter.unit.as_str()), ("form_vm_cpu_seconds_total", "s"));
        let Some(metric::Data::Sum(sum)) = counter.data else { panic!("no sum") };
        assert!(sum.is_monotonic && sum.aggregation_temporality == AggregationTemporality::Cumulative as i32);
        assert_eq!(sum.data_points[0].attributes, [attribute("vm", "web")]);
        assert_eq!((sum.data_points[0].time_unix_nano, &sum.data_points[0].value), (7, &Some(number_data_point::Value::AsDouble(1.5))));
        let samples = vec![Sample { labels: Vec::new(), value: 2.0 }];
        let gauge = metric(&Family { kind: Kind::Gauge, name: "form_host_memory_bytes", help: "Memory.", samples }, 7);
        assert!(gauge.unit == "By" && matches!(gauge.data, Some(metric::Data::Gauge(gauge)) if gauge.data_points.len() == 1));
    }
}
