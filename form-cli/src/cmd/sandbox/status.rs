use std::time::Duration;

use form_api::client::Timeouts;

use super::{Report, Which, incomplete};
use crate::{
    context::{ConfigFile, Target},
    failure::{Failure, Outcome},
    sandbox::{self, Record, State},
    session::Session,
};

/// Show whether a sandbox runs, and what it uses
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
}

/// Who only looks does not wait long.
const TIMEOUTS: Timeouts = Timeouts { connect: Duration::from_secs(2), request: Duration::from_secs(5), deadline: None };

pub async fn run(args: Args, session: &Session) -> Outcome {
    let name = args.which.name;
    let directory = sandbox::directory(&ConfigFile::load()?.config, &name)?;
    if !directory.exists() {
        return Err(Failure::not_found(format!("there is no sandbox `{name}`")).hint("`form sandbox up` makes one"));
    }
    let record = Record::load(&directory)?.ok_or_else(|| incomplete(&name))?;
    let runs = State::of(&directory).process().is_some();
    let answers = runs && session.connect(&Target::Remote(record.known_host(&name)?), TIMEOUTS)?.host().await.is_ok();
    let report = Report::new(&name, directory, &record, answers);
    session.terminal.show(&report, &report.record())?;
    if !runs && !session.terminal.is_machine_readable() {
        session.terminal.note("`form sandbox up` starts it with its disk; `form sandbox down` removes it.");
    }
    Ok(0)
}
