//! Images of ours in registries.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read},
    sync::Arc,
};

use form_bundle::manifest::MEDIA_TYPE;
use form_types::{Digest, Name};

use super::{
    BlobStore, OCI_MANIFEST, OciDigest, OciError, OciReference, Registries,
    client::Client,
    pull::{bytes, on_thread},
};
use crate::{
    BuildError, Cancel, Original,
    artifact::{Artifact, Blob, PACK_TYPE, pack, packs, take::Source},
};

/// What was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    pub name: Name,
    pub version: u32,
    /// Of our own manifest: the image's digest.
    pub digest: Digest,
    /// Where it is now.
    pub reference: String,
    /// Of the artifact's manifest, for `HOST/PATH@sha256:…`.
    pub artifact: OciDigest,
    /// Blobs that were sent, and their bytes.
    pub sent_blobs: usize,
    pub sent_bytes: u64,
    /// Blobs that the registry had.
    pub kept_blobs: usize,
}

/// Sends an image to a registry, under the tag of `reference`. What the registry has is not sent again.
///
/// # Errors
/// When a block is damaged, or the registry does not take it.
pub(crate) fn push(
    original: &Arc<Original>,
    reference: &OciReference,
    registries: &Registries,
    cancel: &Cancel,
    each_line: &mut dyn FnMut(&str),
) -> Result<Pushed, BuildError> {
    let fail = |source: OciError| match source {
        OciError::Cancelled => BuildError::Interrupted,
        source => BuildError::Push { to: reference.to_string(), source },
    };
    let (original, target, registries, stop) = (Arc::clone(original), reference.clone(), registries.clone(), cancel.clone());
    let sent = on_thread(cancel, each_line, move |line| {
        let client = Client::new(&target, &registries, &stop)?.for_writing();
        let mut push = Push { client, line, cancel: &stop, here: BTreeSet::new(), sent: (0, 0), kept: 0 };
        Ok(match push.image(&original, &target) {
            Err(Fault::Registry(error)) => return Err(error),
            Err(Fault::Image(error)) => Err(error),
            Ok(pushed) => Ok(pushed),
        })
    });
    sent.map_err(fail)?
}

/// A fault of the registry, or one of the image here.
enum Fault {
    Registry(OciError),
    Image(BuildError),
}

impl From<OciError> for Fault {
    fn from(error: OciError) -> Self {
        Self::Registry(error)
    }
}

impl From<BuildError> for Fault {
    fn from(error: BuildError) -> Self {
        Self::Image(error)
    }
}

struct Push<'a> {
    client: Client<'a>,
    line: &'a dyn Fn(String),
    cancel: &'a Cancel,
    /// Blobs that are known to be in the registry.
    here: BTreeSet<OciDigest>,
    /// How many were sent, and their bytes.
    sent: (usize, u64),
    kept: usize,
}

impl Push<'_> {
    fn image(&mut self, original: &Original, target: &OciReference) -> Result<Pushed, Fault> {
        let packs = packs(&original.manifest.rootfs.blocks);
        let count = packs.len();
        let mut layers = Vec::with_capacity(count);
        for (index, digests) in packs.iter().enumerate() {
            let bytes = pack(original, digests)?;
            layers.push(self.blob(PACK_TYPE, &bytes, &format!("pack {} of {count}", index + 1))?);
        }
        let config = self.blob(MEDIA_TYPE, &original.text, "its manifest")?;
        let artifact = serde_json::to_vec(&Artifact::new(&original.name, config, layers)).map_err(BuildError::from)?;
        // Last: whoever finds the tag finds all that it names.
        self.client.put_manifest(&target.target(), OCI_MANIFEST, &artifact)?;
        Ok(Pushed {
            name: original.name.clone(),
            version: original.version,
            digest: original.digest,
            reference: target.to_string(),
            artifact: OciDigest::of(&artifact),
            sent_blobs: self.sent.0,
            sent_bytes: self.sent.1,
            kept_blobs: self.kept,
        })
    }

    fn blob(&mut self, media_type: &str, contents: &[u8], what: &str) -> Result<Blob, Fault> {
        if self.cancel.is_cancelled() {
            return Err(OciError::Cancelled.into());
        }
        let blob = Blob::of(media_type, contents);
        if self.here.contains(&blob.digest) {
            return Ok(blob);
        }
        if self.client.has_blob(&blob.digest)? {
            (self.line)(format!("{what}: there already"));
            self.kept += 1;
        } else {
            (self.line)(format!("{what}: {}", bytes(blob.size)));
            self.client.put_blob(&blob.digest, contents)?;
            self.sent = (self.sent.0 + 1, self.sent.1 + blob.size);
        }
        self.here.insert(blob.digest);
        Ok(blob)
    }
}

/// What there is under a reference.
pub(crate) enum Found {
    /// An image of ours, on the disk.
    Ours(Artifact),
    /// Something else, of which nothing but the manifest was fetched.
    Another(OciDigest),
}

/// Fetches an image of ours, as far as it is not on the disk.
///
/// # Errors
/// When something cannot be had, or is not what its digest says.
pub(crate) fn fetch(
    reference: &OciReference,
    registries: &Registries,
    blobs: &BlobStore,
    cancel: &Cancel,
    each_line: &mut dyn FnMut(&str),
) -> Result<Found, OciError> {
    let (reference, registries, blobs, stop) = (reference.clone(), registries.clone(), blobs.clone(), cancel.clone());
    on_thread(cancel, each_line, move |line| {
        let mut client = Client::new(&reference, &registries, &stop)?;
        let digest = match reference.digest {
            Some(digest) => Some(digest),
            None => client.resolve(&reference.target())?,
        };
        let answer = match digest.and_then(|digest| blobs.read(&digest)) {
            Some(bytes) => bytes,
            None => {
                let bytes = client.manifest(&reference.target())?.bytes;
                blobs.add(&bytes)?;
                bytes
            }
        };
        let found = OciDigest::of(&answer);
        if let Some(expected) = reference.digest.filter(|expected| *expected != found) {
            blobs.remove(&found);
            return Err(OciError::Digest { what: "the manifest".to_owned(), expected, found });
        }
        let unusable = |reason: String| OciError::Unsupported { what: format!("an image of Formation that cannot be used: {reason}") };
        let Some(artifact) = Artifact::parse(&answer).map_err(unusable)? else { return Ok(Found::Another(found)) };
        blobs.remove(&found);
        let mut get = |blob: &Blob, what: &str| {
            if stop.is_cancelled() {
                return Err(OciError::Cancelled);
            }
            if blobs.has(&blob.digest) {
                line(format!("{what}: here already"));
                return Ok(());
            }
            line(format!("{what}: {}", bytes(blob.size)));
            blobs.fetch(&mut client, &blob.digest, blob.size, what)
        };
        get(&artifact.config, "its manifest")?;
        // Before anything large is fetched.
        let text = blobs.read(&artifact.config.digest).unwrap_or_default();
        let manifest = form_bundle::Manifest::decode(&text).map_err(|error| unusable(error.to_string()))?;
        artifact.fits(&manifest.rootfs.blocks).map_err(unusable)?;
        let count = artifact.layers.len();
        for (index, layer) in artifact.layers.iter().enumerate() {
            get(layer, &format!("pack {} of {count}", index + 1))?;
        }
        Ok(Found::Ours(artifact))
    })
}

impl Source for BlobStore {
    fn open<'s>(&'s self, blob: &Blob) -> io::Result<Box<dyn Read + 's>> {
        Ok(Box::new(File::open(self.path(&blob.digest))?))
    }
}
