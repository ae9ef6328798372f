//! Stored images: `<root>/vm-images/<digest>/{manifest.json,root.ext4,entry.json}`, all read-only.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use form_bundle::{BLOCK_SIZE, Manifest, manifest::MAX_MANIFEST_BYTES};
use form_types::{Digest, Failpoint, ImageReference, Name, failpoint::reach};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    Store,
    blocks::{Comparison, compare_file, read_dir},
    durable::{Draft, Seal, read_json, replace_file, retire, to_json, write_file},
    error::{Result, StoreError},
    hold,
    image_settings::ImageSettings,
};

const MANIFEST: &str = "manifest.json";
const ROOTFS: &str = "root.ext4";
const ENTRY: &str = "entry.json";

/// An image of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageEntry {
    pub name: Name,
    /// From 1, in the order of imports; a number is never given twice.
    pub version: u32,
    /// Of the manifest's text.
    pub digest: Digest,
    /// Size of the root file system, holes included.
    pub size_bytes: u64,
    /// What of it is no hole.
    pub stored_bytes: u64,
    pub created_at: Timestamp,
    pub settings: ImageSettings,
    /// The sealed root file system.
    pub rootfs: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    name: Name,
    version: u32,
    size_bytes: u64,
    stored_bytes: u64,
    created_at: Timestamp,
    seal: Seal,
}

impl Store {
    pub(crate) fn image_dir(&self, digest: &Digest) -> PathBuf {
        self.images.join(digest.to_string())
    }

    pub(crate) fn image_rootfs(&self, digest: &Digest) -> PathBuf {
        self.image_dir(digest).join(ROOTFS)
    }

    /// Makes an image of blocks that are all here: uploaded, or part of another image or kernel. The same manifest again gives
    /// back the image that is there.
    ///
    /// # Errors
    /// When the manifest is no good, blocks are missing ([`StoreError::MissingBlocks`]) or there is no room
    /// ([`StoreError::NoRoom`]); nothing is left behind then, and uploaded blocks stay for the next try.
    pub fn import(&self, manifest_text: &[u8]) -> Result<ImageEntry> {
        let manifest = Manifest::decode(manifest_text)?;
        let digest = Digest::of(manifest_text);
        let _turn = hold(&self.locks.images);
        if let Ok(entry) = self.by_digest(&digest) {
            return Ok(entry);
        }
        let map = &manifest.rootfs.blocks;
        let assembler = self.assembler(&map.digests())?;
        let draft = Draft::new(&self.images)?;
        let rootfs = draft.path().join(ROOTFS);
        assembler.write(&rootfs, map)?;
        reach(Failpoint::ImageAssembled);
        write_file(&draft.path().join(MANIFEST), manifest_text, 0o444)?;
        let record = Record {
            version: self.next_version(&manifest.name)?,
            name: manifest.name.clone(),
            size_bytes: map.size(),
            stored_bytes: map.stored_bytes(),
            created_at: Timestamp::now(),
            seal: Seal::of(&rootfs)?,
        };
        reach(Failpoint::ImageVersionTaken);
        let entry = draft.path().join(ENTRY);
        write_file(&entry, &to_json(&entry, &record)?, 0o444)?;
        draft.publish(&self.image_dir(&digest))?;
        reach(Failpoint::ImagePublished);
        for (_, block) in map.iter() {
            self.incoming.remove(block);
        }
        Ok(self.entry(digest, record))
    }

    /// One more than the highest ever given for the name. The number is taken before the image is there: a crash in between
    /// skips one, which harms nobody.
    fn next_version(&self, name: &Name) -> Result<u32> {
        let path = self.images.join("versions").join(name.as_str());
        let last: u32 = if path.exists() { read_json(&path)? } else { 0 };
        let next = last.saturating_add(1);
        replace_file(&self.images, &path, &to_json(&path, &next)?, 0o644)?;
        Ok(next)
    }

    fn entry(&self, digest: Digest, record: Record) -> ImageEntry {
        let Record { name, version, size_bytes, stored_bytes, created_at, seal: _ } = record;
        let directory = self.image_dir(&digest);
        let settings = ImageSettings::read(&directory);
        ImageEntry { name, version, digest, size_bytes, stored_bytes, created_at, settings, rootfs: directory.join(ROOTFS) }
    }

    fn image_record(&self, digest: &Digest) -> Result<Record> {
        let path = self.image_dir(digest).join(ENTRY);
        if path.exists() { read_json(&path) } else { Err(StoreError::NoImageDigest(*digest)) }
    }

