use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::pool_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    session::Session,
};

/// Remove pools that have no volumes; their directories stay, and NFS exports are unmounted
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pools
    #[arg(value_parser = pool_name, required = true, add = ArgValueCompleter::new(complete::pools))]
    names: Vec<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    for name in &args.names {
        client.pool(name).await?;
    }
    let names: Vec<&str> = args.names.iter().map(Name::as_str).collect();
    session.terminal.confirm(&format!("Remove the pool {}?", names.join(", ")))?;
    each(session, &args.names, async |name: Name| {
        let is_mounted = client.pool(&name).await?.source.is_some();
        let operation = settle(session, &client, client.remove_pool(&name).await?).await?;
        let what = if is_mounted { "its export is unmounted" } else { "its directory is kept" };
        session.terminal.done(&operation, name.as_str(), &format!("{name}: removed, {what}"))
    })
    .await
}
