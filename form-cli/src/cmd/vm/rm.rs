use clap_complete::engine::ArgValueCompleter;
use form_api::{ErrorCode, client::Client, volume::RemoveVolumeQuery};
use form_types::Name;

use crate::{
    args::vm_name,
    complete,
    failure::{Failure, Outcome},
    operation::{each, each_at_once, settle},
    sandbox,
    session::Session,
};

/// Destroy VMs and everything on their root disks
///
/// Their volumes are kept, with what they hold, unless --volumes is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VMs
    #[arg(value_parser = vm_name, required = true, add = ArgValueCompleter::new(complete::vms))]
    names: Vec<Name>,
    /// Remove their volumes too, with everything they hold
    #[arg(long)]
    volumes: bool,
    /// With --volumes: also those that have snapshots of their own, and these
    #[arg(long, requires = "volumes")]
    snapshots: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    if args.volumes && session.global.no_wait {
        return Err(Failure::usage("volumes can be removed only once their VM is gone, and --no-wait does not wait for that")
            .hint("leave out --no-wait, or remove the volumes later with `form volume rm`"));
    }
    let client = session.client()?;
    // A name that does not exist is said before anybody is asked.
    for name in &args.names {
        client.vm(name).await?;
    }
    let volumes = volumes_of(&client, &args.names).await?;
    if args.volumes && !args.snapshots {
        have_no_snapshots(&client, &args.names, &volumes).await?;
    }
    let names: Vec<&str> = args.names.iter().map(Name::as_str).collect();
    let (names, volume_names) = (names.join(", "), volumes.iter().map(Name::as_str).collect::<Vec<_>>().join(", "));
    let question = match (volumes.is_empty(), args.volumes) {
        (false, true) => {
            let also = if args.snapshots { ", and all their snapshots" } else { "" };
            format!("Destroy {names} with everything on the root disk and on the volumes {volume_names}{also}?")
        }
        (false, false) => format!("Destroy {names} and everything on the root disk? What is on the volumes {volume_names} is kept."),
        (true, _) => format!("Destroy {names} and everything on the root disk?"),
    };
    session.terminal.confirm(&question)?;
    let finish = async |name: Name, operation| {
        let operation = settle(session, &client, operation).await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: destroy{}", if operation.status.is_final() { "ed" } else { "" }))
    };
    let outcome = each_at_once(session, &args.names, async |name: Name| Ok(client.destroy(&name).await?), finish).await;
    sandbox::publish(session, &client).await;
    if volumes.is_empty() {
        return outcome;
    }
    if !args.volumes {
        session.terminal.note(format!("kept: volumes {volume_names} (remove them with `form volume rm`)"));
        return outcome;
    }
    let code = outcome?;
    let removed = each(session, &volumes, async |name: Name| {
        let operation =
            settle(session, &client, client.remove_volume(&name, RemoveVolumeQuery { snapshots: args.snapshots, lost: false }).await?)
                .await?;
        session.terminal.done(&operation, name.as_str(), &format!("{name}: removed"))
    })
    .await?;
    Ok(code.max(removed))
}

/// Said before anything is destroyed: such a volume could not be removed afterwards. Snapshots of the VMs themselves, whose parts volumes have
/// by the same names, go with them.
async fn have_no_snapshots(client: &Client, vms: &[Name], volumes: &[Name]) -> Result<(), Failure> {
    let mut gone = Vec::new();
    for vm in vms {
        gone.extend(client.snapshots(vm).await?.into_iter().map(|snapshot| snapshot.name));
    }
    for volume in volumes {
        let snapshots = client.volume_snapshots(volume).await?.into_iter().map(|snapshot| snapshot.name);
        let own: Vec<String> = snapshots.filter(|name| !gone.contains(name)).map(|name| name.to_string()).collect();
        if !own.is_empty() {
            let text = format!("volume/{volume} has snapshots of its own ({}): nothing was destroyed", own.join(", "));
            return Err(
                Failure::new(ErrorCode::Conflict, text).hint("--snapshots removes them as well; without --volumes the volume is kept")
            );
        }
    }
    Ok(())
}

async fn volumes_of(client: &Client, vms: &[Name]) -> Result<Vec<Name>, Failure> {
    let volumes = client.volumes().await?.into_iter();
    Ok(volumes
        .filter(|volume| volume.attachment.as_ref().is_some_and(|attachment| vms.contains(&attachment.vm)))
        .map(|volume| volume.name)
        .collect())
}
