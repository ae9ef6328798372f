//! The Formfile language: a text that says what one instance is, read into a [`Spec`].
//!
//! [`parse`] gives the syntax tree, [`check`] the meaning, [`format`] the canonical layout. All three report every fault
//! they find, each with its place and a hint. Nothing here reads a file, looks at the machine, or keeps a password anywhere
//! but in [`form_types::spec::Secret`]. The language is described in `docs/formfile.md`.

#![forbid(unsafe_code)]

pub mod ast;
mod check;
mod diagnostic;
mod expand;
mod format;
mod keyword;
mod lex;
mod lower;
mod parse;
mod redact;
mod span;
mod word;

use std::collections::BTreeMap;

use form_types::Spec;

use crate::{diagnostic::Fault, span::Span as ByteSpan};
pub use crate::{
    diagnostic::{Code, Diagnostic, Related, Renderer, Severity, Style},
    keyword::Keyword,
    span::{LineIndex, Position, Span},
};

/// A syntax tree with what was wrong on the way to it.
#[derive(Debug)]
pub struct Parsed {
    pub file: ast::File,
    pub diagnostics: Vec<Diagnostic>,
}

/// What a file means, with everything that is wrong or doubtful in it, ordered by place.
#[derive(Debug)]
pub struct Checked {
    /// `None` exactly when a diagnostic is an error.
    pub spec: Option<Spec>,
    pub diagnostics: Vec<Diagnostic>,
}

/// What the meaning of a file depends on besides its text.
#[derive(Clone, Debug, Default)]
pub struct LowerOptions {
    /// Values for `ARG`s, as `--build-arg` gives them.
    pub build_args: BTreeMap<String, String>,
}

/// Reads the syntax of a Formfile. Values are not looked at.
pub fn parse(source: &str) -> Parsed {
    let mut faults = Vec::new();
    let file = parse::parse(source, &mut faults);
    Parsed { file, diagnostics: diagnostic::locate(source, faults) }
}

/// Reads a Formfile, checks all of it and says what it means. `file_name` tells a stack (`*.yaml`) from a Formfile.
pub fn check(file_name: &str, source: &str, options: &LowerOptions) -> Checked {
    let mut faults = Vec::new();
    let spec = if is_yaml(file_name) {
        faults.push(parse::stack_unsupported(ByteSpan::default()));
        None
    } else {
        let file = parse::parse(source, &mut faults);
        check::check(&file, source, &mut faults);
        lower::lower(&file, options, &mut faults)
    };
    let wrong = faults.iter().any(|fault: &Fault| fault.severity == Severity::Error);
    Checked { spec: spec.filter(|_| !wrong), diagnostics: diagnostic::locate(source, faults) }
}

/// Rewrites a Formfile in the canonical layout. The result means the same, and formatting it again changes nothing.
///
/// # Errors
/// The faults (warnings among them) when the text is no Formfile: a text that cannot be read cannot be laid out.
pub fn format(source: &str) -> Result<String, Vec<Diagnostic>> {
    let mut faults = Vec::new();
    let file = parse::parse(source, &mut faults);
    if faults.iter().any(|fault| fault.severity == Severity::Error) {
        return Err(diagnostic::locate(source, faults));
    }
    Ok(format::format(&file))
}

fn is_yaml(file_name: &str) -> bool {
    let lower = file_name.to_ascii_lowercase();
    lower.ends_with(".yaml") || lower.ends_with(".yml")
}
