use clap_complete::engine::ArgValueCompleter;
use form_api::vm::SetRequest;
use form_types::{Name, spec::Restart};

use crate::{
    args::{Ceiling, bandwidth, iops, mebibytes, net_bandwidth, new_label, restart_policy, vm_name},
    complete,
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Change a VM's labels, restart policy, vCPUs, memory or limits
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The next `form deploy` of its Formfile says again what the Formfile says. Limits hold at once, and a deploy leaves them as they are."
)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
    /// Set a label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = new_label)]
    labels: Vec<(String, String)>,
    /// Remove a label
    #[arg(long = "remove-label", value_name = "KEY")]
    removed: Vec<String>,
    /// What to do when its service ends: always, never, on-failure or on-failure:TIMES
    #[arg(long, value_name = "POLICY", value_parser = restart_policy)]
    restart_policy: Option<Restart>,
    /// Virtual CPUs: at once when it runs and has room for them, else from its next start on
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u32>,
    /// Memory: 512M, 2G. A VM that runs has it at once, in steps of 128M above what it was started with
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    memory: Option<u64>,
    /// Most operations a second of its root disk, reads and writes together; none ends the limit
    #[arg(long, value_name = "COUNT|none", value_parser = iops)]
    iops: Option<Ceiling>,
    /// Most bytes a second of its root disk, read and written together: 50MiB; none ends the limit
    #[arg(long, value_name = "SIZE|none", value_parser = bandwidth)]
    bandwidth: Option<Ceiling>,
    /// Most bits a second of its network, of each interface and each way: 100Mbit, 1Gbit; none ends the limit
    #[arg(long, value_name = "SPEED|none", value_parser = net_bandwidth)]
    net_bandwidth: Option<Ceiling>,
    /// Restart it now if it runs and a change needs that
    #[arg(long)]
    restart: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let removed = args.removed.into_iter().map(|key| (key, None));
    let labels = args.labels.into_iter().map(|(key, value)| (key, Some(value))).chain(removed).collect();
    let request = SetRequest {
        labels,
        restart_policy: args.restart_policy,
        vcpus: args.vcpus,
        memory_mib: args.memory,
        disk_iops: args.iops.map(|most| most.0),
        disk_bytes_per_second: args.bandwidth.map(|most| most.0),
        net_bytes_per_second: args.net_bandwidth.map(|most| most.0),
        restart: args.restart,
    };
    if request.is_empty() {
        return Err(Failure::usage("nothing is to be set")
            .hint("say what: --label, --restart-policy, --vcpus, --memory, --iops, --bandwidth, --net-bandwidth"));
    }
    let client = session.client()?;
    let operation = settle(session, &client, client.set(&args.name, &request).await?).await?;
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: set", args.name))?;
    Ok(0)
}
