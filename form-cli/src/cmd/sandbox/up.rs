use form_api::ErrorCode;
use form_types::{
    Name,
    size::{self, GIB, MIB},
};

use super::{HostReport, Report, Which, incomplete};
use crate::{
    context::{Config, ConfigFile, ContextKind, load_or_create_identity},
    failure::{Failure, Outcome},
    sandbox::{self, Host, Link, Machine, Peers, Record, Sandbox},
    session::Session,
    ui::bytes,
};

/// Bring up throw-away hosts in QEMU; no root and no hardware virtualisation needed
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// How many hosts (1): NAME, NAME-2 and so on, which reach each other on 10.0.3.1, 10.0.3.2 and so on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(sandbox::MAX_HOSTS)))]
    hosts: Option<u32>,
    /// Processors of each host (this machine's, up to 4)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: Option<u32>,
    /// Memory for each host and its VMs: MiB, or with a unit: 4G (2G)
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<u64>,
    /// Disk for each host and its VMs: GiB, or with a unit (20G); takes only the room it uses
    #[arg(long, value_name = "SIZE", value_parser = disk)]
    disk: Option<u64>,
}

/// A size in units of `unit` within a range of them.
fn sized(text: &str, unit: u64, range: std::ops::RangeInclusive<u64>) -> Result<u64, String> {
    let number = size::parse(text, unit).map_err(|error| error.to_string())?.0 / unit;
    if range.contains(&number) {
        return Ok(number);
    }
    Err(format!("from {} to {}", bytes(range.start() * unit), bytes(range.end() * unit)))
}

fn memory(text: &str) -> Result<u64, String> {
    sized(text, MIB, 512..=1024 * 1024)
}

fn disk(text: &str) -> Result<u64, String> {
    sized(text, GIB, 5..=64 * 1024)
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let name = &args.which.name;
    let machine = Machine { cpus: args.cpus, memory_mib: args.memory, disk_gib: args.disk };
    sandbox::require_programs()?;
    let config = ConfigFile::load()?.config;
    refuse_taken_name(&config, &args)?;
    // Before anything is made: without a key the host could belong to nobody.
    load_or_create_identity()?;
    let sandbox = Sandbox::create(session, &config, name).await?;
    let there = existing(session, &sandbox, &args, machine)?;
    let fresh = there.is_none();
    let mut machines = there.unwrap_or_default();
    let wanted = args.hosts.unwrap_or(1);
    if machines.len() < wanted as usize
        && let Err(failure) = add(session, &sandbox, wanted, machine, &mut machines).await
    {
        if fresh {
            // There was none, and there is none. The first failure is what matters.
            let _ = sandbox.remove();
        }
        return Err(failure);
    }
    let peers = machines.first().and_then(|(_, first)| first.peers);
    let mut clients = Vec::new();
    // Only worth a word: that they cannot be read is no reason to leave a host that is there as it is.
    let installed = sandbox::installed_programs().ok();
    for (host, record) in &mut machines {
        if let Some(said) = record.outdated(&host.name, installed) {
            session.terminal.warn(said);
        }
        if !host.runs() {
            let link = peers.map(|peers| Link { number: host.number, port: peers.port });
            sandbox::start(session, host, record, link).await?;
        }
    }
    for (host, record) in &machines {
        let whom = if machines.len() == 1 { "the host" } else { host.name.as_str() };
        let step = session.terminal.step(format!("waiting until {whom} answers ({})", record.accelerator.as_str()));
        clients.push(sandbox::wait_until_it_answers(session, host, record).await?);
        step.done("");
    }
    let known = machines.iter().map(|(host, record)| record.known_host(&host.name)).collect::<Result<Vec<_>, _>>()?;
    if let Some((_, first)) = machines.first_mut() {
        sandbox::write_context(&sandbox, first, known.clone())?;
    }
    for (client, known) in clients.iter().zip(&known) {
        sandbox::publish_of(session, client, known).await;
    }
    let hosts = machines.iter().map(|(host, record)| HostReport::new(host, record, true)).collect();
    let report = Report { name: name.clone(), directory: sandbox.directory.clone(), hosts };
    session.terminal.done(&report, name.as_str(), &sentence(name, &machines))?;
    session.terminal.note("Go on with `form deploy` and `form ps`. `form sandbox down` removes the hosts and all their VMs.");
    Ok(0)
}

