use std::{collections::BTreeMap, path::PathBuf};

use serde::Serialize;

use crate::{failure::Outcome, formfile_source::Source, session::Session, ui::Format};

/// Check a Formfile and say what is wrong with it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The Formfile, its directory, or - for standard input
    #[arg(value_name = "FILE", default_value = ".")]
    file: PathBuf,
}

#[derive(Serialize)]
struct Faults<'a> {
    diagnostics: &'a [formfile::Diagnostic],
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    let source = Source::read(&args.file)?;
    let checked = source.check(BTreeMap::new());
    let terminal = &session.terminal;
    if terminal.is_machine_readable() {
        return match &checked.spec {
            Some(spec) => terminal.data(spec).map(|()| 0),
            None => terminal.data(&Faults { diagnostics: &checked.diagnostics }).map(|()| 1),
        };
    }
    source.show(&checked.diagnostics, session);
    let Some(spec) = checked.spec else { return Err(source.faulty(&checked.diagnostics)) };
    match terminal.format() {
        Format::Name => terminal.print(format!("{}\n", spec.name)),
        _ if terminal.is_quiet() => {}
        _ => terminal.print(format!("{}: {} is fine\n", source.display_name(), spec.name)),
    }
    Ok(0)
}
