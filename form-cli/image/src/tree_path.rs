//! A path inside an image: bytes, relative to its root, without `.`, `..`, or empty parts.

use std::{
    ffi::OsStr,
    fmt,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The root itself is the empty path. Sorts a directory before what is in it.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct TreePath(Vec<u8>);

#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no path inside an image")]
pub(crate) struct TreePathError(String);

impl TreePath {
    pub fn root() -> Self {
        Self::default()
    }

    /// Takes `./etc/passwd`, `/etc/passwd`, `etc/`; refuses `..`, zero bytes and what is longer than a path can be.
    pub fn parse(bytes: &[u8]) -> Result<Self, TreePathError> {
        let mut path = Vec::with_capacity(bytes.len());
        for part in bytes.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                _ if part == b".." || part.contains(&0) || part.len() > 255 => return Err(Self::error(bytes)),
                _ => {
                    if !path.is_empty() {
                        path.push(b'/');
                    }
                    path.extend_from_slice(part);
                }
            }
        }
        if path.len() > 4000 { Err(Self::error(bytes)) } else { Ok(Self(path)) }
    }

    fn error(bytes: &[u8]) -> TreePathError {
        TreePathError(String::from_utf8_lossy(bytes).chars().take(200).collect())
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub fn to_path(&self) -> PathBuf {
        Path::new(OsStr::from_bytes(&self.0)).to_owned()
    }

    /// The last part; empty for the root.
    pub fn name(&self) -> &[u8] {
        self.0.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
    }

    /// The directory that holds it; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        if self.is_root() {
            return None;
        }
        let end = self.0.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        Some(Self(self.0[..end].to_vec()))
    }

    /// `name` is one part, as [`TreePath::name`] gives it.
    pub fn join(&self, name: &[u8]) -> Self {
        let mut path = self.0.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Self(path)
    }

    /// The directories above it, the root first, itself not included.
    pub fn ancestors(&self) -> Vec<Self> {
        let mut found: Vec<Self> = std::iter::successors(self.parent(), Self::parent).collect();
        found.reverse();
        found
    }

    /// What every path below it begins with.
    pub fn prefix(&self) -> Vec<u8> {
        let mut prefix = self.0.clone();
        if !prefix.is_empty() {
            prefix.push(b'/');
        }
        prefix
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "/{}", String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl TryFrom<String> for TreePath {
    type Error = TreePathError;

    fn try_from(text: String) -> Result<Self, TreePathError> {
        let bytes = unescape(&text).ok_or_else(|| Self::error(text.as_bytes()))?;
        Self::parse(&bytes)
    }
}

impl From<TreePath> for String {
    fn from(path: TreePath) -> Self {
        escape(&path.0)
    }
}

/// Bytes as text that JSON can hold: what is not printable ASCII, and `%`, as `%XX`.
pub(crate) fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'%' | 0..=31 | 127.. => text.push_str(&format!("%{byte:02x}")),
            _ => text.push(char::from(*byte)),
        }
    }
    text
}

pub(crate) fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        assert_eq!(TreePath::parse(b"./etc//passwd").unwrap().as_bytes(), b"etc/passwd");
        assert!(TreePath::parse(b"/").unwrap().is_root());
        for bad in [&b"../x"[..], b"a/../b", b"a\0b", &[b'a'; 256]] {
            assert!(TreePath::parse(bad).is_err());
        }
        let path = TreePath::parse(b"a/b/c").unwrap();
        assert_eq!(path.ancestors().iter().map(ToString::to_string).collect::<Vec<_>>(), ["/", "/a", "/a/b"]);
        assert_eq!(path.name(), b"c");
    }

    #[test]
    fn any_bytes_survive_json() {
        let path = TreePath::parse(b"sp ace/q\"u%o\xff\nte").unwrap();
        let text = serde_json::to_string(&path).unwrap();
        assert_eq!(serde_json::from_str::<TreePath>(&text).unwrap(), path);
    }
}
