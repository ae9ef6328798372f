//! Words: splitting by blanks and quotes, and taking the quotes off.

use crate::{
    ast::Word,
    diagnostic::{Code, Fault},
    keyword::Mode,
    lex::{Joined, is_blank},
};

/// Follows quotes through the lines of an instruction, to tell a comment from a `#` inside quotes.
pub(crate) struct Quotes {
    open: Option<char>,
    /// Whether a quote may open at the next character.
    may_open: bool,
    text_mode: bool,
}

impl Quotes {
    pub(crate) fn new(mode: Mode, first_row: &str) -> Self {
        let text_mode = mode == Mode::Text;
        Self { open: None, may_open: !text_mode || opening_quote(first_row).is_some(), text_mode }
    }

    /// Where in this row a comment begins. Call it once for each row, in order.
    pub(crate) fn comment(&mut self, row: &str) -> Option<usize> {
        // The first row begins behind the keyword and a blank, so a comment may begin at once.
        let mut after_blank = true;
        let mut characters = row.char_indices();
        while let Some((at, character)) = characters.next() {
            match (self.open, character) {
                (None, '#') if after_blank => return Some(at),
                (None, '\\') if !self.text_mode => {
                    characters.next();
                }
                (Some('"'), '\\') => {
                    characters.next();
                }
                (None, '"' | '\'') if self.may_open => self.open = Some(character),
                (Some(quote), _) if character == quote => self.open = None,
                _ => {}
            }
            // Free text is quoted as a whole or not at all.
            self.may_open &= !self.text_mode;
            after_blank = self.open.is_none() && is_blank(character);
        }
        None
    }
}

/// The quote that a free text begins with. One that nothing closes, as in `'tis a server`, is no quote.
fn opening_quote(text: &str) -> Option<char> {
    let first = text.chars().next().filter(|first| matches!(first, '"' | '\''))?;
    text[1..].contains(first).then_some(first)
}

/// A free text without the quotes around it, where quotes stand around all of it.
pub(crate) fn unquote_text(text: &str) -> String {
    let Some(quote) = opening_quote(text) else { return text.to_owned() };
    let mut escaped = false;
    let closing = text.char_indices().skip(1).find(|(_, character)| {
        let closes = *character == quote && !escaped;
        escaped = quote == '"' && *character == '\\' && !escaped;
        closes
    });
    match closing {
        Some((at, _)) if at + 1 == text.len() => unquote(text),
        _ => text.to_owned(),
    }
}

/// Splits a text into words, which keep their quotes.
pub(crate) fn split(joined: &Joined, from: usize, faults: &mut Vec<Fault>) -> Vec<Word> {
    split_until(joined, from, joined.text.len(), faults)
}

/// Splits a part of a text into words.
pub(crate) fn split_until(joined: &Joined, from: usize, end: usize, faults: &mut Vec<Fault>) -> Vec<Word> {
    let text = &joined.text[..end];
    let mut words = Vec::new();
    let mut start: Option<usize> = None;
    let mut open: Option<(usize, char)> = None;
    let mut characters = text[from..].char_indices().map(|(at, character)| (at + from, character));
    let word = |start: usize, end: usize| Word { raw: text[start..end].to_owned(), span: joined.span(start, end), row: joined.row(start) };
    while let Some((at, character)) = characters.next() {
        if open.is_none() && is_blank(character) {
            if let Some(start) = start.take() {
                words.push(word(start, at));
            }
            continue;
        }
        start = start.or(Some(at));
        match (open, character) {
            (None | Some((_, '"')), '\\') => {
                characters.next();
            }
            (None, '"' | '\'') => open = Some((at, character)),
            (Some((_, quote)), _) if character == quote => open = None,
            _ => {}
        }
    }
    if let Some(start) = start {
        words.push(word(start, text.len()));
    }
    if let Some((at, quote)) = open {
        let fault = Fault::error(Code::UnclosedQuote, joined.span(at, at + 1), format!("this `{quote}` is never closed"));
        faults.push(fault.hint(format!("close it with another `{quote}`, or write `\\{quote}` for the character itself")));
    }
    words
}

/// A word without its quotes. Outside quotes `\` stands for the next character; inside double quotes `\"` is `"` and
/// `\\` is `\`.
pub(crate) fn unquote(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len());
    let mut open: Option<char> = None;
    let mut characters = raw.chars().peekable();
    while let Some(character) = characters.next() {
        match (open, character) {
            (None, '\\') => out.extend(characters.next()),
            (Some('"'), '\\') => match characters.next_if(|next| matches!(next, '"' | '\\')) {
                Some(escaped) => out.push(escaped),
                None => out.push('\\'),
            },
            (None, '"' | '\'') => open = Some(character),
            (Some(quote), _) if character == quote => open = None,
            _ => out.push(character),
        }
    }
    out
}

