use clap_complete::engine::ArgValueCompleter;
use form_api::volume::DetachRequest;
use form_types::Name;

use crate::{
    args::volume_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    session::Session,
};

/// Take volumes from the VMs that have them; what they hold stays
///
/// The guest of a VM that runs unmounts a volume before it is taken away. While something there uses it, it stays, and you are told who
/// uses it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volumes
    #[arg(value_parser = volume_name, required = true, add = ArgValueCompleter::new(complete::volumes))]
    names: Vec<Name>,
    /// Take them away from what uses them, and from a guest that does not answer: programs get errors, and what they had not written is lost
    #[arg(long)]
    force: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    each(session, &args.names, async |name: Name| {
        let operation = settle(session, &client, client.detach_volume(&name, &DetachRequest { force: args.force }).await?).await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: detached"))
    })
    .await
}
