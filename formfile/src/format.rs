//! The canonical layout.
//!
//! One blank between words, canonical keywords, one blank line where there were several, four blanks before a continued
//! line. Comments, the order of lines, where a line is continued, quotes, shell texts and heredocs stay as they are.

use crate::{
    ast::{Body, File, Instruction, Item, Word},
    keyword::Keyword,
};

const INDENT: &str = "    ";

pub(crate) fn format(file: &File) -> String {
    let mut out = String::new();
    let mut blank = false;
    for item in &file.items {
        match item {
            Item::Blank => {
                blank = true;
                continue;
            }
            Item::Comment(text) => {
                separate(&mut out, blank);
                out.push_str(text);
                out.push('\n');
            }
            Item::Instruction(instruction) => {
                separate(&mut out, blank);
                write(&mut out, instruction);
            }
        }
        blank = false;
    }
    out
}

fn separate(out: &mut String, blank: bool) {
    if blank && !out.is_empty() {
        out.push('\n');
    }
}

/// What stands on the lines of one instruction.
enum Piece {
    /// Goes on with the instruction; the blank before a following `\` is part of it.
    Row(String),
    Comment(String),
}

fn write(out: &mut String, instruction: &Instruction) {
    out.push_str(instruction.keyword.as_str());
    let pieces = pieces(instruction);
    let last = pieces.iter().rposition(|piece| matches!(piece, Piece::Row(_))).unwrap_or(0);
    for (number, piece) in pieces.iter().enumerate() {
        match piece {
            Piece::Row(text) => {
                if number == 0 && !(text.is_empty() && last == 0) {
                    out.push(' ');
                }
                out.push_str(text);
                if number < last {
                    out.push('\\');
                }
            }
            Piece::Comment(text) => {
                out.push_str(INDENT);
                out.push_str(text);
            }
        }
        if number < last {
            out.push('\n');
        }
    }
    if let Some(comment) = &instruction.layout.trailing_comment {
        out.push(' ');
        out.push_str(comment);
    }
    out.push('\n');
    for line in instruction.heredocs.iter().flat_map(|heredoc| &heredoc.lines) {
        out.push_str(line);
        out.push('\n');
    }
}

fn pieces(instruction: &Instruction) -> Vec<Piece> {
    let rows = &instruction.layout.rows;
    match &instruction.body {
        Body::Words(words) => of_words(instruction, words),
        Body::Json { options, words, .. } if rows.len() == 1 && instruction.keyword != Keyword::Healthcheck => {
            let array: Vec<String> = words.iter().map(|word| serde_json::Value::from(word.as_str()).to_string()).collect();
            let options = options.iter().map(|option| format!("{} ", option.raw)).collect::<String>();
            vec![Piece::Row(format!("{options}[{}]", array.join(", ")))]
        }
        Body::Json { .. } | Body::Text(_) | Body::Shell { .. } => {
            let mut pieces = Vec::new();
            let mut comments = Comments::new(instruction);
            for (number, row) in rows.iter().enumerate() {
                comments.before(number, &mut pieces);
                let text = if number + 1 == rows.len() { without_comment(instruction, &row.text) } else { &row.text };
                pieces.push(Piece::Row(text.to_owned()));
            }
            pieces
        }
    }
}

/// A comment that was found behind a JSON array is still part of the row.
fn without_comment<'a>(instruction: &Instruction, row: &'a str) -> &'a str {
    match (&instruction.body, &instruction.layout.trailing_comment) {
        (Body::Json { .. }, Some(comment)) => row.strip_suffix(comment.as_str()).unwrap_or(row).trim_end_matches([' ', '\t']),
        _ => row,
    }
}

/// The comments between rows, in their order.
struct Comments<'a>(std::iter::Peekable<std::slice::Iter<'a, (usize, String)>>);

impl<'a> Comments<'a> {
    fn new(instruction: &'a Instruction) -> Self {
        Self(instruction.layout.comments.iter().peekable())
    }

    fn before(&mut self, row: usize, pieces: &mut Vec<Piece>) {
        while let Some((_, text)) = self.0.next_if(|(before, _)| *before <= row) {
            pieces.push(Piece::Comment(text.clone()));
        }
    }
}

fn of_words(instruction: &Instruction, words: &[Word]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut comments = Comments::new(instruction);
    let mut words = words.iter().peekable();
    for number in 0..instruction.layout.rows.len() {
        comments.before(number, &mut pieces);
        let mut row = String::new();
        while let Some(word) = words.next_if(|word| word.row <= number) {
            if !row.is_empty() {
                row.push(' ');
            }
            row.push_str(&word.raw);
        }
        let more = words.peek().is_some();
        if row.is_empty() && number > 0 {
            continue;
        }
        let indent = if number > 0 { INDENT } else { "" };
        let slash = if more && !row.is_empty() { " " } else { "" };
        pieces.push(Piece::Row(format!("{indent}{row}{slash}")));
    }
    pieces
}
