//! Labels that people put on VMs, pools and images.

use std::collections::BTreeMap;

/// The longest name of a label, in bytes.
const MAX_LABEL: usize = 256;

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
    fn what_is_not_named_stays() {
        let mut labels = [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())].into();
        apply(&mut labels, &[("a".to_owned(), None), ("c".to_owned(), Some("3".to_owned()))].into());
        assert_eq!(labels, [("b".to_owned(), "2".to_owned()), ("c".to_owned(), "3".to_owned())].into());
    }
}
