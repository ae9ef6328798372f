use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::pool_name,
    complete,
    failure::Outcome,
    session::Session,
    ui::{Record, bytes, labels},
};

/// Show a pool
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pool
    #[arg(value_parser = pool_name, add = ArgValueCompleter::new(complete::pools))]
    name: Name,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let pool = session.client()?.pool(&args.name).await?;
    let record = Record::new(pool.name.to_string())
        .field("name", &pool.name)
        .field("kind", pool.kind.as_str())
        .field("state", pool.state())
        .optional("fault", pool.fault.as_ref())
        .optional("source", pool.source.as_ref())
        .optional("options", pool.options.as_ref())
        .field("path", pool.path.display())
        .field("volumes", pool.volumes)
        .optional("snapshots", (pool.snapshots > 0).then_some(pool.snapshots))
        .field("promised", bytes(pool.provisioned_bytes))
        .field("used", bytes(pool.allocated_bytes))
        .field("free", bytes(pool.free_bytes))
        .field("total", bytes(pool.total_bytes))
        .optional("reserve", (pool.reserve_bytes > 0).then(|| bytes(pool.reserve_bytes)))
        .optional("limit", pool.limit_bytes.map(bytes))
        .optional("labels", (!pool.labels.is_empty()).then(|| labels(&pool.labels)))
        .field("host", &pool.host_name)
        .wide("host id", pool.host);
    session.terminal.show(&pool, &record)?;
    Ok(0)
}
