//! Faults in a Formfile, with the place, a code that tools can match, and what to do.

use std::fmt::{self, Write as _};

use serde::Serialize;

use crate::{
    redact::Redacted,
    span::{LineIndex, Span},
};

/// What kind of fault it is. The words are stable: tools may match them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The file as a whole is larger than any Formfile.
    TooLarge,
    /// More faults than are shown.
    TooMany,
    /// A stack in YAML.
    StackUnsupported,
    UnknownKeyword,
    UnknownOption,
    UnknownField,
    MissingName,
    MissingArgument,
    TooManyArguments,
    UnclosedQuote,
    UnclosedHeredoc,
    ControlCharacter,
    /// `\` at the end of a line that nothing follows.
    DanglingContinuation,
    /// A blank line inside a continued instruction.
    EmptyContinuation,
    /// An instruction or field that may be given once.
    Repeated,
    /// A later instruction takes the place of this one's.
    Overridden,
    /// `FROM` after a build step.
    Order,
    InvalidName,
    InvalidNumber,
    OutOfRange,
    InvalidSize,
    InvalidDuration,
    InvalidPath,
    InvalidValue,
    InvalidJson,
    /// `$NAME` that nothing defines, or a `${…}` that cannot be read.
    Variable,
    /// A `--build-arg` that no `ARG` takes.
    UnusedBuildArg,
    /// Two ports, volumes or devices that cannot both be had.
    Conflict,
    /// Something that is not used as it stands.
    Ineffective,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Error,
    Warning,
}

impl fmt::Display for Code {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

/// One fault. Lines and columns count from 1, columns in characters; the end is the place just behind the last character.
///
/// Its JSON has exactly the keys `code severity message line column end_line end_column hint`. No message or hint ever
/// holds a password.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    pub code: Code,
    pub severity: Severity,
    pub message: String,
    pub line: u32,
    pub column: u32,
    pub end_line: u32,
    pub end_column: u32,
    /// What to do about it.
    pub hint: Option<String>,
    /// Other places that have to do with it, such as the first of two instructions.
    #[serde(skip)]
    pub related: Vec<Related>,
}

/// Another place that has to do with a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Related {
    pub message: String,
    pub line: u32,
    pub column: u32,
    pub end_line: u32,
    pub end_column: u32,
}

impl Diagnostic {
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// A fault before its place is counted in lines.
#[derive(Clone)]
pub(crate) struct Fault {
    pub(crate) code: Code,
    pub(crate) severity: Severity,
    pub(crate) message: String,
    pub(crate) span: Span,
    pub(crate) hint: Option<String>,
    pub(crate) related: Vec<(Span, String)>,
}

impl Fault {
    pub(crate) fn error(code: Code, span: Span, message: impl Into<String>) -> Self {
        Self { code, severity: Severity::Error, message: message.into(), span, hint: None, related: Vec::new() }
    }

    pub(crate) fn warning(code: Code, span: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, span, message) }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn related(mut self, span: Span, message: impl Into<String>) -> Self {
        self.related.push((span, message.into()));
        self
    }
}

/// The most faults that one file reports: beyond it people stop reading, and a hostile file costs no more.
const MOST: usize = 100;

/// Orders faults by their place and counts their lines.
pub(crate) fn locate(source: &str, mut faults: Vec<Fault>) -> Vec<Diagnostic> {
    faults.sort_by_key(|fault| (fault.span, fault.severity));
    if faults.len() > MOST {
        let left = faults.len() - MOST;
        // Errors decide what is wrong with the file; warnings give way to them.
        let (errors, warnings): (Vec<_>, Vec<_>) = faults.into_iter().partition(|fault| fault.severity == Severity::Error);
        let more = if errors.len() > MOST { Fault::error } else { Fault::warning };
        faults = errors.into_iter().chain(warnings).take(MOST).collect();
        faults.sort_by_key(|fault| (fault.span, fault.severity));
        let end = Span::new(source.len(), source.len());
        faults.push(more(Code::TooMany, end, format!("{left} more faults are not shown")).hint("mend those above first"));
    }
    let index = LineIndex::new(source);
    let place = |span: Span| (index.position(span.start), index.position(span.end.max(span.start)));
    faults
        .into_iter()
        .map(|fault| {
            let (start, end) = place(fault.span);
            let related = fault.related.into_iter().map(|(span, message)| {
                let (start, end) = place(span);
                Related { message, line: start.line, column: start.column, end_line: end.line, end_column: end.column }
            });
            Diagnostic {
                code: fault.code,
                severity: fault.severity,
                message: fault.message,
                line: start.line,
                column: start.column,
                end_line: end.line,
                end_column: end.column,
                hint: fault.hint,
                related: related.collect(),
            }
        })
        .collect()
}

