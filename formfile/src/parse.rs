//! From lines to the syntax tree.

use crate::{
    ast::{Body, File, Heredoc, Instruction, Item, Layout, Text, Word},
    diagnostic::{Code, Fault},
    keyword::{self, Keyword, Mode},
    lex::{self, Joined, Line, Logical, is_blank},
    span::Span,
    word::{self, Quotes},
};

/// The largest Formfile there is: a bound on the work that a hostile one can cause.
const LARGEST: usize = 1 << 20;

/// Parses a source. Never fails: instructions that cannot be read are left out and reported.
pub(crate) fn parse(source: &str, faults: &mut Vec<Fault>) -> File {
    if source.len() > LARGEST {
        faults.push(
            Fault::error(Code::TooLarge, Span::new(0, 0), "a Formfile has at most 1 MiB")
                .hint("put large texts into files and `COPY` them"),
        );
        return File::default();
    }
    let mut lexical = Vec::new();
    let lines = lex::lex(source, &mut lexical);
    let first = lines.iter().find_map(|line| match line {
        Line::Instruction(logical) => Some(logical.keyword_span),
        Line::Blank | Line::Comment(_) => None,
    });
    if let Some(span) = first
        && &source[span.start..span.end] == "instances:"
    {
        faults.push(stack_unsupported(span));
        return File::default();
    }
    faults.append(&mut lexical);
    let mut file = File::default();
    for line in lines {
        match line {
            Line::Blank => file.items.push(Item::Blank),
            Line::Comment(span) => file.items.push(Item::Comment(source[span.start..span.end].to_owned())),
            Line::Instruction(logical) => {
                if let Some(instruction) = instruction(source, logical, faults) {
                    file.items.push(Item::Instruction(instruction));
                }
            }
        }
    }
    file
}

pub(crate) fn stack_unsupported(span: Span) -> Fault {
    Fault::error(Code::StackUnsupported, span, "stacks (several instances in one YAML file) are not supported yet")
        .hint("write one Formfile for each instance and deploy them one by one")
}

fn instruction(source: &str, logical: Logical, faults: &mut Vec<Fault>) -> Option<Instruction> {
    let word = &source[logical.keyword_span.start..logical.keyword_span.end];
    let Some(keyword) = Keyword::parse(word) else {
        faults.push(unknown(word, logical.keyword_span));
        return None;
    };
    let rows = logical.row_texts(source);
    let span = rows.last().map_or(logical.keyword_span, |row| logical.keyword_span.to(row.span));
    let comment = |span: Span| source[span.start..span.end].to_owned();
    let mut layout = Layout {
        rows,
        comments: logical.comments.iter().map(|(row, span)| (*row, comment(*span))).collect(),
        trailing_comment: logical.trailing_comment.map(comment),
    };
    let arguments = Arguments { joined: &logical.joined, faults };
    let body = match (keyword.mode(), keyword) {
        (_, Keyword::Copy) => arguments.copy(),
        (Mode::Words, _) => Body::Words(arguments.words(0)),
        (Mode::Text, _) => Body::Text(arguments.text(0)),
        (Mode::Shell, Keyword::Run) => arguments.run(&logical.heredocs),
        (Mode::Shell, Keyword::Healthcheck) => arguments.healthcheck(&mut layout.trailing_comment),
        (Mode::Shell, _) => arguments.command(Vec::new(), 0, Strictness::Json, &mut layout.trailing_comment),
    };
    let (keyword_span, line, heredocs) = (logical.keyword_span, logical.line, logical.heredocs);
    Some(Instruction { keyword, keyword_span, span, line, body, heredocs, layout })
}

fn unknown(word: &str, span: Span) -> Fault {
    let shown: String = word.chars().take(40).filter(|character| !character.is_control()).collect();
    let fault = Fault::error(Code::UnknownKeyword, span, format!("`{shown}` is no instruction"));
    match keyword::guess(word).hint {
        Some(hint) => fault.hint(hint),
        None => fault.hint("a line begins with an instruction such as `RUN`, or goes on with the line before when that one ends in `\\`"),
    }
}

/// What a text that begins with `[` and is no JSON array means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Strictness {
    /// A fault: nobody names a program `[`.
    Json,
    /// A text for the shell, which has a command `[`.
    Shell,
}

struct Arguments<'a, 'f> {
    joined: &'a Joined,
    faults: &'f mut Vec<Fault>,
}

impl Arguments<'_, '_> {
    fn words(self, from: usize) -> Vec<Word> {
        word::split(self.joined, from, self.faults)
    }

    fn text(&self, from: usize) -> Text {
        let text = &self.joined.text;
        Text { text: text[from..].to_owned(), span: self.joined.span(from, text.len()) }
    }

    /// Options (`--name=value`) at the start, and where the rest begins.
    fn options(&self, mut at: usize) -> (Vec<Word>, usize) {
        let text = &self.joined.text;
        let mut options = Vec::new();
        loop {
            at += text[at..].len() - text[at..].trim_start_matches(is_blank).len();
            if !text[at..].starts_with("--") {
                return (options, at);
            }
            let end = at + text[at..].find(is_blank).unwrap_or(text.len() - at);
            options.push(Word { raw: text[at..end].to_owned(), span: self.joined.span(at, end), row: self.joined.row(at) });
            at = end;
        }
    }

