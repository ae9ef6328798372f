//! `COPY`: from the build context to a layer, without running anything of the image.

use std::{collections::BTreeMap, os::unix::ffi::OsStrExt};

use form_types::spec::Copy;
use serde::Serialize;

use crate::{
    BuildError,
    accounts::resolve_owner,
    context::{Content, Context, Found},
    diff::{Diff, Entry, Kind, Meta},
    index::Index,
    layer::Layer,
    tarball::Spool,
    tree_path::{TreePath, escape},
};

/// A `COPY` with its sources found.
pub(crate) struct Plan<'a> {
    step: &'a Copy,
    line: u32,
    found: Vec<Found>,
}

impl<'a> Plan<'a> {
    /// # Errors
    /// When a source is wrong.
    pub fn new(step: &'a Copy, line: u32, context: &Context) -> Result<Self, BuildError> {
        let refuse = |reason: String| BuildError::Copy { line, reason };
        let found = context.find(&step.sources).map_err(refuse)?;
        let many = found.len() > 1;
        if many && !step.to.ends_with('/') {
            return Err(refuse(format!("several files cannot become `{}`: end it with `/` to copy into a directory", step.to)));
        }
        Ok(Self { step, line, found })
    }

    /// Everything the layer depends on.
    pub fn identity(&self) -> impl Serialize {
        let items: Vec<_> = self
            .found
            .iter()
            .flat_map(|found| {
                let name = found.name.as_ref().map(|name| escape(name.as_bytes()));
                found
                    .items
                    .iter()
                    .map(move |item| (name.clone(), escape(item.below.as_os_str().as_bytes()), item.mode, item.content.identity()))
            })
            .collect();
        (self.step.to.clone(), self.step.chown.clone(), self.step.chmod.clone(), items)
    }

    /// The layer: the copied files, and the directories above them as they are in the image.
    ///
    /// # Errors
    /// When the destination cannot be, the owner is unknown, or a file changed since it was looked at.
    pub fn diff(&self, index: &Index, parent: &Layer, spool: &Spool) -> Result<Diff, BuildError> {
        let refuse = |reason: String| BuildError::Copy { line: self.line, reason };
        let owner =
            self.step.chown.as_deref().map(|owner| resolve_owner(owner, &parent.passwd, &parent.group)).transpose().map_err(refuse)?;
        let (uid, gid) = owner.unwrap_or((0, 0));
        let chmod = self
            .step
            .chmod
            .as_deref()
            .map(|digits| {
                u32::from_str_radix(digits, 8)
                    .ok()
                    .filter(|mode| *mode <= 0o7777)
                    .ok_or_else(|| refuse(format!("`--chmod={digits}`: a mode is octal digits up to 7777")))
            })
            .transpose()?;
        let asked = TreePath::parse(self.step.to.as_bytes()).map_err(|error| refuse(error.to_string()))?;
        let circle = || refuse(format!("`{}` leads through a circle of symbolic links in the image", self.step.to));
        let to = index.resolve(&asked).ok_or_else(circle)?;
        let into_directory = self.step.to.ends_with('/') || index.get(&to).is_some_and(|node| node.is_directory());
        let mut entries: BTreeMap<TreePath, Entry> = BTreeMap::new();
        for found in &self.found {
            let (base, is_tree) = match &found.name {
                Some(name) if into_directory => (to.join(name.as_bytes()), false),
                Some(_) => (to.clone(), false),
                None => (to.clone(), true),
            };
            if is_tree && !base.is_root() && index.get(&base).is_none_or(|node| !node.is_directory()) {
                entries.insert(base.clone(), directory(base.clone(), chmod.unwrap_or(0o755), uid, gid));
            }
            for item in &found.items {
                let path = TreePath::parse(&[base.as_bytes(), b"/", item.below.as_os_str().as_bytes()].concat())
                    .map_err(|error| refuse(error.to_string()))?;
                // A link in the image on the way is followed, one at the end is replaced.
                let path = match path.parent().filter(|_| !item.below.as_os_str().is_empty()) {
                    Some(parent) => index.resolve(&parent).ok_or_else(circle)?.join(path.name()),
                    None => path,
                };
                let mut mode = chmod.unwrap_or(item.mode);
                let kind = match &item.content {
                    Content::Directory
                        if index.get(&path).is_some_and(|node| node.is_directory()) && self.step.chown.is_none() && chmod.is_none() =>
                    {
                        continue;
                    }
                    Content::Directory => Kind::Directory { opaque: false },
                    Content::Symlink(target) => {
                        mode = 0o777;
                        Kind::Symlink { target: target.clone() }
                    }
                    content => self.file(content, spool)?,
                };
                entries.insert(path.clone(), Entry { path, meta: Meta::new(mode, uid, gid), kind });
            }
        }
        add_parents(&mut entries, index).map_err(refuse)?;
        let mut diff = Diff { removed: Vec::new(), entries: entries.into_values().collect() };
        diff.normalise();
        Ok(diff)
    }

    fn file(&self, content: &Content, spool: &Spool) -> Result<Kind, BuildError> {
        let failed = |reason: String| BuildError::Copy { line: self.line, reason };
        let mut reader = content.open().map_err(|error| failed(error.to_string()))?.ok_or_else(|| failed("no file".to_owned()))?;
        let (size, digest) = spool.add(&mut reader)?;
        if let Content::File { source, digest: expected } = content
            && *expected != digest
        {
            return Err(failed(format!("{} changed while it was copied: build again", source.display())));
        }
        Ok(Kind::File { size, digest })
    }
}

fn directory(path: TreePath, mode: u32, uid: u32, gid: u32) -> Entry {
    Entry { path, meta: Meta::new(mode, uid, gid), kind: Kind::Directory { opaque: false } }
}

/// A layer's tree is laid over its parents', so it holds every directory above its files, with the attributes these have already.
pub(crate) fn add_parents(entries: &mut BTreeMap<TreePath, Entry>, index: &Index) -> Result<(), String> {
    let paths: Vec<TreePath> = entries.keys().cloned().collect();
    for path in paths {
        for above in path.ancestors().into_iter().filter(|above| !above.is_root()) {
            if let Some(entry) = entries.get(&above) {
                if !matches!(entry.kind, Kind::Directory { .. }) {
                    return Err(format!("{above} would be a file and a directory"));
                }
                continue;
            }
            let entry = match index.get(&above) {
                Some(node) if node.is_directory() => {
                    Entry { path: above.clone(), meta: node.meta.clone(), kind: Kind::Directory { opaque: false } }
                }
                Some(_) => return Err(format!("{above} is a file in the image, so nothing can be copied below it")),
                None => directory(above.clone(), 0o755, 0, 0),
            };
            entries.insert(above, entry);
        }
    }
    Ok(())
}

/// The layer that makes one directory and those above it, where they are missing.
pub(crate) fn directory_diff(index: &Index, path: &TreePath) -> Result<Diff, String> {
    let mut entries = BTreeMap::new();
    if index.get(path).is_none() {
        entries.insert(path.clone(), directory(path.clone(), 0o755, 0, 0));
        add_parents(&mut entries, index)?;
    }
    Ok(Diff { removed: Vec::new(), entries: entries.into_values().collect() })
}
