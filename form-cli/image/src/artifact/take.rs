//! Taking an image in: every byte is checked, and what came of an image that is not whole goes again.

use std::{
    collections::BTreeSet,
    io::{self, BufReader, Read},
};

use form_bundle::{BlockMap, Manifest, blocks, manifest::MAX_MANIFEST_BYTES};
use form_types::{Digest, Name};

use super::{Artifact, Blob, FRAME_HEADER};
use crate::{BuildError, Cancel, block_store::BlockStore, oci::HashingReader};

/// Where the blobs of an artifact are.
pub(crate) trait Source {
    /// # Errors
    /// When there is no such blob, or it cannot be read.
    fn open<'s>(&'s self, blob: &Blob) -> io::Result<Box<dyn Read + 's>>;
}

/// What is taken in, in words, and what may stop it.
pub(crate) struct Taking<'a> {
    /// The file, directory or reference.
    pub from: &'a str,
    pub cancel: &'a Cancel,
}

impl Taking<'_> {
    pub fn refuse(&self, reason: impl Into<String>) -> BuildError {
        BuildError::Artifact { from: self.from.to_owned(), reason: reason.into() }
    }

    fn unreadable(&self, what: &str, error: &io::Error) -> BuildError {
        self.refuse(match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("{what} ends too early"),
            io::ErrorKind::FileTooLarge => format!("{what} is longer than it should be"),
            io::ErrorKind::NotFound => format!("{what} is missing"),
            _ => format!("{what} cannot be read: {error}"),
        })
    }

    /// Our own manifest.
    ///
    /// # Errors
    /// When it is not what the artifact says, or no manifest.
    pub fn manifest(&self, artifact: &Artifact, source: &dyn Source) -> Result<Manifest, BuildError> {
        let what = "the manifest";
        let blob = &artifact.config;
        let reader = source.open(blob).map_err(|error| self.unreadable(what, &error))?;
        let mut reader = HashingReader::new(reader, blob.size.min(MAX_MANIFEST_BYTES as u64));
        let mut text = Vec::new();
        reader.read_to_end(&mut text).map_err(|error| self.unreadable(what, &error))?;
        self.is_whole(what, reader, blob)?;
        let manifest = Manifest::decode(&text).map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            self.refuse(format!("{error}{cause}"))
        })?;
        artifact.fits(&manifest.rootfs.blocks).map_err(|reason| self.refuse(reason))?;
        Ok(manifest)
    }

    fn is_whole<R: Read>(&self, what: &str, mut reader: HashingReader<R>, blob: &Blob) -> Result<(), BuildError> {
        // What follows its end is none of it, and no image that was exported.
        reader.read(&mut [0]).map_err(|error| self.unreadable(what, &error))?;
        let count = reader.count();
        if count < blob.size {
            return Err(self.refuse(format!("{what} ends too early")));
        }
        if reader.digest() != blob.digest {
            return Err(self.refuse(format!("{what} is damaged: it should have digest {}", blob.digest)));
        }
        Ok(())
    }
}

/// Blocks on their way into the store. Dropped before [`Taken::keep`], those that were not there go again.
pub(crate) struct Taken<'a> {
    blocks: &'a BlockStore,
    wanted: BTreeSet<Digest>,
    missing: BTreeSet<Digest>,
    new: Vec<Digest>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for digest in &self.new {
            self.blocks.remove(digest);
        }
    }
}

impl<'a> Taken<'a> {
    /// The cache is locked: nobody else begins to use a block that may go again.
    pub fn new(blocks: &'a BlockStore, map: &BlockMap) -> Self {
        let wanted: BTreeSet<Digest> = map.iter().map(|(_, digest)| *digest).collect();
        Self { blocks, missing: wanted.clone(), wanted, new: Vec::new() }
    }

    /// Takes a pack. `number` counts from 1.
    ///
    /// # Errors
    /// When it is damaged, holds what the image does not name, or the disk is full.
    pub fn pack(&mut self, taking: &Taking<'_>, source: &dyn Source, blob: &Blob, number: usize) -> Result<(), BuildError> {
        let what = format!("pack {number} of its blocks");
        let unreadable = |error: io::Error| taking.unreadable(&what, &error);
        let reader = source.open(blob).map_err(unreadable)?;
        let mut reader = HashingReader::new(BufReader::with_capacity(256 << 10, reader), blob.size);
        while reader.count() < blob.size {
            if taking.cancel.is_cancelled() {
                return Err(BuildError::Interrupted);
            }
            let mut header = [0; FRAME_HEADER];
            reader.read_exact(&mut header).map_err(unreadable)?;
            let (digest, length) = header.split_at(32);
            let digest = Digest::from_bytes(digest.try_into().map_err(|_| taking.refuse(format!("{what} is damaged")))?);
            let length = length.iter().rev().fold(0_usize, |length, byte| (length << 8) | usize::from(*byte));
            if length > blocks::MAX_COMPRESSED || !self.wanted.contains(&digest) {
                return Err(taking.refuse(format!("{what} is damaged, or is one of another image")));
            }
            let mut frame = vec![0; length];
            reader.read_exact(&mut frame).map_err(unreadable)?;
            blocks::open(&digest, &frame).map_err(|error| taking.refuse(format!("{what} is damaged: {error}")))?;
            self.put(digest, &frame)?;
        }
        taking.is_whole(&what, reader, blob)
    }

    fn put(&mut self, digest: Digest, frame: &[u8]) -> Result<(), BuildError> {
        self.missing.remove(&digest);
        if self.blocks.read(&digest).is_ok() {
            return Ok(());
        }
        // One that is there and damaged is mended, and stays whatever comes of this image.
        if !self.blocks.contains(&digest) {
            self.new.push(digest);
        }
        self.blocks.replace(&digest, frame)
    }

    /// Whether they are all there.
    ///
    /// # Errors
    /// When some are not.
    pub fn check(&self, taking: &Taking<'_>) -> Result<(), BuildError> {
        if self.missing.is_empty() { Ok(()) } else { Err(taking.refuse(format!("{} of its blocks are missing", self.missing.len()))) }
    }

    /// The image is in the store: its blocks stay.
    pub fn keep(mut self) {
        self.new.clear();
    }
}

/// The manifest of the same image under another name; it has a digest of its own.
///
/// # Errors
/// Never in practice: every field has a JSON form.
pub(crate) fn renamed(manifest: Manifest, name: &Name) -> Result<Manifest, BuildError> {
    if manifest.name == *name {
        return Ok(manifest);
    }
    let Manifest { config, rootfs, packages, history, kernel, .. } = manifest;
    Ok(Manifest { kernel, ..Manifest::new(&config.renamed(name), rootfs, packages, history)? })
}
