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
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    if args.force && identity_path()?.exists() {
        session.terminal.confirm("Replace your key? Hosts that know it will no longer know you.")?;
    }
    super::Shown::new(create_identity(args.force)?.public())?.show(session)
}
