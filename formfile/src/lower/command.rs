//! `ENTRYPOINT` and `CMD`: a JSON array, or shell words.

use super::{Lowerer, value::Wrong};
use crate::{
    ast::{Body, Instruction},
    diagnostic::{Code, Fault},
    lex::is_blank,
    span::Span,
    word::unquote,
};

const SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// What a text for `ENTRYPOINT` or `CMD` is.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    /// A program and its arguments.
    Words(Vec<String>),
    /// Something that only a shell can run.
    Shell,
}

impl Lowerer<'_, '_> {
    pub(super) fn entrypoint(&mut self, instruction: &Instruction) {
        let Some((words, shell)) = self.command(instruction) else { return };
        self.spans.shell_entrypoint = shell;
        self.draft.entrypoint = words;
    }

    pub(super) fn cmd(&mut self, instruction: &Instruction) {
        let Some((words, _)) = self.command(instruction) else { return };
        self.spans.cmd = (!words.is_empty()).then_some(instruction.span);
        self.draft.cmd = words;
    }

    /// The words to run, and where they are when a shell runs them.
    fn command(&mut self, instruction: &Instruction) -> Option<(Vec<String>, Option<Span>)> {
        let keyword = instruction.keyword.as_str();
        let (words, shell) = match &instruction.body {
            Body::Json { words, span, .. } => {
                self.no_nul(words, *span)?;
                (words.clone(), None)
            }
            Body::Shell { text, .. } => match self.take(read(&text.text), text.span)? {
                Command::Words(words) => (words, None),
                Command::Shell => (SHELL.iter().map(|&word| word.to_owned()).chain([text.text.clone()]).collect(), Some(text.span)),
            },
            Body::Words(_) | Body::Text(_) => return None,
        };
        if words.is_empty() {
            let fault = Fault::warning(Code::Ineffective, instruction.span, format!("this `{keyword}` is empty"));
            self.faults.push(fault.hint("remove it, or give it a program to run"));
        } else if words[0].is_empty() && keyword == "ENTRYPOINT" {
            self.faults.push(Fault::error(Code::InvalidValue, instruction.span, "the program to run has an empty name"));
            return None;
        }
        Some((words, shell))
    }

    /// No program can be given an argument with a NUL in it. JSON can write one as `\u0000`.
    pub(super) fn no_nul(&mut self, words: &[String], span: Span) -> Option<()> {
        if words.iter().any(|word| word.contains('\0')) {
            self.faults.push(Fault::error(Code::ControlCharacter, span, "the control character U+0000 is not allowed here"));
            return None;
        }
        Some(())
    }
}

/// Words that stand for themselves are run as they are; with anything that a shell would act on, a shell runs the text.
fn read(text: &str) -> Result<Command, Wrong> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut open: Option<char> = None;
    let mut shell = false;
    let mut characters = text.chars();
    let finish = |word: &mut String, words: &mut Vec<String>| {
        if !word.is_empty() {
            words.push(unquote(word));
            word.clear();
        }
    };
    while let Some(character) = characters.next() {
        if open.is_none() && is_blank(character) {
            finish(&mut word, &mut words);
            continue;
        }
        match (open, character) {
            (None | Some('"'), '\\') => {
                word.push(character);
                if let Some(escaped) = characters.next() {
                    // Inside double quotes a shell drops the backslash before these two as well.
                    shell |= open.is_some() && matches!(escaped, '$' | '`');
                    word.push(escaped);
                }
                continue;
            }
            (None, '"' | '\'') => open = Some(character),
            (Some(quote), _) if character == quote => open = None,
            (None | Some('"'), '$' | '`') => shell = true,
            (None, '|' | '&' | ';' | '<' | '>' | '(' | ')' | '*' | '?' | '[' | '\n') => shell = true,
            (None, '~' | '#') if word.is_empty() => shell = true,
            // An assignment, which only counts before the program's name.
            (None, '=') if words.is_empty() => shell = true,
            _ => {}
        }
        word.push(character);
    }
    finish(&mut word, &mut words);
    if let Some(quote) = open {
        return Err(
            Wrong::new(Code::UnclosedQuote, format!("a `{quote}` is never closed")).hint(format!("close it with another `{quote}`"))
        );
    }
    shell |= words.first().is_some_and(|first| is_shell_word(first));
    Ok(if shell { Command::Shell } else { Command::Words(words) })
}

/// Words that mean something to a shell and are no program, or another one than the shell's own.
fn is_shell_word(word: &str) -> bool {
    const WORDS: [&str; 24] = [
        "!", ".", ":", "{", "break", "case", "cd", "command", "eval", "exec", "exit", "export", "for", "if", "read", "set", "shift",
        "source", "trap", "ulimit", "umask", "until", "wait", "while",
    ];
    WORDS.contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_words() {
        let words = |text| match read(text) {
            Ok(Command::Words(words)) => words,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(words("nginx -g \"daemon off;\""), ["nginx", "-g", "daemon off;"]);
        assert_eq!(words("python3  app.py --port=80 ''"), ["python3", "app.py", "--port=80", ""]);
        assert_eq!(words(r#"echo "a \"b\"" 'c $d' e\ f"#), ["echo", "a \"b\"", "c $d", "e f"]);
        assert_eq!(words(""), [""; 0]);
    }

    #[test]
    fn shell_texts() {
        for text in
            ["a && b", "a; b", "echo $HOME", "echo \"$HOME\"", "X=1 a", "exec a", "a > /dev/null", "ls *.txt", "cat ~/x", "a # b", "a `b`"]
        {
            assert_eq!(read(text).ok(), Some(Command::Shell), "{text}");
        }
        assert!(read("echo 'a").is_err());
    }
}
