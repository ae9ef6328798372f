use std::path::PathBuf;

use crate::{
    context::{PassphraseSource, load_identity, rewrite_identity},
    failure::{Failure, Outcome},
    session::Session,
};

/// Give your key a passphrase, change it, or take it off
#[derive(Debug, clap::Args)]
#[command(after_help = "Off a terminal the passphrase that the key has comes from --passphrase-file or FORM_PASSPHRASE, the new one from \
                        --new-passphrase-file or FORM_NEW_PASSPHRASE.")]
pub struct Args {
    /// Take the passphrase off: the key is then in the file for whoever can read it
    #[arg(long, conflicts_with = "new_passphrase_file")]
    remove: bool,
    /// A file with the new passphrase in its first line
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    new_passphrase_file: Option<PathBuf>,
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    let stored = load_identity()?;
    if args.remove && !stored.has_passphrase() {
        return Err(Failure::new(form_api::ErrorCode::Conflict, "your key has no passphrase").hint("`form key passphrase` gives it one"));
    }
    let key = stored.unlock(&session.passphrase())?;
    let new = PassphraseSource {
        file: args.new_passphrase_file.clone(),
        flag: "--new-passphrase-file",
        variable: "FORM_NEW_PASSPHRASE",
        terminal: Some(&session.terminal),
    };
    rewrite_identity(&key, (!args.remove).then_some(&new))?;
    super::Shown::new(key.public(), !args.remove)?.show(session)
}
