//! `$NAME`, `${NAME}`, `${NAME:-other}`, `${NAME:+other}`: variables of `ARG` and `ENV` in the arguments of other instructions.
//!
//! The rules are those of a Dockerfile: single quotes keep a `$`, so does `\$`, an unknown variable is empty (with a warning).

use std::{
    collections::{BTreeMap, BTreeSet},
    iter::Peekable,
    str::Chars,
};

use crate::{
    diagnostic::{Code, Fault},
    span::Span,
};

/// What `PATH` is before an `ENV` changes it, so that `ENV PATH=/opt/bin:$PATH` means what it seems to.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The longest text that one word may become.
const LONGEST: usize = 64 << 10;
/// The most text that all words of a file may become together: a bound on what variables that hold variables can cause.
const MOST: usize = 8 << 20;
/// How deep `${A:-${B:-…}}` may nest.
const DEEPEST: usize = 8;

/// The variables that a line sees.
#[derive(Default)]
pub(crate) struct Variables {
    args: BTreeMap<String, Option<String>>,
    /// `ARG`s before `FROM`: seen by `FROM`, and behind it only where they are declared again.
    global: BTreeMap<String, Option<String>>,
    env: BTreeMap<String, String>,
    bytes: usize,
    spent: usize,
}

/// What quotes do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quoting {
    /// They group, and are dropped.
    Word,
    /// They are characters like others, as in a heredoc.
    Literal,
}

impl Variables {
    /// Declares an `ARG`. Returns how many bytes all variables have now.
    pub(crate) fn declare(&mut self, name: &str, value: Option<String>) -> usize {
        self.bytes += name.len() + value.as_ref().map_or(0, String::len) + 2;
        if let Some(old) = self.args.insert(name.to_owned(), value) {
            self.bytes -= name.len() + old.map_or(0, |old| old.len()) + 2;
        }
        self.bytes
    }

    /// The value that an `ARG` before `FROM` gave.
    pub(crate) fn global(&self, name: &str) -> Option<String> {
        self.global.get(name).cloned().flatten()
    }

    /// At `FROM`: what was declared before it is hidden.
    pub(crate) fn hide(&mut self) {
        self.global.append(&mut self.args);
    }

    /// Sets a variable of the environment. Returns how many bytes all variables have now.
    pub(crate) fn set(&mut self, name: &str, value: &str) -> usize {
        self.bytes += name.len() + value.len() + 2;
        if let Some(old) = self.env.insert(name.to_owned(), value.to_owned()) {
            self.bytes -= name.len() + old.len() + 2;
        }
        self.bytes
    }

    /// The environment of a build step: `ARG`s that have a value, and `ENV` before them.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let args = self.args.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?)));
        let mut all: BTreeMap<String, String> = args.collect();
        all.extend(self.env.iter().map(|(name, value)| (name.clone(), value.clone())));
        all.into_iter().collect()
    }

    fn get(&self, name: &str) -> Option<&str> {
        let own = self.env.get(name).or_else(|| self.args.get(name).and_then(Option::as_ref)).map(String::as_str);
        own.or_else(|| (name == "PATH").then_some(DEFAULT_PATH))
    }

    /// Expands a text. `None` when it cannot be read; then the fault is reported.
    pub(crate) fn expand(&mut self, raw: &str, span: Span, quoting: Quoting, faults: &mut Vec<Fault>) -> Option<String> {
        let mut expander = Expander { variables: self, characters: raw.chars().peekable(), quoting, unknown: Vec::new(), length: 0 };
        let result = expander.run(0, false);
        let (unknown, length) = (BTreeSet::from_iter(expander.unknown), expander.length);
        self.spent = self.spent.saturating_add(length);
        for name in unknown {
            let fault = Fault::warning(Code::Variable, span, format!("nothing defines `${name}`: it is empty here"));
            let hint = if self.global.contains_key(&name) {
                format!("an ARG before FROM ends there: repeat `ARG {name}` behind FROM")
            } else if quoting == Quoting::Literal {
                format!("declare `ARG {name}`, or quote the heredoc's delimiter to keep each `$`")
            } else {
                format!("declare `ARG {name}`, or write `\\${name}` for the characters themselves")
            };
            faults.push(fault.hint(hint));
        }
        let problem = match result {
            Ok(text) if self.spent <= MOST => return Some(text),
            Ok(_) => Problem::TooLong,
            Err(problem) => problem,
        };
        faults.push(problem.fault(span));
        None
    }
}

