use clap_complete::engine::ArgValueCompleter;
use form_api::vm::SetRequest;
use form_types::{
    Name,
    size::{self, MIB},
    spec::{Restart, RestartPolicy},
};

use crate::{
    args::vm_name,
    complete,
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Change a VM's labels, restart policy, vCPUs or memory
#[derive(Debug, clap::Args)]
#[command(after_help = "The next `form deploy` of its Formfile says again what the Formfile says.")]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
    /// Set a label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Remove a label
    #[arg(long = "remove-label", value_name = "KEY")]
    removed: Vec<String>,
    /// What to do when its service ends: always, never, on-failure or on-failure:TIMES
    #[arg(long, value_name = "POLICY", value_parser = restart_policy)]
    restart_policy: Option<Restart>,
    /// Virtual CPUs, from its next start on
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u32>,
    /// Memory, from its next start on: 512M, 2G
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    memory: Option<u64>,
    /// Restart it now if it runs and a change needs that
    #[arg(long)]
    restart: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

fn restart_policy(text: &str) -> Result<Restart, String> {
    let (policy, retries) = match text.split_once(':') {
        Some((policy, retries)) => (policy, Some(retries.parse().map_err(|_| format!("`{retries}` is no number of times"))?)),
        None => (text, None),
    };
    match (policy, retries) {
        ("always", None) => Ok(Restart { policy: RestartPolicy::Always, max_retries: None }),
        ("never", None) => Ok(Restart { policy: RestartPolicy::Never, max_retries: None }),
        ("on-failure", max_retries) => Ok(Restart { policy: RestartPolicy::OnFailure, max_retries }),
        _ => Err("a restart policy is always, never, on-failure or on-failure:TIMES".to_owned()),
    }
}

fn mebibytes(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text, MIB).map_err(|error| error.to_string())?.0;
    if bytes == 0 || bytes % MIB != 0 { Err("memory is a whole number of MiB".to_owned()) } else { Ok(bytes / MIB) }
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let removed = args.removed.into_iter().map(|key| (key, None));
    let labels = args.labels.into_iter().map(|(key, value)| (key, Some(value))).chain(removed).collect();
    let request =
        SetRequest { labels, restart_policy: args.restart_policy, vcpus: args.vcpus, memory_mib: args.memory, restart: args.restart };
    if request.is_empty() {
        return Err(Failure::usage("nothing is to be set").hint("say what: --label, --restart-policy, --vcpus, --memory"));
    }
    let client = session.client()?;
    let operation = settle(session, &client, client.set(&args.name, &request).await?).await?;
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: set", args.name))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_and_sizes() {
        assert_eq!(restart_policy("on-failure:3"), Ok(Restart { policy: RestartPolicy::OnFailure, max_retries: Some(3) }));
        assert_eq!(restart_policy("always"), Ok(Restart { policy: RestartPolicy::Always, max_retries: None }));
        for bad in ["", "sometimes", "never:2", "on-failure:x"] {
            assert!(restart_policy(bad).is_err(), "{bad}");
        }
        assert_eq!((mebibytes("512"), mebibytes("2G")), (Ok(512), Ok(2048)));
        for bad in ["0", "1K", "x"] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
    }
}