fn sentence(name: &Name, machines: &[(Host, Record)]) -> String {
    match machines {
        [(host, record)] => format!("The host {} answers on {}; the current context is {name}", host.name, record.address()),
        several => {
            let names: Vec<&str> = several.iter().map(|(host, _)| host.name.as_str()).collect();
            format!(
                "The hosts {} answer; the current context is {name}, `--host {}` means the last of them",
                names.join(", "),
                names.last().copied().unwrap_or_default()
            )
        }
    }
}

/// The hosts of a sandbox that is there, with what was asked for where they do not run.
fn existing(session: &Session, sandbox: &Sandbox, args: &Args, machine: Machine) -> Result<Option<Vec<(Host, Record)>>, Failure> {
    let name = &sandbox.name;
    let Some(first) = Record::load(&sandbox.directory)? else { return Ok(None) };
    let hosts = Host::all(name, &sandbox.directory, first.hosts())?;
    let running = hosts.iter().filter(|host| host.runs()).count();
    let wanted = args.hosts.unwrap_or(first.hosts());
    if wanted < first.hosts() {
        return Err(Failure::new(ErrorCode::Conflict, format!("the sandbox `{name}` has {} hosts", first.hosts()))
            .hint("`form sandbox down` removes it with all its VMs; then bring up a smaller one"));
    }
    let mut machines = Vec::new();
    let mut fits = wanted == first.hosts() || running == 0;
    for host in hosts {
        let mut record = Record::load(&host.directory)?.ok_or_else(|| incomplete(name))?;
        if host.runs() {
            fits &= machine.fits(&record);
        } else {
            machine.apply(&mut record)?;
        }
        machines.push((host, record));
    }
    if !fits {
        return Err(Failure::new(ErrorCode::Conflict, format!("the sandbox `{name}` runs already, and not with what you ask for"))
            .hint("`form sandbox down` removes it with all its VMs; then bring it up anew, or take another --name"));
    }
    if running == machines.len() {
        session.terminal.note(format!("the sandbox `{name}` runs already"));
    } else if running == 0 {
        session.terminal.note(format!("the sandbox `{name}` is there and does not run: starting it with its disk"));
    } else {
        let away = machines.iter().filter(|(host, _)| !host.runs()).map(|(host, _)| host.name.as_str()).collect::<Vec<_>>();
        session.terminal.note(format!("not running: {}; starting with what is on the disk", away.join(", ")));
    }
    Ok(Some(machines))
}

/// Makes the hosts that are not there yet, up to `wanted` of them.
async fn add(
    session: &Session,
    sandbox: &Sandbox,
    wanted: u32,
    machine: Machine,
    machines: &mut Vec<(Host, Record)>,
) -> Result<(), Failure> {
    let hosts = Host::all(&sandbox.name, &sandbox.directory, wanted)?;
    if machines.is_empty() {
        // What another command left half made.
        sandbox.stop()?;
    }
    let image = sandbox::build_host_image(session).await?;
    for host in hosts.into_iter().skip(machines.len()) {
        let step = session.terminal.step(if wanted == 1 {
            "writing the host's disk".to_owned()
        } else {
            format!("writing the disk of {}", host.name)
        });
        let record = sandbox::make(&host, &image, machine).await?;
        step.done("");
        machines.push((host, record));
    }
    if let [(_, first), _, ..] = machines.as_mut_slice() {
        let port = first.peers.map(|peers| peers.port);
        first.peers = Some(Peers { hosts: wanted, port: sandbox::free_port(port)? });
    }
    // The first one's last: it says how many there are.
    machines.iter().rev().try_for_each(|(host, record)| record.save(&host.directory))
}

fn refuse_taken_name(config: &Config, args: &Args) -> Result<(), Failure> {
    let name = &args.which.name;
    match config.context(name) {
        Some(context) if context.kind != ContextKind::Sandbox => {
            Err(Failure::new(ErrorCode::Conflict, format!("`{name}` is the name of another context")).hint("take another one with --name"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_limits() {
        assert_eq!((memory("1024"), memory("4G"), disk("20"), disk("1T")), (Ok(1024), Ok(4096), Ok(20), Ok(1024)));
        assert!(memory("511").unwrap_err().contains("512 MiB"));
        assert!(disk("4G").is_err() && memory("2T").is_err() && memory("lots").is_err());
    }
}
