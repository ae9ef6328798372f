use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::volume_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    session::Session,
};

/// End the NBD exports of volumes, and hang up on their clients
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volumes
    #[arg(value_parser = volume_name, required = true, add = ArgValueCompleter::new(complete::volumes))]
    names: Vec<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    each(session, &args.names, async |name: Name| {
        let operation = settle(session, &client, client.unexport_volume(&name).await?).await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: no longer exported"))
    })
    .await
}
