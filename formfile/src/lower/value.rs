//! Values: numbers, sizes, durations, names and paths, each with the fault that says what was expected.

use form_types::{
    Name,
    size::{self, SizeError},
};

use crate::{
    diagnostic::{Code, Fault},
    span::Span,
};

/// What is wrong with a value, before its place is known.
#[derive(Debug)]
pub(super) struct Wrong {
    code: Code,
    message: String,
    hint: Option<String>,
}

impl Wrong {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(super) fn at(self, span: Span) -> Fault {
        let fault = Fault::error(self.code, span, self.message);
        Fault { hint: self.hint, ..fault }
    }
}

/// A value as a message shows it: short, and nothing that could steer a terminal.
pub(super) fn shown(text: &str) -> String {
    const LONGEST: usize = 48;
    let mut out: String = text.chars().filter(|character| !character.is_control()).take(LONGEST).collect();
    if text.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    format!("`{out}`")
}

/// A whole number from `least` to `most`. A number too large for any integer is out of range like others.
pub(super) fn number(what: &str, text: &str, least: u64, most: u64) -> Result<u64, Wrong> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Wrong::new(Code::InvalidNumber, format!("{what} is a whole number, not {}", shown(text)))
            .hint(format!("write a number from {least} to {most}")));
    }
    let value = if negative { None } else { digits.parse::<u64>().ok() };
    value
        .filter(|value| (least..=most).contains(value))
        .ok_or_else(|| Wrong::new(Code::OutOfRange, format!("{what} is from {least} to {most}, not {}", shown(text))))
}

/// A number that fits 32 bits.
pub(super) fn number32(what: &str, text: &str, least: u32, most: u32) -> Result<u32, Wrong> {
    let value = number(what, text, least.into(), most.into())?;
    Ok(u32::try_from(value).unwrap_or(most))
}

pub(super) fn port(text: &str) -> Result<u16, Wrong> {
    Ok(u16::try_from(number("a port", text, 1, 65535)?).unwrap_or(u16::MAX))
}

/// A range of sizes in `unit` bytes, which is also what a bare number counts.
pub(super) struct Sizes {
    pub(super) what: &'static str,
    pub(super) unit: u64,
    pub(super) unit_name: &'static str,
    pub(super) least: u64,
    pub(super) most: u64,
}

impl Sizes {
    /// The size in units.
    pub(super) fn read(&self, text: &str) -> Result<u64, Wrong> {
        let what = self.what;
        let (least, most) = (size::Bytes(self.least * self.unit), size::Bytes(self.most * self.unit));
        let range = || Wrong::new(Code::OutOfRange, format!("{what} is from {least} to {most}, not {}", shown(text)));
        if text.strip_prefix('-').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit())) {
            return Err(range());
        }
        let bytes = match size::parse(text, self.unit) {
            Ok(bytes) => bytes.0,
            Err(SizeError::TooLarge) => return Err(range()),
            Err(SizeError::Syntax) => {
                let message =
                    format!("{what} is a whole number of {}, or one with K, M, G or T behind it, not {}", self.unit_name, shown(text));
                return Err(Wrong::new(Code::InvalidSize, message).hint("write it like `512M` or `20G`"));
            }
        };
        if bytes < least.0 || bytes > most.0 {
            return Err(range());
        }
        if bytes % self.unit != 0 {
            return Err(Wrong::new(Code::InvalidSize, format!("{what} is a whole number of {}, not {}", self.unit_name, shown(text))));
        }
        Ok(bytes / self.unit)
    }
}

/// `500ms`, `30s`, `5m`, `1h`, `1m30s`, in milliseconds, at most a day.
pub(super) fn duration_ms(what: &str, text: &str, least: u64) -> Result<u64, Wrong> {
    const DAY: u64 = 24 * 60 * 60 * 1000;
    let syntax = || {
        Wrong::new(Code::InvalidDuration, format!("{what} is a duration, not {}", shown(text)))
            .hint("write it like `500ms`, `30s`, `5m`, `1h` or `1m30s`")
    };
    let range = || Wrong::new(Code::OutOfRange, format!("{what} is from {least}ms to 24h, not {}", shown(text)));
    if text == "0" && least == 0 {
        return Ok(0);
    }
    let mut total: u64 = 0;
    let mut rest = text;
    if rest.is_empty() {
        return Err(syntax());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, behind) = rest.split_at(digits);
        let letters = behind.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, behind) = behind.split_at(letters);
        let unit = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 60 * 60 * 1000,
            _ => return Err(syntax()),
        };
        if number.is_empty() {
            return Err(syntax());
        }
        let part = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
        total = part.and_then(|part| total.checked_add(part)).ok_or_else(range)?;
        rest = behind;
    }
    if (least..=DAY).contains(&total) { Ok(total) } else { Err(range()) }
}

pub(super) fn boolean(what: &str, text: &str) -> Result<bool, Wrong> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "1" | "on" => Ok(true),
        "false" | "no" | "0" | "off" => Ok(false),
        _ => Err(Wrong::new(Code::InvalidValue, format!("{what} is true or false, not {}", shown(text)))),
    }
}