enum Problem {
    Unclosed,
    Operator,
    TooDeep,
    TooLong,
    /// `${NAME:?message}` of a variable without a value.
    Required(String, String),
}

impl Problem {
    fn fault(self, span: Span) -> Fault {
        let error = |message: &str| Fault::error(Code::Variable, span, message);
        match self {
            Self::Unclosed => error("a `${` here is never closed").hint("close it with `}`, or write `\\$` for the character itself"),
            Self::Operator => error("a `${…}` here cannot be read")
                .hint("write `${NAME}`, `${NAME:-when unset}` or `${NAME:+when set}`, or `\\$` for the character itself"),
            Self::TooDeep => error("variables are nested too deeply here"),
            Self::TooLong => error("this becomes too long when its variables are expanded")
                .hint("a value has at most 64 KiB; put large texts into files and `COPY` them"),
            Self::Required(name, message) => {
                let message = if message.is_empty() { "it is required".to_owned() } else { message };
                error(&format!("`{name}` has no value: {message}")).hint(format!("give one with `--build-arg {name}=…`"))
            }
        }
    }
}

struct Expander<'a> {
    variables: &'a Variables,
    characters: Peekable<Chars<'a>>,
    quoting: Quoting,
    /// In order, with repeats, so that a text not taken can be forgotten by cutting off its part.
    unknown: Vec<String>,
    length: usize,
}

