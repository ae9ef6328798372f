//! An image that is sent on: one of this machine, or one of a host, whose blocks pass through the cache.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
};

use form_bundle::{Manifest, blocks};
use form_types::{Digest, ImageReference, Name};

use crate::{BuildError, BuildEvent, BuildObserver, Builder, CachePaths, Cancel, block_store::BlockStore, build::lock, error::IoContext};

/// A block as a host gives it: the digest of what it has, and its zstd frame.
pub type Frame = (Digest, Vec<u8>);

type Frames = Result<Vec<Frame>, BuildError>;

/// An image of a host, before its blocks are here.
#[derive(Clone, Debug)]
pub struct HostImage {
    pub name: Name,
    pub version: u32,
    pub digest: Digest,
    /// The text of its manifest, as the host gave it.
    pub text: Vec<u8>,
}

/// An image to send on.
#[derive(Debug)]
pub struct Original {
    pub name: Name,
    pub version: u32,
    /// Of the text.
    pub digest: Digest,
    pub(crate) text: Vec<u8>,
    pub(crate) manifest: Manifest,
    /// Where its blocks are: in one of these.
    blocks: Vec<BlockStore>,
    passing: Option<Passing>,
}

/// What came from a host. It stays when what it is for breaks off, so that it need not come again.
#[derive(Debug)]
struct Passing {
    directory: PathBuf,
    /// Nobody else takes these blocks away meanwhile.
    _cache: File,
}

impl Original {
    /// The compressed bytes of a block, checked.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub(crate) fn frame(&self, digest: &Digest) -> Result<Vec<u8>, BuildError> {
        self.blocks.iter().find_map(|blocks| sound_frame(blocks, digest)).ok_or(BuildError::Block(*digest))
    }

    /// Takes away what passed through the cache: it is where it was to go.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn arrived(&self) -> Result<(), BuildError> {
        let Some(Passing { directory, .. }) = &self.passing else { return Ok(()) };
        fs::remove_dir_all(directory).during("remove", directory)
    }
}

/// The frame of a block that is in the store, and is what it should be.
fn sound_frame(store: &BlockStore, digest: &Digest) -> Option<Vec<u8>> {
    let frame = store.read_frame(digest).ok()?;
    blocks::open(digest, &frame).ok().map(|_| frame)
}

/// Removes what is left of transfers that broke off. The cache is locked.
pub(crate) fn discard_passing(paths: &CachePaths) -> Result<(), BuildError> {
    match fs::remove_dir_all(paths.passing()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.during("remove", paths.passing()),
    }
}

impl Builder {
    /// An image of this machine, to send on.
    ///
    /// # Errors
    /// When there is none, or its manifest is damaged.
    pub fn original(&self, image: &ImageReference) -> Result<Original, BuildError> {
        let (record, text, manifest) = self.store().text(image)?;
        let blocks = vec![BlockStore::new(self.paths.blocks())];
        Ok(Original { name: record.name, version: record.version, digest: record.digest, text, manifest, blocks, passing: None })
    }

    /// An image of a host, to send on. `fetch` gives blocks by their numbers, at most `most` at a time: the digest of what the host has, and its
    /// frame. Only what this machine lacks is fetched, and not again when it broke off. The cache is locked until the image is dropped.
    ///
    /// # Errors
    /// When the manifest is not the one of that digest, a block is damaged on the host, `fetch` fails, the disk is full, or it is cancelled.
    pub fn fetched(
        &self,
        image: HostImage,
        most: usize,
        fetch: &mut dyn FnMut(&[u64]) -> Frames,
        cancel: &Cancel,
        observer: &mut dyn BuildObserver,
    ) -> Result<Original, BuildError> {
        let HostImage { name, version, digest, text } = image;
        let shown = format!("{name}:{version}");
        let manifest = Manifest::decode_verified(&text, &digest)
            .map_err(|error| BuildError::HostManifest { image: shown.clone(), reason: error.to_string() })?;
        self.paths.create().during("create", self.paths.root())?;
        let cache = lock(&self.paths.lock(), cancel, observer)?;
        let directory = self.paths.passing().join(digest.to_string());
        fs::create_dir_all(&directory).during("create", &directory)?;
        let (here, passing) = (BlockStore::new(self.paths.blocks()), BlockStore::new(directory.clone()));
        let mut named = std::collections::BTreeSet::new();
        let is_here = |digest: &Digest| [&here, &passing].iter().any(|store| sound_frame(store, digest).is_some());
        let missing: Vec<(u64, Digest)> = manifest
            .rootfs
            .blocks
            .iter()
            .filter(|(_, digest)| named.insert(**digest) && !is_here(digest))
            .map(|(index, digest)| (index, *digest))
            .collect();
        for (number, wanted) in missing.chunks(most).enumerate() {
            if cancel.is_cancelled() {
                return Err(BuildError::Interrupted);
            }
            let line = format!("block {} of {} that are not here", number * most + wanted.len(), missing.len());
            let indexes: Vec<u64> = wanted.iter().map(|(index, _)| *index).collect();
            for ((index, digest), (found, frame)) in wanted.iter().zip(fetch(&indexes)?) {
                if found != *digest || blocks::open(digest, &frame).is_err() {
                    return Err(BuildError::HostBlock { image: shown, index: *index });
                }
                passing.replace(digest, &frame)?;
            }
            observer.event(BuildEvent::Output { line: &line });
        }
        let passing = Some(Passing { directory, _cache: cache });
        let blocks = vec![here, BlockStore::new(self.paths.passing().join(digest.to_string()))];
        Ok(Original { name, version, digest, text, manifest, blocks, passing })
    }
}
