//! Lines: comments, continuations and heredocs taken apart, each instruction's lines put together.

use crate::{
    ast::{Heredoc, Text},
    diagnostic::{Code, Fault},
    keyword::{self, Keyword, Mode},
    span::{BOM, Span},
    word::{self, Quotes},
};

/// One line of the file, or the lines of one instruction.
pub(crate) enum Line {
    Blank,
    Comment(Span),
    Instruction(Logical),
}

/// The lines of one instruction.
pub(crate) struct Logical {
    /// The keyword, or what the nearest one to an unknown word would be.
    pub(crate) keyword: Option<Keyword>,
    pub(crate) keyword_span: Span,
    pub(crate) line: u32,
    /// The arguments, with the continued lines joined.
    pub(crate) joined: Joined,
    pub(crate) rows: Vec<Span>,
    pub(crate) comments: Vec<(usize, Span)>,
    pub(crate) trailing_comment: Option<Span>,
    pub(crate) heredocs: Vec<Heredoc>,
}

/// Rows joined to one text, which still knows where in the source each part stood.
#[derive(Default)]
pub(crate) struct Joined {
    pub(crate) text: String,
    /// For each row: where it begins in `text`, and in the source.
    rows: Vec<(usize, usize)>,
}

impl Joined {
    fn push(&mut self, source: &str, span: Span) {
        self.rows.push((self.text.len(), span.start));
        self.text.push_str(&source[span.start..span.end]);
    }

    /// The row that the byte `offset` of the text stands in, counted from 0.
    pub(crate) fn row(&self, offset: usize) -> usize {
        self.rows.partition_point(|(start, _)| *start <= offset).saturating_sub(1)
    }

    /// Whether the text from `offset` on goes over the end of a row.
    pub(crate) fn is_continued(&self, offset: usize) -> bool {
        self.row(offset) + 1 < self.rows.len()
    }

    fn place(&self, offset: usize) -> usize {
        self.rows.get(self.row(offset)).map_or(0, |(start, source)| source + (offset - start))
    }

    /// The place in the source of a part of the text.
    pub(crate) fn span(&self, start: usize, end: usize) -> Span {
        // The end belongs to the row of the last byte, not to the one that begins there.
        let behind = if end > start { self.place(end - 1) + 1 } else { self.place(start) };
        Span::new(self.place(start), behind)
    }
}

/// Splits a source into lines. Never fails: what is wrong goes to `faults`.
pub(crate) fn lex(source: &str, faults: &mut Vec<Fault>) -> Vec<Line> {
    let mut lexer = Lexer { source, at: if source.starts_with(BOM) { BOM.len() } else { 0 }, number: 0, faults };
    let mut lines = Vec::new();
    while let Some(physical) = lexer.next_line() {
        let trimmed = trim(source, physical);
        let text = &source[trimmed.start..trimmed.end];
        lines.push(match text.chars().next() {
            None => Line::Blank,
            Some('#') => Line::Comment(trimmed),
            Some(_) => Line::Instruction(lexer.instruction(trimmed)),
        });
    }
    lines
}

struct Lexer<'a, 'f> {
    source: &'a str,
    at: usize,
    /// Lines read so far.
    number: u32,
    faults: &'f mut Vec<Fault>,
}

impl Lexer<'_, '_> {
    /// The next line without its end.
    fn next_line(&mut self) -> Option<Span> {
        if self.at >= self.source.len() {
            return None;
        }
        let rest = &self.source[self.at..];
        let length = rest.find('\n').unwrap_or(rest.len());
        let start = self.at;
        self.at = (start + length + 1).min(self.source.len());
        self.number = self.number.saturating_add(1);
        Some(Span::new(start, start + rest[..length].trim_end_matches('\r').len()))
    }

    fn instruction(&mut self, first: Span) -> Logical {
        let line = self.number;
        let (content, mut continued) = continuation(self.source, first);
        let content_text = &self.source[content.start..content.end];
        let length = content_text.find(is_blank).unwrap_or(content_text.len());
        // A backslash alone continues nothing: it is the (unknown) keyword itself.
        let keyword_span = if length == 0 { first } else { Span::new(content.start, content.start + length) };
        continued &= length > 0;
        let word = &self.source[keyword_span.start..keyword_span.end];
        let keyword = Keyword::parse(word).or_else(|| keyword::guess(word).keyword);
        let mode = keyword.map_or(Mode::Shell, Keyword::mode);
        let mut row = skip_blanks(self.source, Span::new(keyword_span.end, content.end.max(keyword_span.end)));
        let mut quotes = Quotes::new(mode, &self.source[row.start..row.end]);
        let mut logical = Logical {
            keyword,
            keyword_span,
            line,
            joined: Joined::default(),
            rows: Vec::new(),
            comments: Vec::new(),
            trailing_comment: None,
            heredocs: Vec::new(),
        };
        loop {
            // The comment's own backslash, if it ends in one, belongs to the comment.
            let whole = if continued { Span::new(row.start, self.end_of_line(row)) } else { row };
            if mode != Mode::Shell
                && let Some(start) = quotes.comment(&self.source[row.start..row.end])
            {
                logical.trailing_comment = Some(trim(self.source, Span::new(row.start + start, whole.end)));
                row.end = row.start + start;
                continued = false;
            }
            if !continued {
                row = trim_unescaped(self.source, row);
            }
            logical.rows.push(row);
            logical.joined.push(self.source, row);
            if !continued {
                break;
            }
            match self.continued_row(&mut logical) {
                Some((next, goes_on)) => (row, continued) = (next, goes_on),
                None => break,
            }
        }
        self.control_characters(&logical);
        if let Some(keyword) = keyword
            && matches!(keyword, Keyword::Run | Keyword::Copy)
        {
            self.heredocs(&mut logical);
        }
        logical
    }

