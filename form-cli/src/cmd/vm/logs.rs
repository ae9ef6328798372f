use clap_complete::engine::ArgValueCompleter;
use form_api::vm::{LogLine, LogStream, LogsQuery};
use form_types::Name;
use jiff::Timestamp;

use crate::{
    args::{instant, vm_name},
    complete,
    failure::Outcome,
    session::Session,
    ui::{Format, printable},
};

/// Show what a VM's service wrote, or its console
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
    /// Go on with new lines as they come
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
    /// Only lines since then: 2026-01-31T12:00:00Z, or 10m ago
    #[arg(long, value_name = "TIME", value_parser = instant)]
    since: Option<Timestamp>,
    /// The serial console instead of the service
    #[arg(long)]
    console: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let query = LogsQuery { follow: args.follow, tail: args.tail, since: args.since, console: args.console, after: None };
    let client = session.client()?;
    let mut lines = client.follow_logs(&args.name, &query).await?;
    while let Some(line) = session.in_time(lines.next(|error| session.interrupted(error))).await? {
        let line = line?;
        session.terminal.stream_item(&line, || text(&line, session.terminal.format() == Format::Wide))?;
    }
    Ok(0)
}

fn text(line: &LogLine, wide: bool) -> String {
    let words = printable(&line.line);
    if !wide {
        return words;
    }
    let stream = match line.stream {
        LogStream::Stdout => "out",
        LogStream::Stderr => "err",
        LogStream::Console => "con",
    };
    format!("{:.3} {stream} {words}", line.at)
}
