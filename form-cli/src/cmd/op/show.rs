use clap_complete::engine::ArgValueCompleter;

use crate::{complete, failure::Outcome, operation, session::Session};

/// Show an operation
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Its id, or the first digits of it
    #[arg(add = ArgValueCompleter::new(complete::operations))]
    id: String,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let operation = operation::find(&session.client()?, &args.id).await?;
    session.terminal.show(&operation, &super::record(&operation))?;
    Ok(0)
}
