use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::vm_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    session::Session,
};

/// Let paused VMs go on
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VMs
    #[arg(value_parser = vm_name, required = true, add = ArgValueCompleter::new(complete::vms))]
    names: Vec<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    each(session, &args.names, async |name: Name| {
        let operation = settle(session, &client, client.resume(&name).await?).await?;
        session.terminal.done(
            &operation,
            name.as_str(),
            &format!("{name}: {}", if operation.status.is_final() { "resumed" } else { "resume" }),
        )
    })
    .await
}
