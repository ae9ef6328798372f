//! `form pool …`

pub mod ls;
pub mod show;

use clap::Subcommand;

use crate::{failure::Outcome, session::Session};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Ls(ls::Args),
    Show(show::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Ls(args) => ls::run(&args, session).await,
            Self::Show(args) => show::run(&args, session).await,
        }
    }
}
