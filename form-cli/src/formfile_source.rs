//! Finding a Formfile, reading it, and saying what is wrong with it.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use form_api::ErrorCode;
use form_types::Spec;
use formfile::{Checked, Diagnostic, LowerOptions, Renderer, Style};

use crate::{failure::Failure, session::Session, ui};

/// What a Formfile is called when only its directory is named.
pub const FILE_NAME: &str = "Formfile";

/// No Formfile is larger; a larger file is something else.
const MAX_BYTES: u64 = 4 << 20;

/// A Formfile's text, and where it came from.
#[derive(Debug)]
pub struct Source {
    /// `-` for standard input.
    pub path: PathBuf,
    pub text: String,
}

impl Source {
    /// Reads `path`, the `Formfile` in it when it is a directory, or standard input for `-`.
    ///
    /// # Errors
    /// When there is no such file, or it is no text.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        if path == Path::new("-") {
            let text = read_text(io::stdin().lock(), path)?;
            return Ok(Self { path: path.to_owned(), text });
        }
        let path = if path.is_dir() { in_directory(path) } else { path.to_owned() };
        let file = fs::File::open(&path).map_err(|error| {
            let failure = Failure::io("read", &path, &error);
            if error.kind() == io::ErrorKind::NotFound { failure.hint("`form init` writes a Formfile") } else { failure }
        })?;
        let text = read_text(file, &path)?;
        Ok(Self { path, text })
    }

    /// The directory that `COPY` reads from.
    pub fn context(&self) -> PathBuf {
        match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        }
    }

    pub fn display_name(&self) -> String {
        if self.path == Path::new("-") { "<stdin>".to_owned() } else { self.path.display().to_string() }
    }

    pub fn check(&self, build_args: BTreeMap<String, String>) -> Checked {
        formfile::check(&self.display_name(), &self.text, &LowerOptions { build_args })
    }

    /// The meaning of the file. Warnings are shown; with errors the program ends with them.
    ///
    /// # Errors
    /// When the file has faults.
    pub fn spec(&self, build_args: BTreeMap<String, String>, session: &Session) -> Result<Spec, Failure> {
        let checked = self.check(build_args);
        self.show(&checked.diagnostics, session);
        checked.spec.ok_or_else(|| self.faulty(&checked.diagnostics))
    }

    /// Shows diagnostics on standard error, with the lines they are about.
    pub fn show(&self, diagnostics: &[Diagnostic], session: &Session) {
        let name = self.display_name();
        let style = if session.terminal.colours_errors() { Style::Ansi } else { Style::Plain };
        let renderer = Renderer::new(&name, &self.text, style);
        for diagnostic in diagnostics.iter().filter(|diagnostic| diagnostic.is_error() || !session.terminal.is_quiet()) {
            session.terminal.print_error_bytes(renderer.render(diagnostic).as_bytes());
        }
    }

    pub fn faulty(&self, diagnostics: &[Diagnostic]) -> Failure {
        let errors = diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count();
        Failure::failed(format!("{} has {}", self.display_name(), ui::count(errors, "error")))
    }
}

/// The Formfile of a directory; for the present one without `./`.
pub fn in_directory(directory: &Path) -> PathBuf {
    if directory == Path::new(".") { FILE_NAME.into() } else { directory.join(FILE_NAME) }
}

fn read_text(input: impl Read, path: &Path) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    input.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| Failure::io("read", path, &error))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Failure::new(ErrorCode::Failed, format!("{} is larger than {}: no Formfile is", path.display(), ui::bytes(MAX_BYTES))));
    }
    String::from_utf8(bytes).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        Failure::new(ErrorCode::Failed, format!("{} is no text: byte {place} is not UTF-8", path.display()))
    })
}
