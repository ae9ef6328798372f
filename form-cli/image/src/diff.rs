//! What a layer changes, as data: the common form of a base, a `RUN`, a `COPY`.

use std::collections::BTreeMap;

use form_types::Digest;
use serde::{Deserialize, Serialize};

use crate::tree_path::{TreePath, escape, unescape};

/// No time in an image is later than 2025-01-01: a file that a build made says nothing about when.
pub(crate) const EPOCH: u32 = 1_735_689_600;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Diff {
    /// Paths that are gone, with everything below them.
    pub removed: Vec<TreePath>,
    /// Sorted by path, so a directory comes before what is in it.
    pub entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub path: TreePath,
    pub meta: Meta,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// The twelve permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds, at most [`EPOCH`].
    pub mtime: u32,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, XattrValue>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct XattrValue(pub Vec<u8>);

impl TryFrom<String> for XattrValue {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        unescape(&text).map(Self).ok_or_else(|| "bad escape".to_owned())
    }
}

impl From<XattrValue> for String {
    fn from(value: XattrValue) -> Self {
        escape(&value.0)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    File {
        size: u64,
        digest: Digest,
    },
    /// Another name of a file that comes before it in the same layer.
    Link {
        target: TreePath,
    },
    /// `opaque`: what the parent layers have below it is gone.
    Directory {
        opaque: bool,
    },
    Symlink {
        target: XattrValue,
    },
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

impl Meta {
    pub fn new(mode: u32, uid: u32, gid: u32) -> Self {
        Self { mode, uid, gid, mtime: EPOCH, xattrs: BTreeMap::new() }
    }
}

impl Diff {
    /// Brings the entries into their order; of two for one path the later one counts. Of the names of a file the first in order
    /// becomes the file and the others its links, whichever order they came in.
    pub fn normalise(&mut self) {
        let mut by_path = BTreeMap::new();
        for entry in self.entries.drain(..) {
            by_path.insert(entry.path.clone(), entry);
        }
        let mut names: BTreeMap<TreePath, Vec<TreePath>> = BTreeMap::new();
        for entry in by_path.values() {
            if let Kind::Link { target } = &entry.kind {
                names.entry(end_of_links(&by_path, target).clone()).or_default().push(entry.path.clone());
            }
        }
        for (target, links) in &names {
            for link in links {
                if let Some(entry) = by_path.get_mut(link) {
                    entry.kind = Kind::Link { target: target.clone() };
                }
            }
        }
        for (target, links) in names {
            let Some(first) = links.iter().min().filter(|first| **first < target).cloned() else { continue };
            let Some(file) = by_path.remove(&target) else { continue };
            for path in links.into_iter().chain([target]) {
                let kind = if path == first { file.kind.clone() } else { Kind::Link { target: first.clone() } };
                by_path.insert(path.clone(), Entry { path, meta: file.meta.clone(), kind });
            }
        }
        self.entries = by_path.into_values().collect();
        self.removed.sort();
        self.removed.dedup();
    }
}

/// What a link to a link is one of. In a circle: one of those that are in it.
fn end_of_links<'a>(entries: &'a BTreeMap<TreePath, Entry>, target: &'a TreePath) -> &'a TreePath {
    let mut end = target;
    for _ in 0..entries.len() {
        match entries.get(end).map(|entry| &entry.kind) {
            Some(Kind::Link { target }) => end = target,
            _ => break,
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_is_the_file() {
        let path = |text: &str| TreePath::parse(text.as_bytes()).unwrap();
        let kind = Kind::File { size: 1, digest: Digest::of(b"x") };
        let entry = |text: &str, kind: Kind| Entry { path: path(text), meta: Meta::new(0o644, 0, 0), kind };
        let link = Kind::Link { target: path("a/x") };
        let mut diff = Diff { removed: vec![], entries: vec![entry("a/x", kind.clone()), entry("a-b", link.clone()), entry("z", link)] };
        diff.normalise();
        let first = Kind::Link { target: path("a-b") };
        assert_eq!(diff.entries, [entry("a-b", kind), entry("a/x", first.clone()), entry("z", first)]);
    }

    #[test]
    fn a_link_to_a_link_is_one_to_the_file() {
        let path = |text: &str| TreePath::parse(text.as_bytes()).unwrap();
        let kind = Kind::File { size: 1, digest: Digest::of(b"x") };
        let entry = |text: &str, kind: Kind| Entry { path: path(text), meta: Meta::new(0o644, 0, 0), kind };
        let link = |text: &str| Kind::Link { target: path(text) };
        let mut diff = Diff { removed: vec![], entries: vec![entry("c", kind.clone()), entry("b", link("c")), entry("a", link("b"))] };
        diff.normalise();
        assert_eq!(diff.entries, [entry("a", kind), entry("b", link("a")), entry("c", link("a"))]);
        let circle = vec![entry("a", link("b")), entry("b", link("a"))];
        let mut diff = Diff { removed: vec![], entries: circle };
        diff.normalise();
        assert!(diff.entries.iter().all(|entry| matches!(entry.kind, Kind::Link { .. })));
    }
}
