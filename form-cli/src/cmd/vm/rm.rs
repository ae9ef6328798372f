use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::vm_name,
    complete,
    failure::Outcome,
    operation::{each, settle},
    sandbox,
    session::Session,
};

/// Destroy VMs and everything on their disks
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VMs
    #[arg(value_parser = vm_name, required = true, add = ArgValueCompleter::new(complete::vms))]
    names: Vec<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    for name in &args.names {
        client.vm(name).await?;
    }
    let names: Vec<&str> = args.names.iter().map(Name::as_str).collect();
    session.terminal.confirm(&format!("Destroy {} and everything on the root disk?", names.join(", ")))?;
    let outcome = each(session, &args.names, async |name: Name| {
        let operation = settle(session, &client, client.destroy(&name).await?).await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: destroy{}", if operation.status.is_final() { "ed" } else { "" }))
    })
    .await;
    sandbox::publish(session, &client).await;
    outcome
}