/// How a rendered diagnostic is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    #[default]
    Plain,
    /// ANSI colours, for a terminal.
    Ansi,
}

impl Style {
    fn paint(self, code: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Ansi => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
        }
    }
}

/// Renders diagnostics of one file for people: message, place, the line with the fault underlined, hint.
///
/// Passwords in the shown lines are replaced by `*`.
pub struct Renderer<'a> {
    file_name: &'a str,
    index: LineIndex<'a>,
    redacted: Redacted,
    style: Style,
}

const RED: &str = "1;31";
const YELLOW: &str = "1;33";
const BLUE: &str = "1;34";
const BOLD: &str = "1";

impl<'a> Renderer<'a> {
    pub fn new(file_name: &'a str, source: &'a str, style: Style) -> Self {
        Self { file_name, index: LineIndex::new(source), redacted: Redacted::new(source), style }
    }

    /// Several lines, each ended by a line feed.
    pub fn render(&self, diagnostic: &Diagnostic) -> String {
        let colour = if diagnostic.is_error() { RED } else { YELLOW };
        let head = self.style.paint(colour, &format!("{}[{}]", diagnostic.severity, diagnostic.code));
        let mut out = format!("{head}{}\n", self.style.paint(BOLD, &format!(": {}", diagnostic.message)));
        let last = diagnostic.related.iter().map(|related| related.line).max().unwrap_or(0).max(diagnostic.line);
        let width = last.to_string().len();
        self.place(&mut out, width, (diagnostic.line, diagnostic.column), (diagnostic.end_line, diagnostic.end_column), colour, "");
        for related in &diagnostic.related {
            let (start, end) = ((related.line, related.column), (related.end_line, related.end_column));
            self.place(&mut out, width, start, end, BLUE, &related.message);
        }
        if let Some(hint) = &diagnostic.hint {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{} {} {hint}", " ".repeat(width), self.style.paint(BLUE, "= hint:"));
        }
        out
    }

    fn place(&self, out: &mut String, width: usize, start: (u32, u32), end: (u32, u32), colour: &str, note: &str) {
        let pad = " ".repeat(width);
        let bar = self.style.paint(BLUE, "|");
        let _ = writeln!(out, "{pad}{} {}:{}:{}", self.style.paint(BLUE, "-->"), self.file_name, start.0, start.1);
        let (text, at) = (self.index.line(start.0), self.index.line_span(start.0).start);
        let length = text.chars().count();
        let first = (start.1 as usize).saturating_sub(1).min(length);
        let behind = if end.0 > start.0 { length } else { (end.1 as usize).saturating_sub(1) };
        let behind = behind.clamp(first, length);
        let (from, to) = window(first, behind, length);
        let (lead, tail) = (if from > 0 { "…" } else { "" }, if to < length { "…" } else { "" });
        let byte = |column: usize| text.char_indices().nth(column).map_or(text.len(), |(byte, _)| byte);
        let part = &text[byte(from)..byte(to)];
        let shown: String = self.redacted.line(at + byte(from), part).chars().map(printable).collect();
        let number = self.style.paint(BLUE, &format!("{:>width$} |", start.0));
        let _ = writeln!(out, "{pad} {bar}\n{number} {lead}{shown}{tail}");
        let indent = " ".repeat(first - from + lead.chars().count());
        let carets = "^".repeat((behind.min(to) - first).max(1));
        let note = if note.is_empty() { String::new() } else { format!(" {note}") };
        let _ = writeln!(out, "{pad} {bar} {indent}{}", self.style.paint(colour, &format!("{carets}{note}")));
    }
}

/// The part of a line to show: all of it, or for a very long one the part around the fault.
fn window(first: usize, behind: usize, length: usize) -> (usize, usize) {
    const WIDEST: usize = 160;
    const BEFORE: usize = 40;
    if length <= WIDEST {
        return (0, length);
    }
    let from = if behind <= WIDEST { 0 } else { first.saturating_sub(BEFORE) };
    (from, (from + WIDEST).min(length))
}

/// A tab keeps its one column, and nothing in a file may steer the terminal.
fn printable(character: char) -> char {
    match character {
        '\t' => ' ',
        // Characters that turn the direction of the text round could make a line look like another one.
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        character if character.is_control() => '\u{fffd}',
        character => character,
    }
}
