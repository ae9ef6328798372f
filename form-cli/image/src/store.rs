//! The builder's images: `images/NAME/VERSION.json` is a manifest, byte for byte, and a version is a number from 1 on.

use std::{fs, io, path::PathBuf, time::SystemTime};

use form_bundle::{Manifest, manifest::ManifestError};
use form_types::{Digest, ImageReference, Name};

use crate::{BuildError, CachePaths, block_store::BlockStore, layer::write_whole};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("no image `{0}` was built on this machine")]
    NotFound(ImageReference),
    #[error("the manifest of image `{image}` is damaged: remove it with `form image rm --local {image}` and build it again")]
    Manifest { image: ImageReference, source: ManifestError },
    #[error("cannot use {path}")]
    Io { path: PathBuf, source: io::Error },
}

/// An image in the store, without its manifest.
#[derive(Clone, Debug)]
pub struct ImageRecord {
    pub name: Name,
    pub version: u32,
    pub digest: Digest,
    pub created: SystemTime,
    /// Bytes of the root file system.
    pub size: u64,
    /// Plain bytes of its blocks.
    pub stored_bytes: u64,
}

/// What [`ImageStore::verify`] found.
#[derive(Clone, Debug, Default)]
pub struct VerifyReport {
    pub blocks: u64,
    /// Blocks that are missing or do not have their digest.
    pub bad: Vec<Digest>,
}

#[derive(Clone, Debug)]
pub struct ImageStore {
    directory: PathBuf,
    blocks: BlockStore,
}

impl ImageStore {
    pub fn new(paths: &CachePaths) -> Self {
        Self { directory: paths.images(), blocks: BlockStore::new(paths.blocks()) }
    }

    fn path(&self, name: &Name, version: u32) -> PathBuf {
        self.directory.join(name.as_str()).join(format!("{version}.json"))
    }

    /// The versions of an image, oldest first; empty when there is none.
    ///
    /// # Errors
    /// When the directory is there but cannot be read.
    pub fn versions(&self, name: &Name) -> Result<Vec<u32>, StoreError> {
        let path = self.directory.join(name.as_str());
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(StoreError::Io { path, source }),
        };
        let number = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_suffix(".json")?.parse().ok();
        let mut versions: Vec<u32> = entries.flatten().filter_map(number).collect();
        versions.sort_unstable();
        Ok(versions)
    }

    /// All images, by name and version.
    ///
    /// # Errors
    /// When the directory cannot be read or a manifest is damaged.
    pub fn list(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(StoreError::Io { path: self.directory.clone(), source }),
        };
        let mut names: Vec<Name> = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        names.sort();
        let mut records = Vec::new();
        for name in names {
            for version in self.versions(&name)? {
                records.push(self.get(&ImageReference { name: name.clone(), version: Some(version) })?.0);
            }
        }
        Ok(records)
    }

    /// An image and its manifest; without a version the newest.
    ///
    /// # Errors
    /// When there is none, or its manifest is damaged.
    pub fn get(&self, image: &ImageReference) -> Result<(ImageRecord, Manifest), StoreError> {
        self.text(image).map(|(record, _, manifest)| (record, manifest))
    }

    /// An image with the text of its manifest, which its digest is of.
    ///
    /// # Errors
    /// As [`ImageStore::get`].
    pub(crate) fn text(&self, image: &ImageReference) -> Result<(ImageRecord, Vec<u8>, Manifest), StoreError> {
        let not_found = || StoreError::NotFound(image.clone());
        let version = match image.version {
            Some(version) => version,
            None => *self.versions(&image.name)?.last().ok_or_else(not_found)?,
        };
        let path = self.path(&image.name, version);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_found()),
            Err(source) => return Err(StoreError::Io { path, source }),
        };
        let reference = ImageReference { name: image.name.clone(), version: Some(version) };
        let manifest = Manifest::decode(&bytes).map_err(|source| StoreError::Manifest { image: reference, source })?;
        let created = fs::metadata(&path).and_then(|meta| meta.modified()).map_err(|source| StoreError::Io { path, source })?;
        let record = ImageRecord {
            name: image.name.clone(),
            version,
            digest: Digest::of(&bytes),
            created,
            size: manifest.rootfs.blocks.size(),
            stored_bytes: manifest.rootfs.blocks.stored_bytes(),
        };
        Ok((record, bytes, manifest))
    }

    /// Keeps a manifest under the next version of its name, unless the newest is the same. Gives the version, and whether it was there.
    pub(crate) fn add(&self, manifest: &Manifest) -> Result<(u32, bool), BuildError> {
        let bytes = manifest.encode()?;
        let last = self.versions(&manifest.name)?.last().copied().unwrap_or(0);
        if last > 0 && fs::read(self.path(&manifest.name, last)).is_ok_and(|found| found == bytes) {
            return Ok((last, true));
        }
        let path = self.path(&manifest.name, last + 1);
        let directory = self.directory.join(manifest.name.as_str());
        fs::create_dir_all(&directory).map_err(|source| StoreError::Io { path: directory, source })?;
        write_whole(&path, &bytes)?;
        Ok((last + 1, false))
    }

    /// Removes one version, or all without one. Blocks stay until [`crate::Builder::prune`].
    ///
    /// # Errors
    /// When there is none, or it cannot be removed.
    pub fn remove(&self, image: &ImageReference) -> Result<Vec<u32>, StoreError> {
        let mut versions = self.versions(&image.name)?;
        versions.retain(|version| image.version.is_none_or(|wanted| wanted == *version));
        if versions.is_empty() {
            return Err(StoreError::NotFound(image.clone()));
        }
        for version in &versions {
            let path = self.path(&image.name, *version);
            fs::remove_file(&path).map_err(|source| StoreError::Io { path, source })?;
        }
        // It stays when versions are left.
        let _ = fs::remove_dir(self.directory.join(image.name.as_str()));
        Ok(versions)
    }

    /// Reads every block of an image and compares it with its name.
    ///
    /// # Errors
    /// When there is no such image.
    pub fn verify(&self, image: &ImageReference) -> Result<VerifyReport, StoreError> {
        let (_, manifest) = self.get(image)?;
        let mut report = VerifyReport::default();
        for digest in manifest.rootfs.blocks.digests() {
            report.blocks += 1;
            if self.blocks.read(&digest).is_err() {
                report.bad.push(digest);
            }
        }
        Ok(report)
    }

    /// The plain bytes of a block, checked.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn read_block(&self, digest: &Digest) -> Result<Vec<u8>, BuildError> {
        self.blocks.read(digest)
    }

    /// The zstd frame of a block, as it travels. Not checked: who receives it does.
    ///
    /// # Errors
    /// When it is missing.
    pub fn read_frame(&self, digest: &Digest) -> Result<Vec<u8>, BuildError> {
        self.blocks.read_frame(digest)
    }

    /// Writes the root file system of an image as a sparse file.
    ///
    /// # Errors
    /// When the image or a block is missing or damaged, or the disk is full.
    pub fn export(&self, image: &ImageReference, path: &std::path::Path) -> Result<(), BuildError> {
        let (_, manifest) = self.get(image)?;
        self.blocks.restore(&manifest.rootfs.blocks, path, &crate::Cancel::new())
    }
}