impl Expander<'_> {
    /// Expands to the end, or below the first level to the `}` that closes it.
    fn run(&mut self, depth: usize, in_double_quotes: bool) -> Result<String, Problem> {
        if depth > DEEPEST {
            return Err(Problem::TooDeep);
        }
        let word = self.quoting == Quoting::Word;
        let mut open = in_double_quotes.then_some('"');
        let mut out = String::new();
        while let Some(character) = self.characters.next() {
            match (open, character) {
                (Some('\''), '\'') => open = None,
                (Some('\''), _) => out.push(character),
                (_, '}') if depth > 0 => return Ok(out),
                (_, '$') => self.variable(&mut out, depth, open == Some('"'))?,
                (None, '\\') if word => out.extend(self.characters.next()),
                (_, '\\') => match self.characters.next_if(|next| matches!(next, '\\' | '$') || (word && *next == '"')) {
                    Some(escaped) => out.push(escaped),
                    None => out.push('\\'),
                },
                (Some('"'), '"') => open = None,
                (None, '"' | '\'') if word => open = Some(character),
                _ => out.push(character),
            }
        }
        if depth > 0 { Err(Problem::Unclosed) } else { Ok(out) }
    }

    /// Behind a `$`.
    fn variable(&mut self, out: &mut String, depth: usize, in_double_quotes: bool) -> Result<(), Problem> {
        let braced = self.characters.next_if_eq(&'{').is_some();
        let name = self.name();
        if !braced {
            if name.is_empty() {
                out.push('$');
                return Ok(());
            }
            return self.push(out, &name, None);
        }
        if name.is_empty() {
            return Err(Problem::Operator);
        }
        let mut next = self.characters.next();
        let or_empty = next == Some(':');
        if or_empty {
            next = self.characters.next();
        }
        let operator = match next {
            None => return Err(Problem::Unclosed),
            Some('}') if !or_empty => return self.push(out, &name, None),
            Some(operator @ ('-' | '+' | '?')) => operator,
            Some(_) => return Err(Problem::Operator),
        };
        // The text that is not taken must not warn of variables that it would have needed.
        let unknown = self.unknown.len();
        let other = self.run(depth + 1, in_double_quotes)?;
        let value = self.variables.get(&name).filter(|value| !(or_empty && value.is_empty())).map(str::to_owned);
        let (text, other_taken) = match (operator, value) {
            ('-', None) => (other, true),
            ('-', Some(value)) => (value, false),
            ('+', None) => (String::new(), false),
            ('+', Some(_)) => (other, true),
            (_, None) => return Err(Problem::Required(name, other)),
            (_, Some(value)) => (value, false),
        };
        if !other_taken {
            self.unknown.truncate(unknown);
        }
        self.push(out, &name, Some(&text))
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        let fits = |next: &char, first: bool| *next == '_' || next.is_ascii_alphabetic() || (!first && next.is_ascii_digit());
        while let Some(character) = self.characters.next_if(|next| fits(next, name.is_empty())) {
            name.push(character);
        }
        name
    }

    fn push(&mut self, out: &mut String, name: &str, text: Option<&str>) -> Result<(), Problem> {
        let text = match text.or_else(|| self.variables.get(name)) {
            Some(text) => text,
            None => {
                self.unknown.push(name.to_owned());
                ""
            }
        };
        self.length += text.len();
        if self.length > LONGEST || self.variables.spent.saturating_add(self.length) > MOST {
            return Err(Problem::TooLong);
        }
        out.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(raw: &str) -> Result<(String, usize), String> {
        let mut variables = Variables::default();
        variables.declare("V", Some("12".to_owned()));
        variables.declare("EMPTY", Some(String::new()));
        variables.declare("NONE", None);
        variables.set("V", "13");
        let mut faults = Vec::new();
        let text = variables.expand(raw, Span::default(), Quoting::Word, &mut faults);
        match text {
            Some(text) => Ok((text, faults.len())),
            None => Err(faults.pop().map(|fault| fault.message).unwrap_or_default()),
        }
    }

    #[test]
    fn variables() {
        let good = |raw: &str| expand(raw).map(|(text, _)| text).unwrap_or_else(|error| panic!("{raw}: {error}"));
        assert_eq!(good("a$V.b"), "a13.b");
        assert_eq!(good("a${V}b"), "a13b");
        assert_eq!(good("${EMPTY:-x}${EMPTY-x}${NONE:-y}${MISSING-z}"), "xyz");
        assert_eq!(good("${V:+set}${EMPTY:+set}${EMPTY+set}"), "setset");
        assert_eq!(good("${MISSING:-${V}-${EMPTY:-\"a b\"}}"), "13-a b");
        assert_eq!(good(r#"'$V' \$V "\$V $V""#), r"$V $V $V 13");
        assert_eq!(good("$ 5$ $1 100%$"), "$ 5$ $1 100%$");
        assert_eq!(good("\"${MISSING:-a b}\""), "a b");
        assert_eq!(good("/opt:$PATH"), format!("/opt:{DEFAULT_PATH}"));
        assert_eq!(expand("$MISSING ${MISSING}"), Ok((" ".to_owned(), 1)));
        assert_eq!(expand("${V:-$MISSING}"), Ok(("13".to_owned(), 0)));
    }

    #[test]
    fn what_cannot_be_read() {
        for raw in ["${V", "${V:-x", "${}", "${V!}", "${V:}", "${NONE:?give one}", &"${A:-".repeat(100_000)] {
            assert!(expand(raw).is_err(), "{}", raw.len());
        }
        assert!(expand("${NONE:?give one}").is_err_and(|message| message.contains("give one")));
    }

    #[test]
    fn growth_is_bounded() {
        let mut variables = Variables::default();
        let mut faults = Vec::new();
        variables.set("A", "xxxxxxxx");
        for _ in 0..60 {
            if let Some(value) = variables.expand("$A$A", Span::default(), Quoting::Word, &mut faults) {
                assert!(value.len() <= LONGEST);
                variables.set("A", &value);
            }
        }
        assert!(!faults.is_empty());
    }
}
