//! Labels that people put on VMs, images and pools: how many there may be, and how long.

use std::collections::BTreeMap;

/// The most labels that one thing has.
pub const MOST: usize = 64;

/// The longest name of a label, in bytes.
pub const LONGEST_NAME: usize = 128;

/// The longest value of a label, in bytes.
pub const LONGEST_VALUE: usize = 1024;

/// Why something is no label, or one too many.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    #[error("`{}` is no label: its name has 1 to {LONGEST_NAME} bytes without blanks", beginning(.0))]
    Name(String),
    #[error("the value of the label `{name}` has {bytes} bytes: {LONGEST_VALUE} are possible")]
    Value { name: String, bytes: usize },
    #[error("that would be {0} labels: {MOST} are possible, remove some")]
    TooMany(usize),
}

/// What is shown of a name that may be very long.
fn beginning(text: &str) -> String {
    match text.char_indices().nth(LONGEST_NAME) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// # Errors
/// [`LabelError::Name`].
pub fn check_name(name: &str) -> Result<(), LabelError> {
    let is_none = name.is_empty() || name.len() > LONGEST_NAME || name.contains(|one: char| one.is_whitespace() || one.is_control());
    if is_none { Err(LabelError::Name(name.to_owned())) } else { Ok(()) }
}

/// # Errors
/// [`LabelError::Name`], [`LabelError::Value`].
pub fn check(name: &str, value: &str) -> Result<(), LabelError> {
    check_name(name)?;
    if value.len() > LONGEST_VALUE {
        return Err(LabelError::Value { name: name.to_owned(), bytes: value.len() });
    }
    Ok(())
}

/// Whether `after` may follow `before`. What an earlier release let through stays as it is: only what is new is looked at, and more than
/// [`MOST`] may become fewer.
///
/// # Errors
/// Those of [`check`], [`LabelError::TooMany`].
pub fn check_change(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Result<(), LabelError> {
    for (name, value) in after.iter().filter(|(name, value)| before.get(*name) != Some(*value)) {
        check(name, value)?;
    }
    let is_more = after.len() > MOST && after.len() > before.len();
    if is_more { Err(LabelError::TooMany(after.len())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn many(count: usize) -> BTreeMap<String, String> {
        (0..count).map(|number| (format!("label-{number}"), String::new())).collect()
    }

    #[test]
    fn names_and_values_have_a_length() {
        for name in ["a", "example.org/tier", &"ä".repeat(LONGEST_NAME / 2)] {
            assert_eq!(check(name, &"v".repeat(LONGEST_VALUE)), Ok(()), "{name}");
        }
        for bad in ["", "a b", "a\n", "\u{1b}[2J", &"a".repeat(LONGEST_NAME + 1), &"ä".repeat(100_000)] {
            let error = check(bad, "").unwrap_err().to_string();
            assert!(error.contains("is no label") && error.len() < 400, "{error}");
        }
        let error = check("a", &"v".repeat(LONGEST_VALUE + 1)).unwrap_err().to_string();
        assert_eq!(error, "the value of the label `a` has 1025 bytes: 1024 are possible");
    }

    #[test]
    fn there_are_so_many_and_what_was_there_before_stays() {
        let none = BTreeMap::new();
        assert_eq!(check_change(&none, &many(MOST)), Ok(()));
        let error = check_change(&none, &many(MOST + 1)).unwrap_err();
        assert_eq!(error.to_string(), "that would be 65 labels: 64 are possible, remove some");
        // An earlier release let these through.
        let mut old = many(80);
        old.insert("a".repeat(200), "v".repeat(5000));
        assert_eq!(check_change(&old, &old), Ok(()));
        let mut fewer = old.clone();
        fewer.remove("label-7");
        assert_eq!(check_change(&old, &fewer), Ok(()));
        fewer.insert("label-8".to_owned(), "other".to_owned());
        assert_eq!(check_change(&old, &fewer), Ok(()));
        fewer.insert("label-9".to_owned(), "v".repeat(LONGEST_VALUE + 1));
        assert!(matches!(check_change(&old, &fewer), Err(LabelError::Value { .. })));
        let mut more = old.clone();
        more.insert("new".to_owned(), String::new());
        assert_eq!(check_change(&old, &more), Err(LabelError::TooMany(82)));
    }
}
