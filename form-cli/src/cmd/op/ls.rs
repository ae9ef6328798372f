use form_api::operation::OperationsQuery;
use jiff::Timestamp;

use crate::{
    failure::Outcome,
    session::Session,
    ui::{Table, age},
};

/// List operations, newest first
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many
    #[arg(long, value_name = "OPERATIONS", default_value_t = 50)]
    limit: usize,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let operations = session.client()?.operations(&OperationsQuery { limit: Some(args.limit) }).await?;
    let mut table = Table::new(&["ID", "KIND", "SUBJECT", "STATUS", "AGE"], &["ACTOR", "ERROR"]);
    let now = Timestamp::now();
    for operation in &operations {
        table.row([
            operation.id.short(),
            operation.kind.as_str().to_owned(),
            operation.subject.clone(),
            operation.status.as_str().to_owned(),
            age(operation.created_at, now),
            operation.actor.clone(),
            operation.error.as_ref().map(ToString::to_string).unwrap_or_default(),
        ]);
    }
    session.terminal.list(&operations, &table)?;
    Ok(0)
}
