use std::path::PathBuf;

use form_api::pool::PoolCreateRequest;
use form_types::{Name, size::Bytes};

use super::amount;
use crate::{
    args::{label, pool_name},
    failure::Outcome,
    operation::settle,
    session::Session,
};

/// Make a directory of the host a pool
///
/// A file in it says from then on whose it is. While that file is not there (its file system is not mounted) the pool is unavailable, and
/// nothing is made in the directory.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The new pool's name
    #[arg(value_parser = pool_name)]
    name: Name,
    /// The directory on the host, which has to be there: absolute, not in another pool, writable
    #[arg(long, value_name = "DIR")]
    path: PathBuf,
    /// Begin nothing new in it with less free room than this
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    reserve: Option<Bytes>,
    /// The most that its volumes may promise together
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    limit: Option<Bytes>,
    /// Set a label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let request = PoolCreateRequest {
        name: args.name.clone(),
        path: args.path,
        reserve_bytes: args.reserve.unwrap_or_default().0,
        limit_bytes: args.limit.map(|limit| limit.0),
        labels: args.labels.into_iter().collect(),
    };
    let operation = settle(session, &client, client.create_pool(&request).await?).await?;
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: made, in {}", args.name, request.path.display()))?;
    Ok(0)
}
