use crate::{
    context::{create_identity, identity_path},
    failure::Outcome,
    session::Session,
};

/// Make your key
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Replace the key that is there for good: hosts that know it no longer know you
    #[arg(long)]
    force: bool,
    /// Seal it under a passphrase, which is then needed for every command that talks to a host over the network
    #[arg(long)]
    passphrase: bool,
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    if args.force && identity_path()?.exists() {
        session.terminal.confirm("Replace your key? Hosts that know it will no longer know you.")?;
    }
    let passphrase = session.passphrase();
    let public = create_identity(args.force, args.passphrase.then_some(&passphrase))?;
    super::Shown::new(public, args.passphrase)?.show(session)
}
