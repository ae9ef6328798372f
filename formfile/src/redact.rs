//! Hides passwords in lines that are shown to people.

use crate::{
    ast::Word,
    keyword::Keyword,
    lex::{self, Line},
    lower::user,
    span::Span,
    word,
};

/// The fields of `USER` whose values may be seen.
const PUBLIC: [&str; 9] =
    ["username", "ssh_authorized_keys", "lock_passwd", "sudo", "shell", "ssh_pwauth", "disable_root", "chpasswd_expire", "groups"];

/// Where the secrets of a source are.
pub(crate) struct Redacted {
    /// Ordered, none of them over a line's end.
    secrets: Vec<Span>,
}

impl Redacted {
    pub(crate) fn new(source: &str) -> Self {
        let mut secrets = Vec::new();
        for line in lex::lex(source, &mut Vec::new()) {
            let Line::Instruction(logical) = line else { continue };
            let text = logical.joined.text.to_ascii_lowercase();
            if logical.keyword != Some(Keyword::User) && !text.contains("passw") {
                continue;
            }
            let words = word::split(&logical.joined, 0, &mut Vec::new());
            // `USER NAME` shows who runs the service.
            if let [word] = words.as_slice()
                && !word.raw.contains([':', '='])
            {
                continue;
            }
            for secret in words.iter().filter_map(secret) {
                let first = logical.rows.partition_point(|row| row.end <= secret.start);
                for row in logical.rows[first..].iter().take_while(|row| row.start < secret.end) {
                    secrets.push(Span::new(secret.start.max(row.start), secret.end.min(row.end)));
                }
            }
        }
        Self { secrets }
    }

    /// The text of a line, which begins at byte `start` of the source, with each character of a secret replaced by `*`.
    pub(crate) fn line(&self, start: usize, text: &str) -> String {
        let mut secrets = self.secrets[self.secrets.partition_point(|secret| secret.end <= start)..].iter().peekable();
        let mut hide = |at: usize| {
            while secrets.next_if(|secret| secret.end <= at).is_some() {}
            secrets.peek().is_some_and(|secret| secret.start <= at)
        };
        text.char_indices().map(|(at, character)| if hide(start + at) { '*' } else { character }).collect()
    }
}

/// The part of a word of a `USER` line that must not be seen: all but a field's name and the values of public fields, for a
/// misspelt field or a stray word may hold the password.
fn secret(word: &Word) -> Option<Span> {
    let Some(at) = word.raw.find([':', '=']) else { return Some(word.span) };
    let (field, value) = (&word.raw[..at], &word.raw[at + 1..]);
    if PUBLIC.contains(&field) {
        // A misplaced quote can put the password into the value of the field before it.
        return value.to_ascii_lowercase().contains("passw").then_some(word.span);
    }
    // Without a continued line inside, bytes of the word are bytes of the source.
    let one_row = word.raw.len() == word.span.end - word.span.start;
    let is_field = user::meant(field).is_some();
    Some(if is_field && one_row { Span::new(word.span.start + at + 1, word.span.end) } else { word.span })
}
