//! What an image holds after some layers: path by path, with hard links counted.
//!
//! It is rebuilt from the layers' differences, and tells the file system editor what to remove, what to keep and what to make.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
};

use crate::{
    diff::{Diff, Entry, Kind, Meta},
    tree_path::TreePath,
};

#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    paths: BTreeMap<TreePath, usize>,
    nodes: HashMap<usize, Node>,
    next: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub meta: Meta,
    /// Never [`Kind::Link`].
    pub kind: Kind,
    pub links: u32,
}

impl Node {
    pub fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory { .. })
    }
}

/// One change to a tree, in an order in which each can be done when those before it are done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A file, or a directory that is empty by now.
    Remove {
        path: TreePath,
        directory: bool,
    },
    Create(Entry),
    /// Only owner, mode, times or attributes are new.
    Update {
        entry: Entry,
        old: Meta,
    },
    /// How many names a file has now.
    Links {
        path: TreePath,
        links: u32,
    },
}

/// A symlink is followed at most this often, as Linux does.
const MAX_SYMLINKS: usize = 40;

impl Index {
    /// A tree with nothing but its root.
    pub fn new() -> Self {
        let mut index = Self::default();
        index.insert(TreePath::root(), Meta::new(0o755, 0, 0), Kind::Directory { opaque: false });
        index
    }

    pub fn get(&self, path: &TreePath) -> Option<&Node> {
        self.nodes.get(self.paths.get(path)?)
    }

    /// Everything at or below a path, in order.
    pub fn below<'a>(&'a self, path: &'a TreePath) -> impl Iterator<Item = (&'a TreePath, &'a Node)> {
        let prefix = path.prefix();
        let from = if path.is_root() { Bound::Included(path) } else { Bound::Excluded(path) };
        // `a-b` sorts between `a` and `a/b`: look at all that begin with the name, keep those behind the slash.
        let candidates = self.paths.range((from, Bound::Unbounded)).take_while(|(found, _)| found.as_bytes().starts_with(path.as_bytes()));
        let inside = candidates.filter(move |(found, _)| found.as_bytes().starts_with(&prefix) && *found != path);
        let itself = self.paths.get_key_value(path);
        itself.into_iter().chain(inside).filter_map(|(found, number)| Some((found, self.nodes.get(number)?)))
    }

    /// Applies a layer and says what it did.
    pub fn apply(&mut self, diff: &Diff) -> Vec<Change> {
        let mut changes = Vec::new();
        for path in &diff.removed {
            self.remove_tree(path, &mut changes);
        }
        for entry in &diff.entries {
            if matches!(entry.kind, Kind::Directory { opaque: true }) {
                let inside: Vec<TreePath> =
                    self.below(&entry.path).map(|(path, _)| path.clone()).filter(|path| *path != entry.path).collect();
                for path in inside.iter().rev() {
                    self.remove_one(path, &mut changes);
                }
            }
        }
        for entry in &diff.entries {
            if !self.can_update(entry) {
                self.remove_tree(&entry.path, &mut changes);
            }
        }
        let mut linked = BTreeMap::new();
        for entry in &diff.entries {
            self.add(entry, &mut changes, &mut linked);
        }
        changes.extend(linked.into_iter().map(|(path, links)| Change::Links { path, links }));
        changes
    }

    /// Whether what is there can stay and only be given other attributes.
    fn can_update(&self, entry: &Entry) -> bool {
        let Some(node) = self.get(&entry.path) else { return true };
        match (&node.kind, &entry.kind) {
            (Kind::Directory { .. }, Kind::Directory { .. }) => true,
            // A file with several names stops being the others when it is copied up, so it must be made anew.
            (Kind::File { .. }, Kind::File { .. }) => node.kind == entry.kind && node.links == 1 && node.meta.xattrs == entry.meta.xattrs,
            _ => false,
        }
    }

    fn add(&mut self, entry: &Entry, changes: &mut Vec<Change>, linked: &mut BTreeMap<TreePath, u32>) {
        if let Kind::Link { target } = &entry.kind {
            if let Some(number) = self.paths.get(target).copied()
                && let Some(node) = self.nodes.get_mut(&number)
            {
                node.links += 1;
                linked.insert(target.clone(), node.links);
                self.paths.insert(entry.path.clone(), number);
                changes.push(Change::Create(entry.clone()));
            }
            return;
        }
        let Some(number) = self.paths.get(&entry.path).copied() else {
            self.insert(entry.path.clone(), entry.meta.clone(), entry.kind.clone());
            changes.push(Change::Create(entry.clone()));
            return;
        };
        if let Some(node) = self.nodes.get_mut(&number)
            && node.meta != entry.meta
        {
            let old = std::mem::replace(&mut node.meta, entry.meta.clone());
            changes.push(Change::Update { entry: entry.clone(), old });
        }
    }

    fn insert(&mut self, path: TreePath, meta: Meta, kind: Kind) {
        let number = self.next;
        self.next += 1;
        self.paths.insert(path, number);
        self.nodes.insert(number, Node { meta, kind, links: 1 });
    }

    fn remove_tree(&mut self, path: &TreePath, changes: &mut Vec<Change>) {
        let all: Vec<TreePath> = self.below(path).map(|(path, _)| path.clone()).collect();
        for path in all.iter().rev() {
            self.remove_one(path, changes);
        }
    }

    fn remove_one(&mut self, path: &TreePath, changes: &mut Vec<Change>) {
        if path.is_root() {
            return;
        }
        let Some(number) = self.paths.remove(path) else { return };
        let mut directory = false;
        if let Some(node) = self.nodes.get_mut(&number) {
            directory = node.is_directory();
            node.links -= 1;
            if node.links == 0 {
                self.nodes.remove(&number);
            }
        }
        changes.push(Change::Remove { path: path.clone(), directory });
    }

    /// Follows the symbolic links in a path of the image, the last part included, as a process in the image would.
    /// Parts that do not exist stay as they are. `None`: a circle of links.
    pub fn resolve(&self, path: &TreePath) -> Option<TreePath> {
        let mut waiting: Vec<Vec<u8>> = path.as_bytes().split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut resolved = TreePath::root();
        let mut followed = 0;
        while let Some(part) = waiting.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    resolved = resolved.parent().unwrap_or_default();
                    continue;
                }
                _ => {}
            }
            let next = resolved.join(&part);
            match self.get(&next).map(|node| &node.kind) {
                Some(Kind::Symlink { target }) => {
                    followed += 1;
                    if followed > MAX_SYMLINKS {
                        return None;
                    }
                    if target.0.starts_with(b"/") {
                        resolved = TreePath::root();
                    }
                    waiting.extend(target.0.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
                _ => resolved = next,
            }
        }
        Some(resolved)
    }
}