    /// Every image, by name and then version.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn images(&self) -> Result<Vec<ImageEntry>> {
        let mut found = Vec::new();
        for digest in digests_in(&self.images)? {
            match self.by_digest(&digest) {
                Ok(entry) => found.push(entry),
                // Removed while we looked.
                Err(StoreError::NoImageDigest(_)) => {}
                Err(error) => tracing::warn!(image = %digest.short(), %error, "an image cannot be read"),
            }
        }
        found.sort_by(|a, b| (&a.name, a.version).cmp(&(&b.name, b.version)));
        Ok(found)
    }

    /// The image of this name and version; without a version the newest.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn image(&self, reference: &ImageReference) -> Result<ImageEntry> {
        self.images()?
            .into_iter()
            .rfind(|entry| entry.name == reference.name && reference.version.is_none_or(|version| entry.version == version))
            .ok_or_else(|| StoreError::NoImage(reference.clone()))
    }

    /// # Errors
    /// [`StoreError::NoImageDigest`].
    pub fn by_digest(&self, digest: &Digest) -> Result<ImageEntry> {
        Ok(self.entry(*digest, self.image_record(digest)?))
    }

    /// The image's manifest, checked against the digest.
    ///
    /// # Errors
    /// When there is no such image, or the manifest was changed on disk.
    pub fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        let path = self.image_dir(digest).join(MANIFEST);
        if !path.exists() {
            return Err(StoreError::NoImageDigest(*digest));
        }
        Ok(Manifest::decode_verified(&read_bounded(&path, MAX_MANIFEST_BYTES)?, digest)?)
    }

    /// The text of an image's manifest as a file, for who checks it against the digest.
    ///
    /// # Errors
    /// [`StoreError::NoImageDigest`], or those of the file system.
    pub fn manifest_file(&self, digest: &Digest) -> Result<File> {
        self.open_of_image(digest, MANIFEST)
    }

    /// Blocks of an image, by their numbers, as they are on the disk: each with the digest of what is there, compressed.
    ///
    /// # Errors
    /// [`StoreError::NoImageDigest`]; [`StoreError::NoBlock`] when the image has no block of that number.
    pub fn read_blocks(&self, digest: &Digest, blocks: &[u64]) -> Result<Vec<(Digest, Vec<u8>)>> {
        let path = self.image_dir(digest).join(ROOTFS);
        let file = self.open_of_image(digest, ROOTFS)?;
        let size = file.metadata().map_err(StoreError::io("read", &path))?.len();
        let mut plain = vec![0; BLOCK_SIZE];
        let mut read = |block: u64| {
            let offset = block.checked_mul(BLOCK_SIZE as u64).filter(|offset| *offset < size).ok_or(StoreError::NoBlock(block))?;
            let length = usize::try_from(size - offset).map_or(BLOCK_SIZE, |left| left.min(BLOCK_SIZE));
            file.read_exact_at(&mut plain[..length], offset).map_err(StoreError::io("read", &path))?;
            Ok((Digest::of(&plain[..length]), form_bundle::blocks::compress(&plain[..length])?))
        };
        blocks.iter().map(|block| read(*block)).collect()
    }

    fn open_of_image(&self, digest: &Digest, name: &str) -> Result<File> {
        let path = self.image_dir(digest).join(name);
        match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(StoreError::NoImageDigest(*digest)),
            opened => opened.map_err(StoreError::io("read", &path)),
        }
    }

    /// Removes an image.
    ///
    /// # Errors
    /// [`StoreError::ImageInUse`] when `users` is not empty, or the disk of a VM lies over the image; [`StoreError::ImageKept`].
    pub fn remove(&self, digest: &Digest, users: &[Name]) -> Result<()> {
        let _turn = hold(&self.locks.images);
        let _no_new_disks = hold(&self.locks.disks);
        let entry = self.by_digest(digest)?;
        let mut users: Vec<String> = users.iter().map(ToString::to_string).collect();
        if users.is_empty() {
            users = self.overlays_of(digest)?.iter().map(|vm| format!("the disk or a snapshot of VM {}", vm.short())).collect();
        }
        if !users.is_empty() {
            return Err(StoreError::in_use(&entry.name, entry.version, users));
        }
        if entry.settings.keep {
            return Err(StoreError::ImageKept(ImageReference { name: entry.name, version: Some(entry.version) }));
        }
        retire(&self.image_dir(digest), &self.images)
    }

    /// A quick look, for every start of a VM: the file is the one that was sealed, and nobody wrote to it since.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] with what is different.
    pub fn check_sealed(&self, digest: &Digest) -> Result<()> {
        self.image_record(digest)?.seal.check(&self.image_dir(digest).join(ROOTFS))
    }

    /// Reads the whole image and compares every block with its digest. When all is well the seal is renewed: a restored backup has
    /// other times. It takes as long as the disk needs; imports and removals go on meanwhile.
    ///
    /// # Errors
    /// [`StoreError::NoImageDigest`], when the image cannot be read, or when somebody writes to it meanwhile.
    pub fn verify(&self, digest: &Digest) -> Result<Comparison> {
        self.image_record(digest)?;
        let rootfs = self.image_dir(digest).join(ROOTFS);
        let before = Seal::of(&rootfs)?;
        let comparison = compare_file(&rootfs, &self.manifest(digest)?.rootfs.blocks)?;
        before.check(&rootfs)?;
        if comparison.damaged.is_empty() {
            let _turn = hold(&self.locks.images);
            let mut record = self.image_record(digest)?;
            if before != record.seal {
                record.seal = before;
                let path = self.image_dir(digest).join(ENTRY);
                replace_file(&self.images, &path, &to_json(&path, &record)?, 0o444)?;
            }
        }
        Ok(comparison)
    }
}

/// The digests that name the entries of a directory; other entries are ours too, and no images.
pub fn digests_in(directory: &Path) -> Result<Vec<Digest>> {
    let paths = read_dir(directory)?;
    Ok(paths.iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok()).collect())
}

/// A file that was checked to be no longer than `limit` when it was stored.
pub fn read_bounded(path: &Path, limit: usize) -> Result<Vec<u8>> {
    let length = fs::metadata(path).map_err(StoreError::io("read", path))?.len();
    if length > limit as u64 {
        return Err(StoreError::Damaged { what: path.display().to_string(), reason: format!("it has grown to {length} bytes") });
    }
    fs::read(path).map_err(StoreError::io("read", path))
}
