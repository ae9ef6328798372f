//! Manifests that came in and wait for the import that names them: `<root>/vm-images/incoming/manifests/<digest>`, as plain text.
//!
//! Like a block, one that nobody asks for within a day is removed; like a block, its digest is checked again when it is used.

use std::{
    fs::{self, File},
    path::PathBuf,
};

use form_bundle::{manifest::MAX_MANIFEST_BYTES, travel::Unpacker};
use form_types::Digest;

use crate::{
    ImageEntry, KernelEntry, Store,
    durable::{Draft, make_dir},
    error::{Result, StoreError},
    images::read_bounded,
};

/// A manifest on its way in. Dropped before [`ManifestWriter::finish`] it leaves nothing.
pub struct ManifestWriter {
    digest: Digest,
    unpacker: Unpacker<File>,
    draft: Draft,
    target: PathBuf,
}

impl ManifestWriter {
    /// Takes the next piece of the zstd stream.
    ///
    /// # Errors
    /// [`StoreError::ManifestStream`] when it is none or unfolds to too much; [`StoreError::NoRoom`].
    pub fn write(&mut self, piece: &[u8]) -> Result<()> {
        self.unpacker.write(piece).map_err(|error| broken(error, self.draft.path()))
    }

    /// Checks the text and keeps it. Gives back its length in bytes.
    ///
    /// # Errors
    /// [`StoreError::Manifest`] when it has another digest; those of [`ManifestWriter::write`].
    pub fn finish(self) -> Result<u64> {
        let Self { digest, unpacker, draft, target } = self;
        unpacker.finish().map_err(|error| broken(error, draft.path()))?;
        let written = draft.path().join(TEXT);
        let text = read_bounded(&written, MAX_MANIFEST_BYTES)?;
        let found = Digest::of(&text);
        if found != digest {
            return Err(form_bundle::manifest::ManifestError::Digest { expected: digest, found }.into());
        }
        fs::rename(&written, &target).map_err(StoreError::io("keep a manifest in", &target))?;
        Ok(text.len() as u64)
    }
}

const TEXT: &str = "manifest";

/// An error of the disk is one of ours; every other is the stream's.
fn broken(error: std::io::Error, path: &std::path::Path) -> StoreError {
    match error.raw_os_error() {
        Some(_) => StoreError::io("keep a manifest in", path)(error),
        None => StoreError::ManifestStream(error),
    }
}

impl Store {
    /// Begins to take in the manifest with this digest, as a zstd stream (`form_bundle::travel`).
    ///
    /// # Errors
    /// Those of the file system.
    pub fn manifest_writer(&self, digest: &Digest) -> Result<ManifestWriter> {
        let target = self.uploaded_manifest(digest);
        if let Some(parent) = target.parent() {
            make_dir(parent)?;
        }
        let draft = Draft::new(&self.images)?;
        let path = draft.path().join(TEXT);
        let file = File::create_new(&path).map_err(StoreError::io("make", &path))?;
        let unpacker = Unpacker::new(file).map_err(StoreError::io("write", &path))?;
        Ok(ManifestWriter { digest: *digest, unpacker, draft, target })
    }

    fn uploaded_manifest(&self, digest: &Digest) -> PathBuf {
        self.images.join("incoming/manifests").join(digest.to_string())
    }

    fn take_manifest(&self, digest: &Digest) -> Result<Vec<u8>> {
        let path = self.uploaded_manifest(digest);
        let text = match path.exists() {
            true => read_bounded(&path, MAX_MANIFEST_BYTES)?,
            false => return Err(StoreError::NoManifest(*digest)),
        };
        if Digest::of(&text) == *digest {
            return Ok(text);
        }
        tracing::warn!(manifest = %digest.short(), "a stored manifest is torn and will be asked for again");
        self.forget_manifest(digest);
        Err(StoreError::NoManifest(*digest))
    }

    /// What cannot be removed now is stale tomorrow.
    fn forget_manifest(&self, digest: &Digest) {
        let _ = fs::remove_file(self.uploaded_manifest(digest));
    }

    /// As [`Store::import`], with a manifest that was uploaded. The image that is there already needs none.
    ///
    /// # Errors
    /// As [`Store::import`], and [`StoreError::NoManifest`].
    pub fn import_uploaded(&self, digest: &Digest) -> Result<ImageEntry> {
        if let Ok(entry) = self.by_digest(digest) {
            return Ok(entry);
        }
        let text = match self.take_manifest(digest) {
            Ok(text) => text,
            // Somebody who sent the same was a moment earlier, and with the image there the text is forgotten.
            Err(error) => return self.by_digest(digest).map_err(|_| error),
        };
        let entry = self.import(&text)?;
        self.forget_manifest(digest);
        Ok(entry)
    }

    /// As [`Store::import_kernel`], with a manifest that was uploaded.
    ///
    /// # Errors
    /// As [`Store::import_kernel`], and [`StoreError::NoManifest`].
    pub fn import_kernel_uploaded(&self, digest: &Digest) -> Result<KernelEntry> {
        if let Ok(entry) = self.want_kernel(digest) {
            return Ok(entry);
        }
        let text = match self.take_manifest(digest) {
            Ok(text) => text,
            Err(error) => return self.want_kernel(digest).map_err(|_| error),
        };
        let entry = self.import_kernel(&text)?;
        self.forget_manifest(digest);
        Ok(entry)
    }
}
