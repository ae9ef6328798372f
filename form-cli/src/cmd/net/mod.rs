//! `form net …`

pub mod attach;
pub mod detach;
pub mod ls;

use clap::Subcommand;

use crate::{failure::Outcome, session::Session};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Attach(attach::Args),
    Detach(detach::Args),
    Ls(ls::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Attach(args) => attach::run(args, session).await,
            Self::Detach(args) => detach::run(args, session).await,
            Self::Ls(args) => ls::run(args, session).await,
        }
    }
}
