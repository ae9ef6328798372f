use clap_complete::engine::ArgValueCompleter;
use form_api::deploy::{CreateVmRequest, DeployRequest};
use form_types::Name;

use super::create::{self, Wishes};
use crate::{args::vm_name, complete, failure::Outcome, session::Session};

/// Make a new VM with a copy of a stopped VM's root disk, and start it
///
/// It has a name, addresses, host keys and a machine-id of its own. Volumes stay with the VM that has them, and the new one publishes only
/// the ports that --publish names.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The stopped VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    source: Name,
    /// The new VM
    #[arg(value_name = "NEW", value_parser = vm_name)]
    name: Name,
    #[command(flatten)]
    wishes: Wishes,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let source = client.vm(&args.source).await?.desired;
    create::is_free(&client, &args.name).await?;
    let mut spec = args.wishes.apply(source.spec, &args.name);
    if !spec.volumes.is_empty() {
        let names: Vec<&str> = spec.volumes.iter().map(|volume| volume.name.as_str()).collect();
        session.terminal.note(format!("volumes of {} that {} does not get: {}", args.source, args.name, names.join(", ")));
        spec.volumes.clear();
    }
    let vm = DeployRequest { spec, ..source };
    let request = CreateVmRequest { vm, start: !args.wishes.no_start, disk_of: Some(args.source), fork_of: None, volumes: Vec::new() };
    create::make(session, &client, request).await
}
