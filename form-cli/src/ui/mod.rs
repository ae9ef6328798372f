//! The terminal: the only code that writes to it or reads from it.
//!
//! Data goes to standard output, everything else to standard error. Who reads data into a pipe and closes it (`| head`) has seen
//! enough: the program ends quietly.

mod ask;
mod duration;
mod progress;
mod raw;
mod record;
mod table;

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
};

use clap::ValueEnum;
use form_api::error::ErrorBody;
use indicatif::{MultiProgress, ProgressDrawTarget};
use serde::Serialize;

pub use self::{
    duration::{age, span},
    progress::{Bar, Step, bytes, count, labels},
    record::Record,
    table::Table,
};
use crate::failure::{Failure, Tail};

/// How data is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    // Columns for people
    #[default]
    Table,
    // More columns
    Wide,
    // One JSON document
    Json,
    // The same as YAML
    Yaml,
    // Names alone, one a line
    Name,
}

/// What the user wants of the output.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    pub format: Format,
    pub quiet: bool,
    pub no_header: bool,
    pub yes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
}

impl Paint {
    const fn code(self) -> &'static str {
        match self {
            Self::Bold => "1",
            Self::Dim => "2",
            Self::Red => "1;31",
            Self::Green => "32",
            Self::Yellow => "33",
        }
    }
}

/// Columns that lines are laid out for when nobody says how wide the terminal is.
const DEFAULT_WIDTH: usize = 120;

pub struct Terminal {
    wishes: Wishes,
    /// Columns of the terminal that shows standard output; `None` for a file or a pipe.
    width: Option<usize>,
    colour_out: bool,
    colour_err: bool,
    progress: MultiProgress,
}

