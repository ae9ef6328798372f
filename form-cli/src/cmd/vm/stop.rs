use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::vm_name,
    complete,
    failure::Outcome,
    operation::{each_at_once, settle},
    session::Session,
};

/// Stop VMs: shut down, and off when that takes too long
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VMs
    #[arg(value_parser = vm_name, required = true, add = ArgValueCompleter::new(complete::vms))]
    names: Vec<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let finish = async |name: Name, operation| {
        let operation = settle(session, &client, operation).await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: stop{}", if operation.status.is_final() { "ped" } else { "" }))
    };
    each_at_once(session, &args.names, async |name: Name| Ok(client.stop(&name).await?), finish).await
}
