//! The syntax tree: what is written, with its place, before it means anything.
//!
//! A `USER` line holds a password, so nothing here shows its text in its debug form.

use std::fmt;

use crate::{keyword::Keyword, span::Span};

#[derive(Clone, Debug, Default)]
pub struct File {
    pub items: Vec<Item>,
}

impl File {
    pub fn instructions(&self) -> impl Iterator<Item = &Instruction> {
        self.items.iter().filter_map(|item| match item {
            Item::Instruction(instruction) => Some(instruction),
            Item::Blank | Item::Comment(_) => None,
        })
    }
}

#[derive(Clone, Debug)]
pub enum Item {
    Blank,
    /// A comment on a line of its own, with its `#`.
    Comment(String),
    Instruction(Instruction),
}

#[derive(Clone, Debug)]
pub struct Instruction {
    pub keyword: Keyword,
    /// The word as written, which may be an alias.
    pub keyword_span: Span,
    /// From the keyword to the end of the last continued line, without comment and heredocs.
    pub span: Span,
    /// The line of the keyword, counted from 1.
    pub line: u32,
    pub body: Body,
    pub heredocs: Vec<Heredoc>,
    pub layout: Layout,
}

#[derive(Clone, Debug)]
pub enum Body {
    /// Words, options (`--name=value`) first.
    Words(Vec<Word>),
    /// Text as written.
    Text(Text),
    /// A JSON array of strings, after options.
    Json { options: Vec<Word>, words: Vec<String>, span: Span },
    /// A text for a shell, after options. For a heredoc alone (`RUN <<EOF`) it is the heredoc's text.
    Shell { options: Vec<Word>, text: Text },
}

/// A word with its quotes, as written.
#[derive(Clone)]
pub struct Word {
    pub raw: String,
    pub span: Span,
    /// Which of the continued lines it begins in, counted from 0.
    pub row: usize,
}

#[derive(Clone)]
pub struct Text {
    pub text: String,
    pub span: Span,
}

impl fmt::Debug for Word {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Word({}..{})", self.span.start, self.span.end)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Text({}..{})", self.span.start, self.span.end)
    }
}

#[derive(Clone)]
pub struct Heredoc {
    /// The word that ends it.
    pub delimiter: String,
    /// A quoted delimiter: nothing in the text is expanded.
    pub quoted: bool,
    /// `<<-`: tabs at the start of a line are dropped.
    pub strip_tabs: bool,
    /// The lines between, each ended by a line feed, tabs dropped where `<<-` says so.
    pub text: String,
    /// The lines as written, the delimiter's included.
    pub lines: Vec<String>,
    pub span: Span,
}

impl fmt::Debug for Heredoc {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Heredoc({}, {}..{})", self.delimiter, self.span.start, self.span.end)
    }
}

/// How an instruction lies on its lines: what the formatter keeps.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// The text of each continued line without its `\`; the first without the keyword.
    pub rows: Vec<Text>,
    /// Comments between continued lines, with the row that each stands before.
    pub comments: Vec<(usize, String)>,
    /// A comment at the end of the last line, with its `#`.
    pub trailing_comment: Option<String>,
}