/// `<<EOF`, `<<-EOF`, `<<"EOF"` in a text.
pub(crate) struct HeredocStart {
    pub(crate) at: usize,
    pub(crate) end: usize,
    pub(crate) delimiter: String,
    pub(crate) quoted: bool,
    pub(crate) strip_tabs: bool,
}

/// The heredocs that a text opens, outside quotes and shell comments.
pub(crate) fn heredoc_starts(text: &str) -> Vec<HeredocStart> {
    let mut starts = Vec::new();
    let mut open: Option<char> = None;
    let mut before = ' ';
    let mut at = 0;
    while let Some(character) = text[at..].chars().next() {
        match (open, character) {
            (None | Some('"'), '\\') => {
                let escaped = text[at + 1..].chars().next().map_or(0, char::len_utf8);
                at += 1 + escaped;
                before = '\\';
                continue;
            }
            (None, '#') if is_blank(before) => break,
            (None, '<') if before != '<' => {
                if let Some(start) = heredoc_at(text, at) {
                    at = start.end;
                    before = 'x';
                    starts.push(start);
                    continue;
                }
            }
            (None, '"' | '\'') => open = Some(character),
            (Some(quote), _) if character == quote => open = None,
            _ => {}
        }
        before = character;
        at += character.len_utf8();
    }
    starts
}

fn heredoc_at(text: &str, at: usize) -> Option<HeredocStart> {
    let rest = text[at..].strip_prefix("<<")?;
    let (rest, strip_tabs) = rest.strip_prefix('-').map_or((rest, false), |rest| (rest, true));
    let quote = rest.chars().next().filter(|first| matches!(first, '"' | '\''));
    let rest = if quote.is_some() { &rest[1..] } else { rest };
    let length =
        rest.find(|character: char| !(character.is_ascii_alphanumeric() || matches!(character, '_' | '.' | '-'))).unwrap_or(rest.len());
    let (delimiter, rest) = rest.split_at(length);
    if !delimiter.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_') {
        return None;
    }
    let rest = match quote {
        Some(quote) => rest.strip_prefix(quote)?,
        None => rest,
    };
    Some(HeredocStart { at, end: text.len() - rest.len(), delimiter: delimiter.to_owned(), quoted: quote.is_some(), strip_tabs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unquoting() {
        assert_eq!(unquote(r#"a"b c"'d "e'"#), r#"ab cd "e"#);
        assert_eq!(unquote(r#""say \"hi\" \\ \n""#), r#"say "hi" \ \n"#);
        assert_eq!(unquote(r"a\ b\\"), r"a b\");
        assert_eq!(unquote(r"'a\ b'"), r"a\ b");
    }

    #[test]
    fn heredocs() {
        let found =
            |text| heredoc_starts(text).into_iter().map(|start| (start.delimiter, start.quoted, start.strip_tabs)).collect::<Vec<_>>();
        assert_eq!(found("<<EOF"), [("EOF".to_owned(), false, false)]);
        assert_eq!(found("cat <<-'A' > x && cat <<\"B\""), [("A".to_owned(), true, true), ("B".to_owned(), true, false)]);
        assert_eq!(found("cat <<< text"), []);
        assert_eq!(found("cat <<<text"), []);
        assert_eq!(found("echo \"<<EOF\" '<<EOF' # <<EOF"), []);
        assert_eq!(found("echo $((1 <<3))"), []);
        assert_eq!(found("cat <<EOF; true"), [("EOF".to_owned(), false, false)]);
    }

    #[test]
    fn comments() {
        let comment = |mode, row: &str| Quotes::new(mode, row).comment(row);
        assert_eq!(comment(Mode::Words, "a # b"), Some(2));
        assert_eq!(comment(Mode::Words, "a#b"), None);
        assert_eq!(comment(Mode::Words, "'a # b'"), None);
        assert_eq!(comment(Mode::Words, "\"a \\\" # b\" # c"), Some(11));
        assert_eq!(comment(Mode::Words, "# b"), Some(0));
        assert_eq!(comment(Mode::Text, "it's # b"), Some(5));
        assert_eq!(comment(Mode::Text, "'tis # b"), Some(5));
        assert_eq!(comment(Mode::Text, "\"a # b\" # c"), Some(8));
        assert_eq!(comment(Mode::Text, "a \"b # c\""), Some(5));
    }
}
