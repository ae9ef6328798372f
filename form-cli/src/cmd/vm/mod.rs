//! `form vm …`

pub mod clone;
pub mod console;
pub mod cp;
pub mod create;
pub mod exec;
pub mod fork;
pub mod logs;
pub mod ls;
pub mod pause;
pub mod port_forward;
pub mod prune;
pub mod rename;
pub mod reset;
pub mod restart;
pub mod resume;
pub mod rm;
pub mod rollback;
pub mod set;
pub mod show;
pub mod snapshot;
pub mod ssh;
pub mod start;
pub mod stats;
pub mod stop;
pub mod wait;

use clap::Subcommand;

use crate::{failure::Outcome, session::Session};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Ls(ls::Args),
    Show(show::Args),
    Create(create::Args),
    Clone(clone::Args),
    Fork(fork::Args),
    Start(start::Args),
    Stop(stop::Args),
    Restart(restart::Args),
    Pause(pause::Args),
    Resume(resume::Args),
    Reset(reset::Args),
    Rename(rename::Args),
    Set(set::Args),
    Rollback(rollback::Args),
    Snapshot(snapshot::Args),
    Rm(rm::Args),
    Prune(prune::Args),
    Logs(logs::Args),
    Exec(exec::Args),
    Ssh(ssh::Args),
    Console(console::Args),
    Cp(cp::Args),
    Stats(stats::Args),
    PortForward(port_forward::Args),
    Wait(wait::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Ls(args) => ls::run(&args, session).await,
            Self::Show(args) => show::run(&args, session).await,
            Self::Create(args) => create::run(args, session).await,
            Self::Clone(args) => clone::run(args, session).await,
            Self::Fork(args) => fork::run(args, session).await,
            Self::Start(args) => start::run(args, session).await,
            Self::Stop(args) => stop::run(args, session).await,
            Self::Restart(args) => restart::run(args, session).await,
            Self::Pause(args) => pause::run(args, session).await,
            Self::Resume(args) => resume::run(args, session).await,
            Self::Reset(args) => reset::run(args, session).await,
            Self::Rename(args) => rename::run(args, session).await,
            Self::Set(args) => set::run(args, session).await,
            Self::Rollback(args) => rollback::run(args, session).await,
            Self::Snapshot(args) => snapshot::run(args, session).await,
            Self::Rm(args) => rm::run(args, session).await,
            Self::Prune(args) => prune::run(args, session).await,
            Self::Logs(args) => logs::run(args, session).await,
            Self::Exec(args) => exec::run(args, session).await,
            Self::Ssh(args) => ssh::run(args, session).await,
            Self::Stats(args) => stats::run(args, session).await,
            Self::Cp(args) => cp::run(args, session).await,
            Self::Console(args) => console::run(&args, session).await,
            Self::PortForward(args) => port_forward::run(args, session).await,
            Self::Wait(args) => wait::run(&args, session).await,
        }
    }
}
