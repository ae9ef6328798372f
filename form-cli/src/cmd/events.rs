use clap_complete::engine::ArgValueCompleter;
use form_api::event::{Event, EventsQuery};
use form_types::Name;

use crate::{
    args::vm_name,
    complete,
    failure::Outcome,
    operation,
    session::Session,
    ui::{Format, printable},
};

/// Show what happened on the host
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with new events as they come
    #[arg(short, long)]
    follow: bool,
    /// Only the last events
    #[arg(long, value_name = "EVENTS", default_value_t = 50)]
    tail: usize,
    /// Only events of one VM
    #[arg(long, value_name = "NAME", value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    vm: Option<Name>,
    /// Only events of one operation
    #[arg(long, value_name = "ID", add = ArgValueCompleter::new(complete::operations))]
    operation: Option<String>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let operation = match &args.operation {
        Some(text) => Some(operation::find(&client, text).await?.id),
        None => None,
    };
    let query = EventsQuery { after: None, tail: Some(args.tail), follow: args.follow, vm: args.vm, operation };
    let mut events = client.follow_events(&query).await?;
    while let Some(event) = session.in_time(events.next(|error| session.interrupted(error))).await? {
        let event = event?;
        session.terminal.stream_item(&event, || line(&event, session.terminal.format()))?;
    }
    Ok(0)
}

fn line(event: &Event, format: Format) -> String {
    if format == Format::Name {
        return event.cursor.to_string();
    }
    let kind = serde_json::to_value(event.kind).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default();
    let vm = event.vm.as_ref().map(|vm| format!("  {vm}")).unwrap_or_default();
    let operation = event.operation.filter(|_| format == Format::Wide).map(|id| format!("  {}", id.short())).unwrap_or_default();
    format!("{:.0}  {kind}{vm}{operation}  {}", event.at, printable(&event.message))
}