    /// A JSON array of strings from `from` on, and where it ends.
    fn json(&self, from: usize) -> Option<Result<(Vec<String>, usize), serde_json::Error>> {
        let rest = self.joined.text.get(from..)?;
        if !rest.starts_with('[') {
            return None;
        }
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Vec<String>>();
        let words = values.next()?;
        Some(words.map(|words| (words, from + values.byte_offset())))
    }

    fn copy(self) -> Body {
        let (options, from) = self.options(0);
        // A glob may begin with `[` as well: only a whole JSON array is one.
        if let Some(Ok((words, end))) = self.json(from)
            && self.joined.text[end..].chars().all(is_blank)
        {
            return Body::Json { options, words, span: self.joined.span(from, end) };
        }
        Body::Words(self.words(0))
    }

    fn run(self, heredocs: &[Heredoc]) -> Body {
        let text = self.joined.text.as_str();
        if let [heredoc] = heredocs
            && heredoc.span == self.joined.span(0, text.len())
        {
            return Body::Shell { options: Vec::new(), text: Text { text: heredoc.text.clone(), span: heredoc.span } };
        }
        let (options, from) = self.options(0);
        let mut body = self.command(options, from, Strictness::Shell, &mut None);
        if let Body::Shell { text, .. } = &mut body {
            for line in heredocs.iter().flat_map(|heredoc| &heredoc.lines) {
                text.text.push('\n');
                text.text.push_str(line);
            }
        }
        body
    }

    fn healthcheck(mut self, trailing_comment: &mut Option<String>) -> Body {
        let (options, from) = self.options(0);
        let rest = &self.joined.text[from..];
        let first = rest.split(is_blank).next().unwrap_or_default();
        match first {
            "http" | "tcp" | "NONE" => {
                // These are no shell text, so a comment may stand behind them.
                let comment = Quotes::new(Mode::Words, rest).comment(rest);
                *trailing_comment = comment.map(|at| rest[at..].to_owned());
                let end = comment.map_or(self.joined.text.len(), |at| from + at);
                self.comment_ends(end);
                Body::Words(word::split_until(self.joined, 0, end, self.faults))
            }
            "CMD" => {
                let skipped = rest["CMD".len()..].trim_start_matches(is_blank).len();
                let from = self.joined.text.len() - skipped;
                self.command(options, from, Strictness::Shell, trailing_comment)
            }
            _ => self.command(options, from, Strictness::Shell, trailing_comment),
        }
    }

    /// Reports a comment from `at` on that a `\` at its end seems to continue. Before the comment was found, its line was
    /// taken for one of a shell text, which goes on.
    fn comment_ends(&mut self, at: usize) {
        if self.joined.is_continued(at) {
            let span = self.joined.span(at, self.joined.text.len());
            let fault = Fault::error(Code::DanglingContinuation, span, "a `\\` at the end of a comment does not continue the line");
            self.faults.push(fault.hint("put the comment on a line of its own"));
        }
    }

    /// A JSON array or a text for the shell.
    fn command(mut self, options: Vec<Word>, from: usize, strictness: Strictness, trailing_comment: &mut Option<String>) -> Body {
        let all = &self.joined.text;
        let problem = match self.json(from) {
            None => return Body::Shell { options, text: self.text(from) },
            Some(Ok((words, end))) => {
                let rest = &all[end..];
                let trimmed = rest.trim_start_matches(is_blank);
                let comment = trimmed.starts_with('#') && trimmed.len() < rest.len();
                if trimmed.is_empty() || comment {
                    *trailing_comment = comment.then(|| trimmed.to_owned());
                    self.comment_ends(all.len() - trimmed.len());
                    return Body::Json { options, words, span: self.joined.span(from, end) };
                }
                "something follows the array".to_owned()
            }
            Some(Err(error)) => json_problem(&error),
        };
        let span = self.joined.span(from, all.len());
        if strictness == Strictness::Json {
            let fault = Fault::error(Code::InvalidJson, span, format!("this is no JSON array of strings: {problem}"));
            self.faults.push(fault.hint("write `[\"program\", \"argument\"]` with double quotes, or plain words without brackets"));
        } else if all[from..].starts_with("[\"") || all[from..].starts_with("['") {
            let fault = Fault::warning(Code::InvalidJson, span, format!("this looks like a JSON array but goes to the shell: {problem}"));
            self.faults.push(fault.hint("write `[\"program\", \"argument\"]` with double quotes"));
        }
        Body::Shell { options, text: self.text(from) }
    }
}

/// What is wrong with an array, without its text or a place in it that would be counted from another start.
fn json_problem(error: &serde_json::Error) -> String {
    match error.classify() {
        serde_json::error::Category::Eof => "it is not closed".to_owned(),
        serde_json::error::Category::Data => "it holds something other than strings".to_owned(),
        serde_json::error::Category::Syntax | serde_json::error::Category::Io => {
            "a comma, a bracket or a double quote is missing or misplaced".to_owned()
        }
    }
}
