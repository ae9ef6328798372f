//! `form key …`

pub mod new;
pub mod passphrase;
pub mod show;

use clap::Subcommand;
use form_types::PublicKey;
use serde::Serialize;

use crate::{
    context::identity_path,
    failure::{Failure, Outcome},
    session::Session,
    ui::Record,
};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Show(show::Args),
    New(new::Args),
    Passphrase(passphrase::Args),
}

impl Verb {
    pub fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Show(args) => show::run(&args, session),
            Self::New(args) => new::run(&args, session),
            Self::Passphrase(args) => passphrase::run(&args, session),
        }
    }
}

/// What may be shown of a key.
#[derive(Serialize)]
struct Shown {
    public_key: PublicKey,
    path: String,
    has_passphrase: bool,
}

impl Shown {
    fn new(public_key: PublicKey, has_passphrase: bool) -> Result<Self, Failure> {
        Ok(Self { public_key, path: identity_path()?.display().to_string(), has_passphrase })
    }

    fn show(&self, session: &Session) -> Outcome {
        let record = Record::new(self.public_key.to_string())
            .field("public key", self.public_key)
            .field("file", &self.path)
            .field("passphrase", if self.has_passphrase { "yes" } else { "none" });
        session.terminal.show(self, &record)?;
        Ok(0)
    }
}
