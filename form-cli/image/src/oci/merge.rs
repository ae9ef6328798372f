//! Layers of an image, put together into one tree (OCI image specification, "Image Layer Filesystem Changeset").
//!
//! Nothing is unpacked by its name: a layer changes a tree in memory, contents go into the spool, and what comes out has the form that
//! any other base has. So a name with `..`, a link out of the image or a file below a link changes nothing but the tree.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
};

use crate::{
    BuildError,
    diff::{Diff, Entry, Kind, Meta, XattrValue},
    tree_path::TreePath,
};

/// Names of this kind remove.
const WHITEOUT: &[u8] = b".wh.";
/// What lower layers have in this directory is gone.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names of this kind belong to a file system that layers were once made with.
const RESERVED: &[u8] = b".wh..wh.";
/// A symlink is followed at most this often, as Linux does.
const MAX_SYMLINKS: usize = 40;

/// The tree that some layers make.
#[derive(Debug)]
pub(crate) struct Merger {
    paths: BTreeMap<TreePath, usize>,
    nodes: HashMap<usize, (Meta, Kind)>,
    next: usize,
    /// What the layer under way has made: its whiteouts spare it.
    made: BTreeSet<TreePath>,
    max_files: usize,
}

fn refuse<T>(reason: String) -> Result<T, BuildError> {
    Err(BuildError::FileSystem { reason })
}

impl Merger {
    /// `max_files`: more files than these are refused.
    pub fn new(max_files: usize) -> Self {
        let mut merger = Self { paths: BTreeMap::new(), nodes: HashMap::new(), next: 0, made: BTreeSet::new(), max_files };
        merger.insert(TreePath::root(), Meta::new(0o755, 0, 0), Kind::Directory { opaque: false });
        merger
    }

    /// Begins the next layer.
    pub fn begin_layer(&mut self) {
        self.made.clear();
    }

    /// Whether there are more files than there may be, or were made on the way.
    pub fn is_too_many(&self) -> bool {
        self.paths.len() > self.max_files || self.next > self.max_files.saturating_mul(4)
    }

