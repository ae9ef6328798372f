use clap_complete::engine::ArgValueCompleter;
use form_api::pool::PoolSetRequest;
use form_types::{Name, size::Bytes};

use super::amount;
use crate::{
    args::{new_label, pool_name},
    complete,
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Change a pool's reserve, limit or labels
///
/// What is there already stays, also where it is more than a new limit.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pool
    #[arg(value_parser = pool_name, add = ArgValueCompleter::new(complete::pools))]
    name: Name,
    /// Begin nothing new in it with less free room than this; 0 for none
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    reserve: Option<Bytes>,
    /// The most that its volumes may promise together; 0 for no limit
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    limit: Option<Bytes>,
    /// Set a label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = new_label)]
    labels: Vec<(String, String)>,
    /// Remove a label
    #[arg(long = "remove-label", value_name = "KEY")]
    removed: Vec<String>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let removed = args.removed.into_iter().map(|key| (key, None));
    let labels = args.labels.into_iter().map(|(key, value)| (key, Some(value))).chain(removed).collect();
    let request = PoolSetRequest { reserve_bytes: args.reserve.map(|bytes| bytes.0), limit_bytes: args.limit.map(|bytes| bytes.0), labels };
    if request.is_empty() {
        return Err(Failure::usage("nothing is to be set").hint("say what: --reserve, --limit, --label, --remove-label"));
    }
    let client = session.client()?;
    let operation = settle(session, &client, client.set_pool(&args.name, &request).await?).await?;
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: set", args.name))?;
    Ok(0)
}
