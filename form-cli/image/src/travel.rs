//! Images on their way between machines: as files, and by registries.

use std::{path::Path, sync::Arc};

use form_types::Name;

use crate::{
    BuildError, BuildEvent, BuildObserver, Builder, BuiltImage, Cancel, OciDigest, OciError, OciReference, Original, Registries,
    artifact::{
        layout::{self, Exported},
        take::Taking,
    },
    block_store::BlockStore,
    build::lock,
    error::IoContext,
    oci::{
        BlobStore,
        artifact::{self, Found, Pushed},
    },
};

/// What there was under a reference.
#[derive(Clone, Debug)]
pub enum Pulled {
    /// An image of ours, in the store.
    Image(Box<BuiltImage>),
    /// Something else, with this digest.
    Another(OciDigest),
}

impl Builder {
    /// Whether something can be exported to `to`.
    ///
    /// # Errors
    /// When something is there, or it cannot be looked at.
    pub fn check_free(to: &Path, is_directory: bool) -> Result<(), BuildError> {
        layout::check_free(to, is_directory)
    }

    /// Writes an image as an OCI image layout to `to`, which is not there yet: a directory or a tar file. It appears whole or not at all.
    ///
    /// # Errors
    /// When a block of it is damaged, something is at `to`, the disk is full, or it is cancelled.
    pub fn export(
        &self,
        original: &Original,
        to: &Path,
        is_directory: bool,
        cancel: &Cancel,
        observer: &mut dyn BuildObserver,
    ) -> Result<Exported, BuildError> {
        layout::export(original, to, is_directory, cancel, observer)
    }

    /// Takes in what [`Builder::export`] wrote, under `name` when one is given.
    ///
    /// # Errors
    /// When it is something else, not whole, the disk is full, or it is cancelled. Nothing of it is left then.
    pub fn import(
        &self,
        from: &Path,
        name: Option<&Name>,
        cancel: &Cancel,
        observer: &mut dyn BuildObserver,
    ) -> Result<BuiltImage, BuildError> {
        self.paths.create().during("create", self.paths.root())?;
        let _lock = lock(&self.paths.lock(), cancel, observer)?;
        layout::import((&self.store(), &BlockStore::new(self.paths.blocks())), from, name, cancel, observer)
    }

    /// Sends an image to a registry, under the tag of `reference`. What the registry has is not sent again.
    ///
    /// # Errors
    /// When a block of it is damaged, the registry does not take it, or it is cancelled.
    pub fn push(
        &self,
        original: &Arc<Original>,
        reference: &OciReference,
        registries: &Registries,
        cancel: &Cancel,
        observer: &mut dyn BuildObserver,
    ) -> Result<Pushed, BuildError> {
        let mut line = |line: &str| observer.event(BuildEvent::Output { line });
        artifact::push(original, reference, registries, cancel, &mut line)
    }

    /// Takes in what [`Builder::push`] sent, under `name` when one is given. What was fetched before it broke off is not fetched again.
    ///
    /// # Errors
    /// When it cannot be had, is not whole, the disk is full, or it is cancelled. No image and no block of it is left then.
    pub fn pull(
        &self,
        reference: &OciReference,
        name: Option<&Name>,
        registries: &Registries,
        cancel: &Cancel,
        observer: &mut dyn BuildObserver,
    ) -> Result<Pulled, BuildError> {
        self.paths.create().during("create", self.paths.root())?;
        let _lock = lock(&self.paths.lock(), cancel, observer)?;
        let blobs = BlobStore::new(self.paths.oci());
        blobs.remove_leftovers();
        let from = reference.to_string();
        let mut line = |line: &str| observer.event(BuildEvent::Output { line });
        let fetched = artifact::fetch(reference, registries, &blobs, cancel, &mut line).map_err(|source| match source {
            OciError::Cancelled => BuildError::Interrupted,
            source => BuildError::Registry { from: from.clone(), source },
        })?;
        let artifact = match fetched {
            Found::Ours(artifact) => artifact,
            Found::Another(digest) => return Ok(Pulled::Another(digest)),
        };
        let taking = Taking { from: &from, cancel };
        let blocks = BlockStore::new(self.paths.blocks());
        let image = layout::take((&self.store(), &blocks), &artifact, &blobs, name, &taking, observer)?;
        artifact.layers.iter().chain([&artifact.config]).for_each(|blob| blobs.remove(&blob.digest));
        Ok(Pulled::Image(Box::new(image)))
    }
}