pub(super) fn name(text: &str) -> Result<Name, Wrong> {
    text.parse().map_err(|_| {
        let wrong = Wrong::new(
            Code::InvalidName,
            format!("{} is not a name: a name is 1 to 63 of a-z, 0-9 and `-`, and begins with a letter", shown(text)),
        );
        let better: String =
            text.to_lowercase().chars().map(|character| if matches!(character, '_' | '.' | ' ') { '-' } else { character }).collect();
        match better.parse::<Name>() {
            Ok(better) => wrong.hint(format!("write `{better}`")),
            Err(_) => wrong,
        }
    })
}

/// The name of a user or group of the guest.
pub(super) fn account(what: &str, text: &str) -> Result<String, Wrong> {
    let mut bytes = text.bytes();
    let fits = text.len() <= 32
        && bytes.next().is_some_and(|first| first.is_ascii_lowercase() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-'));
    if fits {
        return Ok(text.to_owned());
    }
    Err(Wrong::new(
        Code::InvalidName,
        format!("{} is not {what}: 1 to 32 of a-z, 0-9, `_` and `-`, beginning with a letter or `_`", shown(text)),
    ))
}

/// An absolute path without `..`, written the one way: no `.`, no doubled or last slash.
pub(super) fn absolute_path(what: &str, text: &str) -> Result<String, Wrong> {
    if !text.starts_with('/') {
        return Err(Wrong::new(Code::InvalidPath, format!("{what} is an absolute path, not {}", shown(text))).hint("begin it with `/`"));
    }
    clean(what, text).map(|parts| format!("/{}", parts.join("/")))
}

/// The parts of a path, without empty ones and `.`.
pub(super) fn clean<'a>(what: &str, text: &'a str) -> Result<Vec<&'a str>, Wrong> {
    if text.contains('\0') || text.chars().any(char::is_control) {
        return Err(Wrong::new(Code::InvalidPath, format!("{what} holds a control character")));
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(Wrong::new(Code::InvalidPath, format!("{what} must not hold `..`")));
    }
    Ok(parts)
}

/// The name of an environment variable.
pub(super) fn variable(text: &str) -> Result<(), Wrong> {
    let mut bytes = text.bytes();
    let fits = bytes.next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if fits {
        return Ok(());
    }
    Err(Wrong::new(
        Code::InvalidName,
        format!("{} is not the name of a variable: letters, digits and `_`, not beginning with a digit", shown(text)),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let code = |text| number("it", text, 1, 128).map_err(|wrong| wrong.code);
        assert_eq!(code("128"), Ok(128));
        assert_eq!(code("0"), Err(Code::OutOfRange));
        assert_eq!(code("-1"), Err(Code::OutOfRange));
        assert_eq!(code("99999999999999999999999999"), Err(Code::OutOfRange));
        assert_eq!(code("two"), Err(Code::InvalidNumber));
        assert_eq!(code("1.5"), Err(Code::InvalidNumber));
        assert_eq!(code("+1"), Err(Code::InvalidNumber));
        assert_eq!(code(""), Err(Code::InvalidNumber));
    }

    #[test]
    fn sizes() {
        let memory = Sizes { what: "`MEM`", unit: size::MIB, unit_name: "MiB", least: 128, most: 262_144 };
        let read = |text| memory.read(text).map_err(|wrong| wrong.code);
        assert_eq!(read("512"), Ok(512));
        assert_eq!(read("2G"), Ok(2048));
        assert_eq!(read("256G"), Ok(262_144));
        assert_eq!(read("257G"), Err(Code::OutOfRange));
        assert_eq!(read("127"), Err(Code::OutOfRange));
        assert_eq!(read("-5"), Err(Code::OutOfRange));
        assert_eq!(read("99999999999999999999999"), Err(Code::OutOfRange));
        assert_eq!(read("200001K"), Err(Code::InvalidSize));
        assert_eq!(read("lots"), Err(Code::InvalidSize));
        let message = memory.read("64").map_err(|wrong| wrong.message);
        assert_eq!(message, Err("`MEM` is from 128 MiB to 256 GiB, not `64`".to_owned()));
    }

    #[test]
    fn durations() {
        let read = |text| duration_ms("it", text, 1).map_err(|wrong| wrong.code);
        assert_eq!(read("1m30s"), Ok(90_000));
        assert_eq!(read("500ms"), Ok(500));
        assert_eq!(read("24h"), Ok(86_400_000));
        assert_eq!(read("25h"), Err(Code::OutOfRange));
        assert_eq!(read("0s"), Err(Code::OutOfRange));
        assert_eq!(read("999999999999999999999h"), Err(Code::OutOfRange));
        for bad in ["", "5", "s", "5x", "5s5", "1.5s", "-1s"] {
            assert_eq!(read(bad), Err(Code::InvalidDuration), "{bad}");
        }
    }

    #[test]
    fn paths() {
        assert_eq!(absolute_path("it", "/a//b/./c/").ok().as_deref(), Some("/a/b/c"));
        assert_eq!(absolute_path("it", "/").ok().as_deref(), Some("/"));
        assert!(absolute_path("it", "a").is_err());
        assert!(absolute_path("it", "/a/../b").is_err());
        assert!(absolute_path("it", "/a/..b").is_ok());
    }
}