    /// The end of the source line that `row` is on.
    fn end_of_line(&self, row: Span) -> usize {
        let rest = &self.source[row.end..];
        row.end + rest.find('\n').map_or(rest, |length| &rest[..length]).trim_end_matches('\r').len()
    }

    /// The next line that goes on with an instruction, past comments and blank lines.
    fn continued_row(&mut self, logical: &mut Logical) -> Option<(Span, bool)> {
        let slash = logical.rows.last().map_or(0, |row| row.end);
        let mut blank: Option<Span> = None;
        let (at, number, comments) = (self.at, self.number, logical.comments.len());
        while let Some(physical) = self.next_line() {
            let trimmed = trim(self.source, physical);
            match self.source[trimmed.start..trimmed.end].chars().next() {
                None => blank = blank.or(Some(trimmed)),
                Some('#') => logical.comments.push((logical.rows.len(), trimmed)),
                Some(_) => {
                    if let Some(blank) = blank {
                        let fault = Fault::warning(Code::EmptyContinuation, blank, "this blank line stands inside a continued instruction");
                        self.faults.push(fault.hint("remove the line, or the `\\` before it where the instruction should end"));
                    }
                    return Some(continuation(self.source, physical));
                }
            }
        }
        // What was passed over belongs to the file, not to the instruction.
        (self.at, self.number) = (at, number);
        logical.comments.truncate(comments);
        let fault = Fault::error(Code::DanglingContinuation, Span::new(slash, slash + 1), "`\\` continues the line, but nothing follows");
        self.faults.push(fault.hint("remove the `\\`"));
        None
    }

    fn control_characters(&mut self, logical: &Logical) {
        let bad = logical.joined.text.char_indices().find(|(_, character)| character.is_control() && *character != '\t');
        if let Some((at, character)) = bad {
            let span = logical.joined.span(at, at + character.len_utf8());
            let message = format!("the control character U+{:04X} is not allowed here", u32::from(character));
            self.faults.push(Fault::error(Code::ControlCharacter, span, message));
        }
    }

    fn heredocs(&mut self, logical: &mut Logical) {
        for start in word::heredoc_starts(&logical.joined.text) {
            let span = logical.joined.span(start.at, start.end);
            let mut heredoc = Heredoc {
                delimiter: start.delimiter,
                quoted: start.quoted,
                strip_tabs: start.strip_tabs,
                text: String::new(),
                lines: Vec::new(),
                span,
            };
            let mut closed = false;
            while !closed && let Some(line) = self.next_line() {
                let raw = &self.source[line.start..line.end];
                let text = if heredoc.strip_tabs { raw.trim_start_matches('\t') } else { raw };
                closed = text == heredoc.delimiter;
                if !closed {
                    heredoc.text.push_str(text);
                    heredoc.text.push('\n');
                    if let Some(at) = raw.find('\0') {
                        let span = Span::new(line.start + at, line.start + at + 1);
                        self.faults.push(Fault::error(Code::ControlCharacter, span, "the control character U+0000 is not allowed here"));
                    }
                }
                heredoc.lines.push(raw.to_owned());
            }
            if !closed {
                let message = format!("no line `{}` ends this heredoc", heredoc.delimiter);
                let hint = format!("put `{}` alone on a line behind the text", heredoc.delimiter);
                self.faults.push(Fault::error(Code::UnclosedHeredoc, span, message).hint(hint));
            }
            logical.heredocs.push(heredoc);
        }
    }
}

impl Logical {
    /// The rows as texts, for the layout.
    pub(crate) fn row_texts(&self, source: &str) -> Vec<Text> {
        self.rows.iter().map(|span| Text { text: source[span.start..span.end].to_owned(), span: *span }).collect()
    }
}

pub(crate) const fn is_blank(character: char) -> bool {
    matches!(character, ' ' | '\t')
}

fn trim_end(source: &str, span: Span) -> Span {
    Span::new(span.start, span.start + source[span.start..span.end].trim_end_matches(is_blank).len())
}

/// Trims the end but for a blank that a backslash makes part of a word (a comment stands behind it, or the line would go on).
fn trim_unescaped(source: &str, span: Span) -> Span {
    let trimmed = trim_end(source, span);
    let slashes = source[trimmed.start..trimmed.end].bytes().rev().take_while(|byte| *byte == b'\\').count();
    if slashes % 2 == 1 && trimmed.end < span.end { Span::new(trimmed.start, trimmed.end + 1) } else { trimmed }
}

fn skip_blanks(source: &str, span: Span) -> Span {
    let text = &source[span.start..span.end];
    Span::new(span.end - text.trim_start_matches(is_blank).len(), span.end)
}

fn trim(source: &str, span: Span) -> Span {
    trim_end(source, skip_blanks(source, span))
}

/// A line without its continuation mark, and whether it had one: a last backslash that no other one escapes.
fn continuation(source: &str, line: Span) -> (Span, bool) {
    let text = source[line.start..line.end].trim_end_matches(is_blank);
    let slashes = text.bytes().rev().take_while(|byte| *byte == b'\\').count();
    if slashes % 2 == 1 { (Span::new(line.start, line.start + text.len() - 1), true) } else { (line, false) }
}
