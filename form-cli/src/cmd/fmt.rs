use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    failure::{Failure, Outcome},
    formfile_source::Source,
    session::Session,
};

/// Rewrite a Formfile in the usual layout
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The Formfile, its directory, or - to go from standard input to standard output
    #[arg(value_name = "FILE", default_value = ".")]
    file: PathBuf,
    /// Change nothing; exit 1 when something would change
    #[arg(long)]
    check: bool,
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    let source = Source::read(&args.file)?;
    let formatted = match formfile::format(&source.text) {
        Ok(formatted) => formatted,
        Err(diagnostics) => {
            source.show(&diagnostics, session);
            return Err(source.faulty(&diagnostics));
        }
    };
    let terminal = &session.terminal;
    let changes = formatted != source.text;
    if args.check {
        if changes {
            terminal.print(format!("{}\n", source.display_name()));
            terminal.note(format!("`form fmt {}` would change it", source.path.display()));
        }
        return Ok(u8::from(changes));
    }
    if source.path == Path::new("-") {
        terminal.print(formatted);
    } else if changes {
        write_beside(&source.path, &formatted)?;
        terminal.print(format!("{}\n", source.display_name()));
    }
    Ok(0)
}

/// A crash leaves the old text or the new one, never half, and the file keeps its permissions.
fn write_beside(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::io("write", path, &error);
    // A link stays a link: what it points to is rewritten.
    let path = &fs::canonicalize(path).map_err(failed)?;
    let permissions = fs::metadata(path).map_err(failed)?.permissions();
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut fresh = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    std::io::Write::write_all(&mut fresh, text.as_bytes()).map_err(failed)?;
    fresh.as_file().set_permissions(permissions).map_err(failed)?;
    fresh.as_file().sync_all().map_err(failed)?;
    fresh.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}
