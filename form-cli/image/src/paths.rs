//! Where the builder keeps things.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// One directory with everything: `~/.cache/form` unless `XDG_CACHE_HOME` or the caller says otherwise.
///
/// `layers/KEY/` a finished layer · `blocks/ab/DIGEST` compressed blocks · `bases/` what a base resolved to · `oci/` blobs of
/// registries · `passing/DIGEST/` blocks of a host's image that is being exported · `images/NAME/` manifests by
/// version · `kernel/DIGEST/` kernel bundles · `own-kernels/DIGEST/` those of kernels that images bring along · `lock` held by the running build.
#[derive(Clone, Debug)]
pub struct CachePaths {
    root: PathBuf,
}

impl CachePaths {
    /// Uses `root`, which is made when it is missing.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// `$XDG_CACHE_HOME/form`, else `~/.cache/form`; `None` when neither variable is set.
    pub fn from_environment() -> Option<Self> {
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
        Some(Self::new(cache.join("form")))
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(crate) fn blocks(&self) -> PathBuf {
        self.root.join("blocks")
    }

    pub(crate) fn bases(&self) -> PathBuf {
        self.root.join("bases")
    }

    pub(crate) fn oci(&self) -> PathBuf {
        self.root.join("oci")
    }

    /// Blocks of images of hosts, on their way to where they are exported to.
    pub(crate) fn passing(&self) -> PathBuf {
        self.root.join("passing")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub(crate) fn kernels(&self) -> PathBuf {
        self.root.join("kernel")
    }

    pub(crate) fn own_kernels(&self) -> PathBuf {
        self.root.join("own-kernels")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(crate) fn create(&self) -> io::Result<()> {
        for directory in [self.layers(), self.blocks(), self.bases(), self.oci(), self.images(), self.kernels(), self.own_kernels()] {
            fs::create_dir_all(directory)?;
        }
        Ok(())
    }
}
