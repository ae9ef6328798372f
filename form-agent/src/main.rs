//! `form-agent`: one thin daemon a host.

mod action;
mod admit;
mod agent;
mod authorise;
mod bench;
mod cgroup;
mod config;
mod create;
mod daemon;
mod database;
mod deploy;
mod desired;
mod doctor;
mod driver;
mod event;
#[cfg(debug_assertions)]
mod failpoint;
mod fleet;
mod headroom;
mod health;
mod heap;
mod identity;
mod interface;
mod kept;
mod kernel;
mod label;
mod lifecycle;
mod limits;
mod logs;
mod machine;
mod memory;
mod metrics;
mod operation;
mod plan;
mod serve;
mod snapshot;
mod stats;
mod telemetry;
#[cfg(test)]
mod testing;
mod vcpus;
mod vm;
mod volume;

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use config::{Config, Paths};
use identity::Identity;

/// The agent of a Formation host: it runs the host's VMs and keeps them as the replicated state says.
#[derive(Parser)]
#[command(name = "form-agent", version, about)]
struct Arguments {
    /// Keep everything below this directory instead of / (several agents on one machine, tests)
    #[arg(long, global = true, default_value = "/", env = "FORM_AGENT_ROOT")]
    root: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make this host's key and print a one-time token with which its first owner claims it
    Init,
    /// Run the agent in the foreground
    Run,
    /// Ask the running agent how it is
    Status,
    /// Measure what VMs and agents cost on this host; exit status 1 when something enforced is over its budget or not measured
    Bench(bench::Options),
    /// Write the API's OpenAPI document to standard output
    Openapi,
}

fn main() -> ExitCode {
    heap::keep_small();
    let arguments = Arguments::parse();
    let paths = Paths::new(&arguments.root);
    let result = match arguments.command {
        Command::Init => init(&paths),
        Command::Run => daemon::run(paths),
        Command::Status => daemon::status(&paths),
        Command::Bench(options) => match measure(&paths, &options) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => Err(error),
        },
        Command::Openapi => openapi(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("form-agent: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

/// Whether everything was measured and is within its budget. SIGINT and SIGTERM end it, with nothing left behind.
fn measure(paths: &Paths, options: &bench::Options) -> Result<bool, Box<dyn std::error::Error>> {
    let stop = bench::Stop::default();
    daemon::when_told_to_stop({
        let stop = stop.clone();
        move || stop.set()
    })?;
    Ok(bench::run(paths, options, &stop)?)
}

fn openapi() -> Result<(), Box<dyn std::error::Error>> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &serve::document())?;
    Ok(out.write_all(b"\n")?)
}

fn init(paths: &Paths) -> Result<(), Box<dyn std::error::Error>> {
    paths.create_all().map_err(|error| format!("cannot make the agent's directories: {error} (are you root?)"))?;
    let config = Config::load(&paths.config())?;
    let mut identity = Identity::open(paths, config.owner)?;
    if let Some(owner) = identity.owner() {
        println!("This host is {} and belongs to {owner}.", identity.host_id().short());
        return Ok(());
    }
    let token = identity.new_token()?;
    println!("This host is {}. Start the agent (`form-agent run`), then claim it once, from where you work:", identity.host_id().short());
    println!();
    println!("  form host add ADDRESS:{} --token {token}", config.listen.port());
    Ok(())
}
