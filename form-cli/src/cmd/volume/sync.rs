use clap_complete::engine::ArgValueCompleter;
use form_api::event::{EventKind, EventsQuery};
use form_types::Name;

use crate::{args::volume_name, complete, failure::Outcome, operation::settle, session::Session};

/// Bring a volume in line with what should be, now
///
/// Its files, its export and the VM that runs with it are compared with what the host has on record and mended, and the VM's guest writes out what it
/// has not yet written. What there was to mend is printed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let operation = settle(session, &client, client.sync_volume(&args.name).await?).await?;
    let mut mended = Vec::new();
    if operation.status.is_final() {
        let query = EventsQuery { tail: Some(100), operation: Some(operation.id), ..EventsQuery::default() };
        let mut events = client.events(&query).await?;
        while let Some(event) = events.next().await {
            let event = event?;
            if event.kind == EventKind::OperationStep {
                mended.push(event.message);
            }
        }
    }
    let text = match (operation.status.is_final(), mended.is_empty()) {
        (false, _) => format!("{}: sync under way", args.name),
        (true, true) => format!("{}: in line already", args.name),
        (true, false) => mended.iter().map(|message| format!("{}: {message}", args.name)).collect::<Vec<_>>().join("\n"),
    };
    session.terminal.done(&operation, args.name.as_str(), &text)?;
    Ok(0)
}
