use clap_complete::engine::ArgValueCompleter;
use form_api::volume::MoveRequest;
use form_types::Name;

use crate::{
    args::{pool_name, volume_name},
    complete,
    failure::Outcome,
    operation::settle,
    session::Session,
};

/// Move a volume to another pool of its host
///
/// Its snapshots go with it. It is copied and compared before the first one is removed. No VM may run with it meanwhile, and it may not be exported.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
    /// The pool that it lives in from then on
    #[arg(long, value_name = "POOL", value_parser = pool_name, add = ArgValueCompleter::new(complete::pools))]
    to: Name,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let operation = settle(session, &client, client.move_volume(&args.name, &MoveRequest { pool: args.to.clone() }).await?).await?;
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: lives in the pool {}", args.name, args.to))?;
    Ok(0)
}
