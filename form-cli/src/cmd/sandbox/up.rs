use form_api::ErrorCode;
use form_types::size::{self, GIB, MIB};

use super::{Report, Which};
use crate::{
    context::{Config, ConfigFile, ContextKind, load_or_create_identity},
    failure::{Failure, Outcome},
    sandbox::{self, Machine, Record, Sandbox, State},
    session::Session,
    ui::bytes,
};

/// Bring up a throw-away host in QEMU; no root and no hardware virtualisation needed
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Processors (this machine's, up to 4)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: Option<u32>,
    /// Memory for the host and its VMs: MiB, or with a unit: 4G (2G)
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<u64>,
    /// Disk for the host and its VMs: GiB, or with a unit (20G); takes only the room it uses
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
    let (mut record, runs) = match Record::load(&sandbox.directory)? {
        Some(record) if State::of(&sandbox.directory).process().is_some() => {
            if !machine.fits(&record) {
                return Err(Failure::new(ErrorCode::Conflict, format!("the sandbox `{name}` runs already, and not with what you ask for"))
                    .hint("`form sandbox down` removes it with all its VMs; then bring it up anew, or take another --name"));
            }
            session.terminal.note(format!("the sandbox `{name}` runs already"));
            (record, true)
        }
        Some(mut record) => {
            machine.apply(&mut record)?;
            session.terminal.note(format!("the sandbox `{name}` is there and does not run: starting it with its disk"));
            (record, false)
        }
        None => match make(session, &sandbox, machine).await {
            Ok(record) => (record, false),
            Err(failure) => {
                // There was none, and there is none. The first failure is what matters.
                let _ = sandbox.remove();
                return Err(failure);
            }
        },
    };
    if record.version != env!("CARGO_PKG_VERSION") {
        session.terminal.warn(format!(
            "its agent is of version {}, this is {}; `form sandbox down` and `up` make a new one",
            record.version,
            env!("CARGO_PKG_VERSION")
        ));
    }
    if !runs {
        sandbox::start(session, &sandbox, &mut record).await?;
    }
    let step = session.terminal.step(format!("waiting until the host answers ({})", record.accelerator.as_str()));
    let client = sandbox::wait_until_it_answers(session, &sandbox, &record).await?;
    step.done("");
    sandbox::write_context(&sandbox, &mut record)?;
    sandbox::publish_of(session, &client, &record.known_host(name)?).await;
    let sentence = format!("The host {name} answers on {}; the current context is {name}", record.address());
    session.terminal.done(&Report::of(&sandbox, &record), name.as_str(), &sentence)?;
    session.terminal.note("Go on with `form deploy` and `form ps`. `form sandbox down` removes the host and all its VMs.");
    Ok(0)
}

async fn make(session: &Session, sandbox: &Sandbox, machine: Machine) -> Result<Record, Failure> {
    // What another command left half made.
    sandbox::stop(&sandbox.directory)?;
    let image = sandbox::build_host_image(session).await?;
    let step = session.terminal.step("writing the host's disk");
    let record = sandbox::make(sandbox, image, machine).await?;
    step.done("");
    Ok(record)
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
