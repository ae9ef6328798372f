//! Names that people choose.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// `[a-z][a-z0-9-]{0,62}`: a DNS label, so a VM's name is also its host name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a name: a name is 1 to 63 of a-z, 0-9 and `-`, and begins with a letter")]
pub struct NameError(String);

impl Name {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, formatter)
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = text.bytes();
        let fits = text.len() <= 63
            && bytes.next().is_some_and(|first| first.is_ascii_lowercase())
            && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if fits { Ok(Self(text.to_owned())) } else { Err(NameError(text.chars().take(80).collect())) }
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

/// `NAME` or `NAME:VERSION`. A version is a whole number from 1, given by the store that keeps the image; without one the
/// newest is meant.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageReference {
    pub name: Name,
    pub version: Option<u32>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ImageReferenceError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("`{0}` is not an image version: a version is a whole number from 1")]
    Version(String),
}

impl fmt::Display for ImageReference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.version {
            Some(version) => formatter.pad(&format!("{}:{version}", self.name)),
            None => formatter.pad(self.name.as_str()),
        }
    }
}

impl fmt::Debug for ImageReference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.to_string())
    }
}

impl FromStr for ImageReference {
    type Err = ImageReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, version) = match text.split_once(':') {
            None => (text, None),
            Some((name, version)) => {
                let number = version.parse().ok().filter(|number| *number >= 1 && !version.starts_with('+'));
                (name, Some(number.ok_or_else(|| ImageReferenceError::Version(version.chars().take(80).collect()))?))
            }
        };
        Ok(Self { name: name.parse()?, version })
    }
}

impl TryFrom<String> for ImageReference {
    type Error = ImageReferenceError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ImageReference> for String {
    fn from(reference: ImageReference) -> Self {
        reference.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "web", "web-1", &"a".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "1web", "-web", "Web", "we_b", "we.b", "wéb", "we b", &"a".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn image_references() {
        let reference: ImageReference = "web:3".parse().unwrap();
        assert_eq!((reference.name.as_str(), reference.version, reference.to_string()), ("web", Some(3), "web:3".to_owned()));
        for bad in ["web:", "web:0", "web:+1", "web:x", ":1", "web:1:2", "web:99999999999"] {
            assert!(bad.parse::<ImageReference>().is_err(), "{bad}");
        }
    }
}
