//! The commands: a folder a noun, a file a verb.

mod bench;
mod build;
mod check;
mod completion;
pub mod context;
pub mod deploy;
mod doctor;
mod events;
mod fmt;
mod generate;
pub mod host;
pub mod image;
mod init;
pub mod key;
pub mod net;
pub mod op;
mod plan;
pub mod pool;
pub mod sandbox;
mod top;
mod version;
pub mod vm;
pub mod volume;
mod wait;

use clap::Subcommand;

use crate::{failure::Outcome, session::Session};

#[derive(Debug, Subcommand)]
pub enum Command {
    Init(init::Args),
    Check(check::Args),
    Fmt(fmt::Args),
    Build(build::Args),
    Plan(plan::Args),
    Deploy(deploy::Args),
    /// List VMs (as `form vm ls`)
    Ps(vm::ls::Args),
    Logs(vm::logs::Args),
    Exec(vm::exec::Args),
    Ssh(vm::ssh::Args),
    Cp(vm::cp::Args),
    Wait(wait::Args),
    Rollback(vm::rollback::Args),
    Top(top::Args),
    /// Destroy VMs and everything on their root disks (as `form vm rm`)
    Destroy(vm::rm::Args),
    Events(events::Args),
    Doctor(doctor::Args),
    Bench(bench::Args),
    /// Virtual machines
    #[command(subcommand)]
    Vm(vm::Verb),
    /// Images
    #[command(subcommand)]
    Image(image::Verb),
    /// Volumes: disks with a life of their own
    #[command(subcommand)]
    Volume(volume::Verb),
    /// Pools: the places that volumes live in
    #[command(subcommand)]
    Pool(pool::Verb),
    /// Network interfaces of VMs
    #[command(subcommand)]
    Net(net::Verb),
    /// Hosts: machines with an agent
    #[command(subcommand)]
    Host(host::Verb),
    /// Operations: changes that somebody asked for
    #[command(subcommand)]
    Op(op::Verb),
    /// Your own key
    #[command(subcommand)]
    Key(key::Verb),
    /// Contexts: which hosts commands talk to
    #[command(subcommand)]
    Context(context::Verb),
    /// Sandboxes: throw-away hosts on this machine
    #[command(subcommand)]
    Sandbox(sandbox::Verb),
    Completion(completion::Args),
    Version(version::Args),
    #[command(hide = true)]
    Generate(generate::Args),
}

impl Command {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Init(args) => init::run(args, session),
            Self::Check(args) => check::run(&args, session),
            Self::Fmt(args) => fmt::run(&args, session),
            Self::Build(args) => build::run(args, session).await,
            Self::Plan(args) => plan::run(args, session).await,
            Self::Deploy(args) => deploy::run(args, session).await,
            Self::Ps(args) => vm::ls::run(&args, session).await,
            Self::Logs(args) => vm::logs::run(args, session).await,
            Self::Exec(args) => vm::exec::run(args, session).await,
            Self::Ssh(args) => vm::ssh::run(args, session).await,
            Self::Cp(args) => vm::cp::run(args, session).await,
            Self::Wait(args) => wait::run(args, session).await,
            Self::Rollback(args) => vm::rollback::run(args, session).await,
            Self::Top(args) => top::run(args, session).await,
            Self::Destroy(args) => vm::rm::run(args, session).await,
            Self::Events(args) => events::run(args, session).await,
            Self::Doctor(args) => doctor::run(&args, session).await,
            Self::Bench(args) => bench::run(args, session).await,
            Self::Vm(verb) => verb.run(session).await,
            Self::Image(verb) => verb.run(session).await,
            Self::Volume(verb) => verb.run(session).await,
            Self::Pool(verb) => verb.run(session).await,
            Self::Net(verb) => verb.run(session).await,
            Self::Host(verb) => verb.run(session).await,
            Self::Op(verb) => verb.run(session).await,
            Self::Key(verb) => verb.run(session),
            Self::Context(verb) => verb.run(session),
            Self::Sandbox(verb) => verb.run(session).await,
            Self::Completion(args) => completion::run(&args, session),
            Self::Version(args) => version::run(&args, session).await,
            Self::Generate(args) => generate::run(&args, session),
        }
    }
}