impl Terminal {
    pub fn new(wishes: Wishes) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let plain = dumb || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let width = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok()).or_else(|| {
            let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
            (size.ws_col > 0).then_some(usize::from(size.ws_col))
        });
        let live = io::stderr().is_terminal() && !dumb && !wishes.quiet;
        let target = if live { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self {
            wishes,
            width,
            colour_out: io::stdout().is_terminal() && !plain,
            colour_err: io::stderr().is_terminal() && !plain,
            progress: MultiProgress::with_draw_target(target),
        }
    }

    /// Columns of the terminal that shows standard error, where progress is drawn.
    fn error_width(&self) -> usize {
        rustix::termios::tcgetwinsize(io::stderr())
            .ok()
            .filter(|size| size.ws_col > 0)
            .map_or(DEFAULT_WIDTH, |size| usize::from(size.ws_col))
    }

    pub const fn format(&self) -> Format {
        self.wishes.format
    }

    pub const fn is_machine_readable(&self) -> bool {
        matches!(self.wishes.format, Format::Json | Format::Yaml)
    }

    pub const fn is_quiet(&self) -> bool {
        self.wishes.quiet
    }

    /// Text in a colour, where standard error shows colours.
    pub fn paint(&self, paint: Paint, text: &str) -> String {
        if self.colour_err { format!("\u{1b}[{}m{text}\u{1b}[0m", paint.code()) } else { text.to_owned() }
    }

    /// Text in a colour, where standard output shows colours.
    pub fn paint_data(&self, paint: Paint, text: &str) -> String {
        if self.colour_out { format!("\u{1b}[{}m{text}\u{1b}[0m", paint.code()) } else { text.to_owned() }
    }

    pub const fn colours_errors(&self) -> bool {
        self.colour_err
    }

    /// Whether a person sits at standard input and can be asked.
    pub fn can_ask(&self) -> bool {
        io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// Writes data as it is.
    pub fn print(&self, text: impl Display) {
        self.print_bytes(text.to_string().as_bytes());
    }

    /// Writes data as it is; ends the program when nobody reads on.
    pub fn print_bytes(&self, bytes: &[u8]) {
        let written = self.progress.suspend(|| {
            let mut out = io::stdout().lock();
            out.write_all(bytes).and_then(|()| out.flush())
        });
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            Err(error) => {
                self.error_line(&format!("cannot write to standard output: {error}"));
                std::process::exit(1);
            }
        }
    }

    /// Writes bytes that are the other side's own error output.
    pub fn print_error_bytes(&self, bytes: &[u8]) {
        // There is nowhere left to say that standard error is closed.
        let _ = self.progress.suspend(|| io::stderr().lock().write_all(bytes));
    }

    fn error_line(&self, text: &str) {
        self.print_error_bytes(format!("{text}\n").as_bytes());
    }

    /// Says something beside the data, unless `-q`.
    pub fn note(&self, text: impl Display) {
        if !self.wishes.quiet {
            self.error_line(&text.to_string());
        }
    }

    /// Says something that should not be missed.
    pub fn warn(&self, text: impl Display) {
        self.error_line(&format!("{} {text}", self.paint(Paint::Yellow, "warning:")));
    }

    /// Writes a list in the wished format: `items` for programs, `table` for people.
    pub fn list<T: Serialize>(&self, items: &[T], table: &Table) -> Result<(), Failure> {
        if self.wishes.quiet && !self.is_machine_readable() {
            self.print(table.names());
            return Ok(());
        }
        match self.wishes.format {
            Format::Json | Format::Yaml => self.data(&items)?,
            Format::Name => self.print(table.names()),
            format => self.print(table.render(format == Format::Wide, !self.wishes.no_header, self.width)),
        }
        Ok(())
    }

    /// Writes a list again and again: on a terminal in the place of the one before, elsewhere one after another; for programs an item a
    /// line, as a stream.
    ///
    /// # Errors
    /// When an item has no JSON form.
    pub fn repaint<T: Serialize>(&self, items: &[T], table: &Table) -> Result<(), Failure> {
        if self.is_machine_readable() {
            return items.iter().try_for_each(|item| self.stream_item(item, String::new));
        }
        if io::stdout().is_terminal() {
            // Home, and clear what is below (ECMA-48, CUP and ED).
            self.print("\u{1b}[H\u{1b}[J");
        }
        self.list(items, table)
    }

    /// Writes one thing in the wished format.
    pub fn show<T: Serialize>(&self, item: &T, record: &Record) -> Result<(), Failure> {
        match self.wishes.format {
            Format::Json | Format::Yaml => self.data(item)?,
            Format::Name => self.print(format!("{}\n", record.name())),
            format => self.print(record.render(format == Format::Wide, self.width.unwrap_or(DEFAULT_WIDTH))),
        }
        Ok(())
    }

    /// Reports what was done to one thing: a sentence for people, the thing itself for programs.
    pub fn done<T: Serialize>(&self, item: &T, name: &str, sentence: &str) -> Result<(), Failure> {
        match self.wishes.format {
            Format::Json | Format::Yaml => self.data(item)?,
            Format::Name => self.print(format!("{name}\n")),
            _ if self.wishes.quiet => self.print(format!("{name}\n")),
            _ => self.print(format!("{sentence}\n")),
        }
        Ok(())
    }

    /// One value of a stream: a line of JSON, a YAML document, or the text of `line`.
    pub fn stream_item<T: Serialize>(&self, item: &T, line: impl FnOnce() -> String) -> Result<(), Failure> {
        match self.wishes.format {
            Format::Json => {
                let json = serde_json::to_string(item).map_err(|error| Failure::failed(format!("no JSON form: {error}")))?;
                self.print(format!("{json}\n"));
            }
            Format::Yaml => self.print(format!("---\n{}", yaml(item)?)),
            _ => self.print(format!("{}\n", line())),
        }
        Ok(())
    }

    /// Writes a value as JSON, or as YAML where that is wished.
    pub fn data<T: Serialize>(&self, value: &T) -> Result<(), Failure> {
        if self.wishes.format == Format::Yaml {
            self.print(yaml(value)?);
        } else {
            let json = serde_json::to_string_pretty(value).map_err(|error| Failure::failed(format!("no JSON form: {error}")))?;
            self.print(format!("{json}\n"));
        }
        Ok(())
    }

    /// Reports why the program fails: for people in lines, with `-o json` as JSON, always on standard error.
    pub fn failure(&self, failure: &Failure) {
        if let Some(Tail { title, lines }) = failure.tail.as_ref().filter(|_| self.wishes.format != Format::Json) {
            self.error_line(&self.paint(Paint::Dim, &format!("--- {title}")));
            for line in lines {
                self.error_line(&format!("  {}", printable(line)));
            }
            self.error_line(&self.paint(Paint::Dim, "---"));
        }
        if self.wishes.format == Format::Json {
            let body = ErrorBody { error: failure.error.clone() };
            self.error_line(&serde_json::to_string(&body).unwrap_or_else(|_| failure.error.message.clone()));
            return;
        }
        self.error_line(&format!("{} {}", self.paint(Paint::Red, "error:"), printable(&failure.error.message)));
        if let Some(hint) = &failure.error.hint {
            self.error_line(&format!("{} {}", self.paint(Paint::Bold, "hint:"), printable(hint)));
        }
        if let Some(operation) = &failure.error.operation {
            self.error_line(&format!("operation: {operation}"));
        }
    }
}

fn yaml<T: Serialize>(value: &T) -> Result<String, Failure> {
    serde_yaml::to_string(value).map_err(|error| Failure::failed(format!("no YAML form: {error}")))
}

/// Text from elsewhere without what would move the cursor or change colours.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|character| if character.is_control() && character != '\n' && character != '\t' { '\u{fffd}' } else { character })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_of_a_guest_do_nothing() {
        assert_eq!(printable("a\u{1b}[2Jb\r\tc\nd"), "a\u{fffd}[2Jb\u{fffd}\tc\nd");
    }
}
