//! Labels that people put on VMs, pools and images.

use std::collections::BTreeMap;

use form_api::{ApiError, ErrorCode};
use form_types::label;

/// The longest name of a label that a state of an earlier release may have, in bytes.
const MAX_LABEL: usize = 256;

/// Whether labels that are `before` may become `after`: asked of what somebody wants, and never of what is on record.
///
/// # Errors
/// Invalid, with what is possible.
pub fn check_change(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Result<(), ApiError> {
    label::check_change(before, after).map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))
}

/// Whether these labels may be set or removed, whatever there is.
///
/// # Errors
/// Invalid, with what is possible.
pub fn check_set(changes: &BTreeMap<String, Option<String>>) -> Result<(), ApiError> {
    let set: BTreeMap<String, String> = changes.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect();
    check_change(&BTreeMap::new(), &set)?;
    check(changes.keys()).map_err(|text| ApiError::new(ErrorCode::Invalid, text))
}

/// What holds of every change on record, whatever release wrote it.
///
/// # Errors
/// In words, when one of the names is none.
pub fn check<'a>(mut labels: impl Iterator<Item = &'a String>) -> Result<(), String> {
    let is_none = |label: &&String| {
        label.is_empty() || label.len() > MAX_LABEL || label.contains(|letter: char| letter.is_whitespace() || letter.is_control())
    };
    match labels.find(is_none) {
        Some(label) => Err(format!("`{label}` is no label: 1 to {MAX_LABEL} letters without blanks")),
        None => Ok(()),
    }
}

/// Puts each change into effect: a label to its new value, or to none.
pub fn apply(labels: &mut BTreeMap<String, String>, changes: &BTreeMap<String, Option<String>>) {
    for (label, value) in changes {
        match value {
            Some(value) => labels.insert(label.clone(), value.clone()),
            None => labels.remove(label),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_named_without_blanks() {
        for bad in [String::new(), "a b".to_owned(), "a\n".to_owned(), "a".repeat(MAX_LABEL + 1)] {
            assert!(check([&"good".to_owned(), &bad].into_iter()).unwrap_err().contains("is no label"), "{bad}");
        }
        assert_eq!(check([&"example.org/tier".to_owned()].into_iter()), Ok(()));
    }

    #[test]
    fn what_is_asked_for_has_limits_and_what_is_on_record_keeps_the_old_ones() {
        let long = "a".repeat(label::LONGEST_NAME + 1);
        assert_eq!(check([&long].into_iter()), Ok(()));
        assert_eq!(check_set(&[(long.clone(), Some(String::new()))].into()).unwrap_err().code, ErrorCode::Invalid);
        // It can still be removed.
        assert_eq!(check_set(&[(long, None)].into()), Ok(()));
        assert!(check_set(&[("a b".to_owned(), None)].into()).is_err());
        assert!(check_set(&[("a".to_owned(), Some("v".repeat(label::LONGEST_VALUE + 1)))].into()).is_err());
    }

    #[test]
    fn what_is_not_named_stays() {
        let mut labels = [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())].into();
        apply(&mut labels, &[("a".to_owned(), None), ("c".to_owned(), Some("3".to_owned()))].into());
        assert_eq!(labels, [("b".to_owned(), "2".to_owned()), ("c".to_owned(), "3".to_owned())].into());
    }
}
