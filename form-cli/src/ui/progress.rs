//! Progress: moving on a terminal, one plain line a step elsewhere, nothing with `-q`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use form_types::size::Bytes;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Paint, Terminal, printable, span};

/// A step that takes a while. Dropped without an end it vanishes from the terminal.
pub struct Step<'a> {
    terminal: &'a Terminal,
    text: String,
    bar: ProgressBar,
    begun: Instant,
}

/// Bytes on their way.
pub struct Bar {
    bar: ProgressBar,
}

/// Columns that a bar with all its figures needs.
const ROOMY: usize = 72;

impl Terminal {
    /// Says that a step begins.
    pub fn step(&self, text: impl Into<String>) -> Step<'_> {
        let text = printable(&text.into());
        let bar = self.progress.add(ProgressBar::new_spinner());
        // Cut off at the terminal's edge: what wraps cannot be taken away again cleanly.
        bar.set_style(ProgressStyle::with_template("{spinner} {wide_msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.set_message(text.clone());
        if self.progress.is_hidden() {
            self.note(&text);
        } else {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Step { terminal: self, text, bar, begun: Instant::now() }
    }

    /// Shows how much of `total` bytes has moved; its text has been said by a [`Step`] before.
    pub fn bar(&self, total: u64) -> Bar {
        let bar = self.progress.add(ProgressBar::new(total));
        let template = if self.error_width() < ROOMY {
            "  {wide_bar} {bytes}/{total_bytes}"
        } else {
            "  {bar:30} {bytes}/{total_bytes} {bytes_per_sec}"
        };
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Bar { bar }
    }
}

impl Step<'_> {
    /// A line of output below the step.
    pub fn line(&self, line: &str) {
        self.terminal.note(self.terminal.paint(Paint::Dim, &format!("  {}", printable(line))));
    }

    /// The step is done; `result` says with what, when that is worth a word.
    pub fn done(self, result: &str) {
        self.bar.finish_and_clear();
        let took = self.begun.elapsed();
        let time = if took < Duration::from_millis(500) { String::new() } else { format!(" ({})", span(took)) };
        if !self.terminal.progress.is_hidden() {
            let mark = self.terminal.paint(Paint::Green, "✓");
            let blank = if result.is_empty() { "" } else { " " };
            self.terminal.note(format!("{mark} {}{blank}{}{time}", self.text, printable(result)));
        } else if !result.is_empty() {
            // The step was said when it began; only what came of it is new.
            self.terminal.note(format!("  {}{time}", printable(result)));
        }
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Bar {
    pub fn handle(&self) -> ProgressBar {
        self.bar.clone()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// `1 block`, `3 blocks`.
pub fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// `stage=production, tier=front`.
pub fn labels(labels: &BTreeMap<String, String>) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", ")
}

/// A number of bytes in words.
pub fn bytes(number: u64) -> String {
    Bytes(number).to_string()
}
