use crate::{context::load_identity, failure::Outcome, session::Session};

/// Show your public key, by which hosts know you
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_: &Args, session: &Session) -> Outcome {
    let stored = load_identity()?;
    super::Shown::new(stored.public(), stored.has_passphrase())?.show(session)
}
