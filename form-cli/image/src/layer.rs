//! Finished layers: `layers/KEY/` with `layer.json` (what follows here), `diff.json` and `tree/` (for the sandbox).
//!
//! A layer is made in a directory of another name and renamed, so one that is there is whole.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use form_bundle::BlockMap;
use form_types::Digest;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{BuildError, diff::Diff, error::IoContext, index::Index, sandbox::Sandbox};

/// Part of every key: a change in how layers are made or stored makes new ones.
pub(crate) const RECIPE: &str = "form layer 1";
/// Unfinished work begins with this; what a killed build left is removed by the next.
pub(crate) const TEMPORARY: &str = "tmp-";
pub(crate) const TREE: &str = "tree";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Layer {
    pub key: Digest,
    /// `None` for a base.
    pub parent: Option<Digest>,
    pub text: String,
    /// The file system with this layer and all below it.
    pub blocks: BlockMap,
    pub changed_blocks: u64,
    /// Installed packages with this layer and all below it.
    pub packages: BTreeMap<String, String>,
    /// `/etc/passwd` and `/etc/group` with this layer and all below it.
    pub passwd: String,
    pub group: String,
}

#[derive(Clone, Debug)]
pub(crate) struct LayerStore {
    directory: PathBuf,
}

impl LayerStore {
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Short, because the names of all layers of an image must fit one page of mount options.
    pub fn name(key: &Digest) -> String {
        key.to_string()[..24].to_owned()
    }

    pub fn path(&self, key: &Digest) -> PathBuf {
        self.directory.join(Self::name(key))
    }

    /// The layer, when it is there and readable. A damaged one counts as missing and is replaced.
    pub fn load(&self, key: &Digest) -> Option<Layer> {
        let layer: Layer = read_json(&self.path(key).join("layer.json"))?;
        (layer.key == *key && self.path(key).join(TREE).is_dir()).then_some(layer)
    }

    /// # Errors
    /// When the layer is damaged.
    pub fn load_diff(&self, key: &Digest) -> Result<Diff, BuildError> {
        let path = self.path(key).join("diff.json");
        read_json(&path).ok_or_else(|| BuildError::Cache { path: self.path(key), reason: "diff.json cannot be read".to_owned() })
    }

    /// A layer and those below it, the base first; `None` when one is missing.
    pub fn chain(&self, key: &Digest) -> Option<Vec<Layer>> {
        let mut chain = vec![self.load(key)?];
        while let Some(parent) = chain.last().and_then(|layer| layer.parent) {
            chain.push(self.load(&parent)?);
        }
        chain.reverse();
        Some(chain)
    }

    /// What is in the image after a chain.
    ///
    /// # Errors
    /// When a layer is damaged.
    pub fn index(&self, chain: &[Layer]) -> Result<Index, BuildError> {
        let mut index = Index::new();
        for layer in chain {
            index.apply(&self.load_diff(&layer.key)?);
        }
        Ok(index)
    }

    /// A directory to work in.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn workspace(&self) -> Result<PathBuf, BuildError> {
        let directory = tempfile::Builder::new().prefix(TEMPORARY).tempdir_in(&self.directory).during("create", &self.directory)?.keep();
        // Root inside the sandbox is another user than we are and must get through.
        fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o755)).during("open up", &directory)?;
        Ok(directory)
    }

    /// Publishes the layer in a workspace which holds its `tree`.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn publish(&self, workspace: &Path, layer: &Layer, diff: &Diff, sandbox: &Sandbox) -> Result<(), BuildError> {
        write_json(&workspace.join("diff.json"), diff)?;
        write_json(&workspace.join("layer.json"), layer)?;
        let path = self.path(&layer.key);
        if path.exists() {
            self.discard(&[OsString::from(Self::name(&layer.key))], sandbox)?;
        }
        fs::rename(workspace, &path).during("rename", workspace)
    }

    /// Removes layers or workspaces by the names of their directories.
    ///
    /// # Errors
    /// Those of the disk and the sandbox.
    pub fn discard(&self, names: &[OsString], sandbox: &Sandbox) -> Result<(), BuildError> {
        let mut trees = Vec::new();
        for name in names {
            // Without its record a layer no longer counts, so a removal that is cut short does no harm.
            let _ = fs::remove_file(self.directory.join(name).join("layer.json"));
            for inner in [TREE, "work"] {
                let tree = Path::new(name).join(inner);
                if self.directory.join(&tree).exists() {
                    trees.push(tree.into_os_string());
                }
            }
        }
        sandbox.remove(&self.directory, &trees)?;
        for name in names {
            let path = self.directory.join(name);
            fs::remove_dir_all(&path).during("remove", path)?;
        }
        Ok(())
    }

    /// Every directory there is.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn names(&self) -> Result<Vec<OsString>, BuildError> {
        let entries = fs::read_dir(&self.directory).during("list", &self.directory)?;
        Ok(entries.flatten().map(|entry| entry.file_name()).collect())
    }

    /// Removes what killed builds left. Only while the cache is locked. What cannot be removed is tried again by the next build: it is no
    /// reason to fail this one.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn remove_leftovers(&self, sandbox: &Sandbox) -> Result<(), BuildError> {
        let is_leftover = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with(TEMPORARY));
        for leftover in self.names()?.into_iter().filter(is_leftover) {
            if let Err(error) = self.discard(std::slice::from_ref(&leftover), sandbox) {
                tracing::warn!(leftover = %leftover.display(), "what a killed build left cannot be removed: {error}");
            }
        }
        Ok(())
    }
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Writes a record so that it is there whole or not at all, also after a power cut.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), BuildError> {
    write_whole(path, &serde_json::to_vec(value)?)
}

pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    use std::io::Write;
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).during("create", directory)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).during("write", path)?;
    file.persist(path).map_err(|error| error.error).during("rename", path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leftover_that_cannot_be_removed_keeps_no_build_back() {
        let (directory, sandbox) = (tempfile::tempdir().unwrap(), Sandbox::detect().unwrap());
        fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let store = LayerStore { directory: directory.path().to_owned() };
        // No directory, which is not what a killed build leaves.
        fs::write(directory.path().join("tmp-a"), "").unwrap();
        for name in ["tmp-b", "kept"] {
            fs::create_dir(directory.path().join(name)).unwrap();
            sandbox.create_dir(&directory.path().join(name).join(TREE)).unwrap();
        }
        store.remove_leftovers(&sandbox).unwrap();
        let mut left = store.names().unwrap();
        left.sort();
        assert_eq!(left, ["kept", "tmp-a"]);
    }
}
