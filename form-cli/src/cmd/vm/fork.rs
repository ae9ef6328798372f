use std::collections::BTreeSet;

use clap_complete::engine::ArgValueCompleter;
use form_api::{
    ApiError, ErrorCode,
    client::Client,
    deploy::{CreateVmRequest, DeployRequest, ForkOf},
    snapshot::SnapshotRequest,
    volume::Volume,
};
use form_types::{IdempotencyKey, Name};

use super::create;
use crate::{
    args::{new_label, vm_name},
    cmd::deploy,
    complete,
    failure::{Failure, Outcome},
    operation::{each_at_once, settle},
    session::Session,
};

/// As many as one command makes.
const MOST: u32 = 100;

/// Start copies of a running VM that go on where it stands
///
/// Each is a VM with its own name, addresses, host keys, machine-id and randomness; its programs go on in the middle of what they do, once it
/// has all that. The VM stands still while it is saved, as for a snapshot. The copies publish no ports of the host, and connections
/// that were open are the VM's alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  form vm fork web trial\n  form vm fork web -n 10\n  form vm fork web -n 3 --snapshot warmed-up")]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    source: Name,
    /// The new VMs
    #[arg(value_name = "NEW", value_parser = vm_name, required_unless_present = "count", conflicts_with = "count")]
    names: Vec<Name>,
    /// So many new VMs, called after the VM: web-1, web-2 …
    #[arg(short = 'n', long, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    count: Option<u32>,
    /// Go on from this snapshot of the VM, instead of from how it is now
    #[arg(long)]
    snapshot: Option<Name>,
    /// Set a label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = new_label)]
    labels: Vec<(String, String)>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    if args.snapshot.is_none() && session.global.no_wait {
        return Err(Failure::usage("what the copies go on from is removed when they run, and --no-wait does not wait for that")
            .hint("leave out --no-wait, or make a snapshot with `form vm snapshot create` and name it with --snapshot"));
    }
    let client = session.client()?;
    let source = client.vm(&args.source).await?.desired;
    if !source.has_guest() {
        // Said before the VM stands still for it; the host looks again.
        let text = format!(
            "vm/{} runs a kernel of its own without Formation's guest, and a copy of it would not learn that it is another machine",
            args.source
        );
        return Err(Failure::new(ErrorCode::Conflict, text).hint("make another one with `form vm create --kernel`"));
    }
    let names = names(&client, &args).await?;
    let Some(snapshot) = &args.snapshot else {
        without_volumes(&client, &args.source).await?;
        let snapshot = take(session, &client, &args.source).await?;
        let made = make(session, &client, &args, &source, &names, &snapshot).await;
        remove(session, &client, &args.source, &snapshot).await;
        return made;
    };
    make(session, &client, &args, &source, &names, snapshot).await
}

/// Those that were given, all of them free; or the first free ones.
async fn names(client: &Client, args: &Args) -> Result<Vec<Name>, Failure> {
    let Some(count) = args.count else {
        let distinct: BTreeSet<&Name> = args.names.iter().collect();
        if distinct.len() < args.names.len() {
            return Err(Failure::usage("a name is there twice").hint("give each new VM another one"));
        }
        for name in &args.names {
            create::is_free(client, name).await?;
        }
        return Ok(args.names.clone());
    };
    let taken: BTreeSet<Name> = client.vms().await?.into_iter().map(|vm| vm.name).collect();
    numbered(&args.source, count, &taken).map_err(|error| {
        Failure::usage(format!("{}-1 is no name: {error}", args.source)).hint("name the new VMs: `form vm fork web one two`")
    })
}

fn numbered(source: &Name, count: u32, taken: &BTreeSet<Name>) -> Result<Vec<Name>, form_types::name::NameError> {
    let mut found = Vec::new();
    for number in 1.. {
        if found.len() == count as usize {
            break;
        }
        let name: Name = format!("{source}-{number}").parse()?;
        if !taken.contains(&name) {
            found.push(name);
        }
    }
    Ok(found)
}

/// Said before the VM stands still for it; the host looks again.
async fn without_volumes(client: &Client, vm: &Name) -> Result<(), Failure> {
    let has = |volume: &Volume| volume.attachment.as_ref().is_some_and(|attachment| attachment.vm == *vm);
    let Some(volume) = client.volumes().await?.into_iter().find(has) else { return Ok(()) };
    let text = format!("vm/{vm} has volume/{}, and a fork has no volumes", volume.name);
    let error = ApiError::new(ErrorCode::Conflict, text);
    Err(error.hint(format!("take it away first: `form volume detach {}`", volume.name)).into())
}

/// Saves the VM under a name that nobody else gives.
async fn take(session: &Session, client: &Client, vm: &Name) -> Result<Name, Failure> {
    let key = IdempotencyKey::random().map_err(|error| Failure::failed(format!("no randomness: {error}")))?;
    let text: String = key.to_string().chars().filter(char::is_ascii_alphanumeric).take(12).collect();
    let name: Name = format!("fork-{}", text.to_ascii_lowercase()).parse().map_err(|error| Failure::failed(format!("{error}")))?;
    let request = SnapshotRequest { name: Some(name.clone()), compress: false };
    settle(session, client, client.create_snapshot(vm, &request).await?).await?;
    Ok(name)
}

/// The copies have what they need of it.
async fn remove(session: &Session, client: &Client, vm: &Name, snapshot: &Name) {
    let removed = async { settle(session, client, client.remove_snapshot(vm, snapshot).await?).await };
    if let Err(failure) = removed.await {
        session.terminal.failure(&failure);
        session.terminal.warn(format!("the snapshot {snapshot} stays: remove it with `form vm snapshot rm {vm} {snapshot}`"));
    }
}

/// Asks for all, then follows one after the other.
async fn make(session: &Session, client: &Client, args: &Args, source: &DeployRequest, names: &[Name], snapshot: &Name) -> Outcome {
    let ask = async |name: Name| {
        let key = IdempotencyKey::random().map_err(|error| Failure::failed(format!("no randomness: {error}")))?;
        Ok(client.create_vm(&request(args, source, &name, snapshot), key).await?)
    };
    each_at_once(session, names, ask, async |name: Name, operation| {
        deploy::carry_out(session, client, &request(args, source, &name, snapshot).vm, operation).await.map(drop)
    })
    .await
}

/// The VM under another name. No two VMs publish one port.
fn request(args: &Args, source: &DeployRequest, name: &Name, snapshot: &Name) -> CreateVmRequest {
    let mut spec = source.spec.clone().renamed(name);
    for port in &mut spec.ports {
        port.host_port = None;
    }
    spec.labels.extend(args.labels.iter().cloned());
    let vm = DeployRequest { spec, ..source.clone() };
    let fork_of = Some(ForkOf { vm: args.source.clone(), snapshot: snapshot.clone() });
    CreateVmRequest { vm, start: true, disk_of: None, fork_of, volumes: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_taken_are_passed_over() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        let names = numbered(&name("web"), 3, &[name("web"), name("web-2")].into()).unwrap();
        assert_eq!(names, ["web-1", "web-3", "web-4"].map(name));
        assert!(numbered(&name(&"x".repeat(63)), 1, &BTreeSet::new()).is_err());
    }
}