    /// Takes the next entry of a layer, in the order of its tar stream.
    ///
    /// # Errors
    /// When it leads nowhere: below a file, through a circle of links, a hard link to nothing; or a whiteout that names nothing.
    pub fn add(&mut self, entry: Entry) -> Result<(), BuildError> {
        if self.is_too_many() {
            return refuse("it holds too many files".to_owned());
        }
        let given = entry.path.clone();
        let name = given.name().to_vec();
        let Some(parent) = given.parent() else { return Ok(()) };
        if name == OPAQUE {
            let directory = self.directory(&parent, &given)?;
            self.clear_lower(&directory);
            return Ok(());
        }
        if name.starts_with(RESERVED) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return match hidden {
                b"" | b"." | b".." => refuse(format!("the whiteout {given} names nothing")),
                _ => self.remove_lower(&parent, hidden),
            };
        }
        let path = self.directory(&parent, &given)?.join(&name);
        if path.as_bytes().len() > 4000 {
            return refuse(format!("{given} leads to a path that is too long"));
        }
        match entry.kind {
            Kind::Link { target } => self.link(path, &target, &given),
            kind => {
                self.put(path, entry.meta, kind);
                Ok(())
            }
        }
    }

    /// What came out, in the form of a base.
    pub fn finish(self) -> Diff {
        let mut first: HashMap<usize, TreePath> = HashMap::new();
        let mut entries = Vec::with_capacity(self.paths.len());
        for (path, number) in self.paths {
            let Some((meta, kind)) = self.nodes.get(&number) else { continue };
            if path.is_root() {
                continue;
            }
            let kind = match first.get(&number) {
                Some(target) => Kind::Link { target: target.clone() },
                None => kind.clone(),
            };
            first.entry(number).or_insert_with(|| path.clone());
            entries.push(Entry { path, meta: meta.clone(), kind });
        }
        Diff { removed: Vec::new(), entries }
    }

    fn kind(&self, path: &TreePath) -> Option<&Kind> {
        self.nodes.get(self.paths.get(path)?).map(|(_, kind)| kind)
    }

    fn insert(&mut self, path: TreePath, meta: Meta, kind: Kind) {
        let number = self.next;
        self.next += 1;
        self.nodes.insert(number, (meta, kind));
        self.made.insert(path.clone());
        self.paths.insert(path, number);
    }

    fn put(&mut self, path: TreePath, meta: Meta, kind: Kind) {
        let both_directories = matches!((self.kind(&path), &kind), (Some(Kind::Directory { .. }), Kind::Directory { .. }));
        if both_directories {
            if let Some(node) = self.paths.get(&path).and_then(|number| self.nodes.get_mut(number)) {
                node.0 = meta;
            }
            self.made.insert(path);
            return;
        }
        self.remove(&path);
        self.insert(path, meta, kind);
    }

    /// One more name of a file, of this layer or one below.
    fn link(&mut self, path: TreePath, target: &TreePath, given: &TreePath) -> Result<(), BuildError> {
        let leads_nowhere = || refuse(format!("the hard link {given} leads to {target}, which is no file of this layer or one below"));
        let (Some(parent), name) = (target.parent(), target.name().to_vec()) else { return leads_nowhere() };
        let Some(parent) = self.existing_directory(&parent) else { return leads_nowhere() };
        let target_path = parent.join(&name);
        if target_path == path {
            return leads_nowhere();
        }
        match (self.paths.get(&target_path).copied(), self.kind(&target_path)) {
            (Some(number), Some(kind)) if !matches!(kind, Kind::Directory { .. }) => {
                // A file cannot be above another one, so this leaves the target where it is; a directory may go with what is in it.
                if target_path.as_bytes().starts_with(&path.prefix()) {
                    return leads_nowhere();
                }
                self.remove(&path);
                self.made.insert(path.clone());
                self.paths.insert(path, number);
                Ok(())
            }
            _ => leads_nowhere(),
        }
    }

    /// Removes a path with everything below it. Other names of its files stay.
    fn remove(&mut self, path: &TreePath) {
        for path in self.below(path) {
            self.paths.remove(&path);
            self.made.remove(&path);
        }
        self.paths.remove(path);
        self.made.remove(path);
    }

    fn below(&self, path: &TreePath) -> Vec<TreePath> {
        let prefix = path.prefix();
        let candidates = self.paths.range((Bound::Excluded(path.clone()), Bound::Unbounded)).map(|(found, _)| found);
        // `a-b` sorts between `a` and `a/b`: look at all that begin with the name, keep those behind the slash.
        let named = candidates.take_while(|found| found.as_bytes().starts_with(path.as_bytes()));
        named.filter(|found| found.as_bytes().starts_with(&prefix)).cloned().collect()
    }

    /// A whiteout: what lower layers have there is gone, what this layer has made stays.
    fn remove_lower(&mut self, parent: &TreePath, name: &[u8]) -> Result<(), BuildError> {
        // What is hidden in a directory that is not there is hidden already.
        let Some(parent) = self.existing_directory(parent) else { return Ok(()) };
        let path = parent.join(name);
        if self.made.contains(&path) {
            self.clear_lower(&path);
        } else {
            self.remove(&path);
        }
        Ok(())
    }

    fn clear_lower(&mut self, directory: &TreePath) {
        // From the leaves up: a directory of a lower layer stays while it holds something of this one.
        for path in self.below(directory).into_iter().rev() {
            let holds = matches!(self.kind(&path), Some(Kind::Directory { .. })) && !self.below(&path).is_empty();
            if !self.made.contains(&path) && !holds {
                self.paths.remove(&path);
            }
        }
    }

    fn existing_directory(&self, path: &TreePath) -> Option<TreePath> {
        let found = self.walk(path, None)?;
        matches!(self.kind(&found), Some(Kind::Directory { .. })).then_some(found)
    }

    /// The directory that something lies in, with links followed inside the image; missing ones are made.
    fn directory(&mut self, path: &TreePath, of: &TreePath) -> Result<TreePath, BuildError> {
        let mut missing = Vec::new();
        let found = self.walk(path, Some(&mut missing));
        for path in missing {
            self.insert(path, Meta::new(0o755, 0, 0), Kind::Directory { opaque: false });
        }
        match found {
            Some(found) if matches!(self.kind(&found), Some(Kind::Directory { .. })) => Ok(found),
            _ => refuse(format!("{of} lies below {path}, which is no directory of the image")),
        }
    }

    /// Follows a path as a process in the image would: `..` of the root is the root. Names what would have to be made when `missing` is
    /// there. `None`: a circle of links, a name that cannot be, something below a file, or nothing there.
    fn walk(&self, path: &TreePath, mut missing: Option<&mut Vec<TreePath>>) -> Option<TreePath> {
        let parts = |bytes: &[u8]| bytes.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect::<Vec<_>>();
        let mut waiting = parts(path.as_bytes());
        let mut resolved = TreePath::root();
        let mut followed = 0;
        while let Some(part) = waiting.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    resolved = resolved.parent().unwrap_or_default();
                    continue;
                }
                long if long.len() > 255 || resolved.as_bytes().len() + long.len() > 4000 => return None,
                _ => {}
            }
            let next = resolved.join(&part);
            match self.kind(&next) {
                Some(Kind::Symlink { target: XattrValue(target) }) => {
                    followed += 1;
                    if followed > MAX_SYMLINKS {
                        return None;
                    }
                    if target.starts_with(b"/") {
                        resolved = TreePath::root();
                    }
                    waiting.extend(parts(target));
                }
                Some(Kind::Directory { .. }) => resolved = next,
                Some(_) => return None,
                None => {
                    let missing = missing.as_deref_mut()?;
                    if !missing.contains(&next) {
                        missing.push(next.clone());
                    }
                    resolved = next;
                }
            }
        }
        Some(resolved)
    }
}

#[cfg(test)]
mod tests;