#[cfg(test)]
mod tests {
    use form_types::Digest;

    use super::*;
    use crate::diff::XattrValue;

    fn path(text: &str) -> TreePath {
        TreePath::parse(text.as_bytes()).unwrap()
    }

    fn entry(text: &str, kind: Kind) -> Entry {
        Entry { path: path(text), meta: Meta::new(0o755, 0, 0), kind }
    }

    fn file(text: &str, content: &str) -> Entry {
        entry(text, Kind::File { size: content.len() as u64, digest: Digest::of(content.as_bytes()) })
    }

    fn directory(text: &str) -> Entry {
        entry(text, Kind::Directory { opaque: false })
    }

    fn diff(removed: &[&str], entries: Vec<Entry>) -> Diff {
        let mut diff = Diff { removed: removed.iter().map(|text| path(text)).collect(), entries };
        diff.normalise();
        diff
    }

    #[test]
    fn removals_go_from_the_leaves_up_and_spare_neighbours() {
        let mut index = Index::new();
        index.apply(&diff(&[], vec![directory("a"), directory("a/b"), file("a/b/c", "x"), file("a-b", "y"), file("ab", "z")]));
        let changes = index.apply(&diff(&["a"], vec![]));
        let removed: Vec<String> =
            changes.iter().map(|change| matches!(change, Change::Remove { .. }).then(|| format!("{change:?}")).unwrap()).collect();
        assert_eq!(removed.len(), 3);
        assert!(removed[0].contains("/a/b/c"));
        assert!(index.get(&path("a-b")).is_some() && index.get(&path("ab")).is_some() && index.get(&path("a")).is_none());
    }

    #[test]
    fn equal_files_are_kept_and_kinds_are_swapped() {
        let mut index = Index::new();
        index.apply(&diff(&[], vec![file("f", "x"), directory("d"), file("d/in", "y")]));
        assert!(index.apply(&diff(&[], vec![file("f", "x")])).is_empty());
        let changes = index.apply(&diff(&[], vec![directory("f"), file("d", "now a file")]));
        assert_eq!(changes.iter().filter(|change| matches!(change, Change::Remove { .. })).count(), 3);
        assert_eq!(changes.iter().filter(|change| matches!(change, Change::Create(_))).count(), 2);
    }

    #[test]
    fn hard_links_are_counted() {
        let mut index = Index::new();
        let changes = index.apply(&diff(&[], vec![file("a", "x"), entry("b", Kind::Link { target: path("a") })]));
        assert_eq!(changes.last(), Some(&Change::Links { path: path("a"), links: 2 }));
        index.apply(&diff(&["a"], vec![]));
        assert_eq!(index.get(&path("b")).unwrap().links, 1);
    }

    #[test]
    fn opaque_directories_hide_what_was_there() {
        let mut index = Index::new();
        index.apply(&diff(&[], vec![directory("d"), file("d/old", "x")]));
        index.apply(&diff(&[], vec![entry("d", Kind::Directory { opaque: true }), file("d/new", "y")]));
        assert!(index.get(&path("d/old")).is_none() && index.get(&path("d/new")).is_some());
    }

    #[test]
    fn links_are_followed_inside_the_image() {
        let link = |text: &str, target: &str| entry(text, Kind::Symlink { target: XattrValue(target.as_bytes().to_vec()) });
        let mut index = Index::new();
        index.apply(&diff(
            &[],
            vec![
                directory("usr"),
                directory("usr/lib"),
                link("lib", "usr/lib"),
                link("abs", "/lib/x"),
                link("up", "../../../usr"),
                link("loop", "loop"),
            ],
        ));
        assert_eq!(index.resolve(&path("lib/foo")), Some(path("usr/lib/foo")));
        assert_eq!(index.resolve(&path("abs/y")), Some(path("usr/lib/x/y")));
        assert_eq!(index.resolve(&path("up/z")), Some(path("usr/z")));
        assert_eq!(index.resolve(&path("loop/z")), None);
    }
}
