use clap_complete::engine::ArgValueCompleter;
use form_api::volume::CloneRequest;
use form_types::Name;

use crate::{args::volume_name, complete, failure::Outcome, operation::settle, session::Session};

/// Make a new volume that holds what another holds now
///
/// No VM may run with the other one meanwhile. Where the pool's file system can, both share what they have in common.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume to copy
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
    /// The new volume's name
    #[arg(value_parser = volume_name)]
    new: Name,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let operation = settle(session, &client, client.clone_volume(&args.name, &CloneRequest { name: args.new.clone() }).await?).await?;
    session.terminal.done(&operation, args.new.as_str(), &format!("{}: holds what {} holds", args.new, args.name))?;
    Ok(0)
}
