use clap_complete::engine::ArgValueCompleter;

use crate::{complete, failure::Outcome, operation, session::Session};

/// Wait until an operation is over; fail when it failed
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Its id, or the first digits of it
    #[arg(add = ArgValueCompleter::new(complete::operations))]
    id: String,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let found = operation::find(&client, &args.id).await?;
    let settled = operation::settle(session, &client, found).await?;
    let sentence = format!("{} of {}: {}", settled.kind.as_str(), settled.subject, settled.status.as_str());
    session.terminal.done(&settled, &settled.id.to_string(), &sentence)?;
    Ok(0)
}
