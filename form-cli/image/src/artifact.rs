//! Images of ours as OCI artifacts: in a directory or a tar file (OCI image layout), and in registries.
//!
//! An artifact is an OCI image manifest (image specification 1.1, "Guidelines for Artifact Usage"). Its configuration is our own manifest, byte for byte,
//! so the BLAKE3 digest of that blob is the image's digest wherever it goes. Its layers are *packs*: the blocks of one region of the root file
//! system, framed as they travel to a host. File systems are edited in place, so the packs of regions that did not change are the same blobs in
//! each version of an image, and a registry has them already.
//!
//! `layout` writes and reads files · `take` keeps blocks whole or not at all · the registry's half is in `oci`.

pub(crate) mod layout;
pub(crate) mod take;

use std::collections::{BTreeMap, BTreeSet};

use form_bundle::{
    BlockMap,
    blocks::MAX_COMPRESSED,
    manifest::{MAX_MANIFEST_BYTES, MEDIA_TYPE},
};
use form_types::{Digest, Name};
use serde::{Deserialize, Serialize};

use crate::{
    BuildError, Original,
    oci::{OCI_MANIFEST, OciDigest},
};

/// What the artifact is, for registries that show it.
pub(crate) const ARTIFACT_TYPE: &str = "application/vnd.formation.image.v1";
/// Frames without padding: a block's digest (32 bytes), the length of what follows (u32, little-endian), the block as one zstd frame.
pub(crate) const PACK_TYPE: &str = "application/vnd.formation.image.blocks.v1";

/// Bytes before the block of a frame.
const FRAME_HEADER: usize = 36;
/// Blocks of a region: 16 MiB of the file system. A change costs a pack, a pack costs a line of the artifact's manifest.
const REGION: u64 = 256;
/// More lines than these are more than the 4 MiB that registries take for a manifest; the regions are larger then.
const MAX_PACKS: usize = 8000;

/// A blob of the artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Blob {
    #[serde(default)]
    pub media_type: String,
    pub digest: OciDigest,
    /// Bytes.
    pub size: u64,
}

impl Blob {
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self { media_type: media_type.to_owned(), digest: OciDigest::of(bytes), size: bytes.len() as u64 }
    }
}

/// The OCI manifest of an image of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Artifact {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    /// Our own manifest.
    pub config: Blob,
    /// The packs.
    pub layers: Vec<Blob>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Artifact {
    pub fn new(name: &Name, config: Blob, layers: Vec<Blob>) -> Self {
        Self {
            schema_version: 2,
            media_type: OCI_MANIFEST.to_owned(),
            artifact_type: ARTIFACT_TYPE.to_owned(),
            config,
            layers,
            annotations: BTreeMap::from([("org.opencontainers.image.title".to_owned(), name.to_string())]),
        }
    }

    /// Reads an OCI manifest; `None` when it is one of something else.
    ///
    /// # Errors
    /// In words, when it is one of ours and makes no sense.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, String> {
        // What cannot be read at all is somebody else's to explain.
        let Ok(artifact) = serde_json::from_slice::<Self>(bytes) else { return Ok(None) };
        if artifact.config.media_type != MEDIA_TYPE {
            return Ok(None);
        }
        if artifact.config.size > MAX_MANIFEST_BYTES as u64 {
            return Err(format!("its manifest has {} bytes: the limit is {MAX_MANIFEST_BYTES}", artifact.config.size));
        }
        if let Some(other) = artifact.layers.iter().find(|layer| layer.media_type != PACK_TYPE) {
            let shown: String = other.media_type.chars().filter(|char| !char.is_control()).take(100).collect();
            return Err(format!("it holds something of type `{shown}`, which this version does not know"));
        }
        Ok(Some(artifact))
    }

    /// Whether the packs can be those of an image with these blocks: what is larger than it needs to be is not even fetched.
    ///
    /// # Errors
    /// In words, when they are too large.
    pub fn fits(&self, map: &BlockMap) -> Result<(), String> {
        let most = map.stored_blocks().saturating_mul((MAX_COMPRESSED + FRAME_HEADER) as u64);
        let packed = self.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
        if packed > most { Err(format!("its blocks are {packed} bytes, and cannot be more than {most}")) } else { Ok(()) }
    }
}

/// The blocks of each pack, in the order of their first place.
pub(crate) fn packs(map: &BlockMap) -> Vec<Vec<Digest>> {
    let mut region = REGION;
    loop {
        let mut packs: BTreeMap<u64, (BTreeSet<Digest>, Vec<Digest>)> = BTreeMap::new();
        for (index, digest) in map.iter() {
            let (seen, pack) = packs.entry(index / region).or_default();
            if seen.insert(*digest) {
                pack.push(*digest);
            }
        }
        if packs.len() <= MAX_PACKS {
            return packs.into_values().map(|(_, pack)| pack).collect();
        }
        region *= 2;
    }
}

/// The bytes of a pack, each block checked.
///
/// # Errors
/// When one is missing or damaged.
pub(crate) fn pack(original: &Original, digests: &[Digest]) -> Result<Vec<u8>, BuildError> {
    let mut bytes = Vec::new();
    for digest in digests {
        let frame = original.frame(digest)?;
        bytes.extend_from_slice(digest.as_bytes());
        bytes.extend_from_slice(&u32::try_from(frame.len()).map_err(|_| BuildError::Block(*digest))?.to_le_bytes());
        bytes.extend_from_slice(&frame);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: u64) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    #[test]
    fn a_change_changes_the_pack_of_its_region_alone() {
        let map = |changed: u64| {
            let mut map = BlockMap::new(4 << 30);
            for index in [0, 1, 255, 256, 300, 5000] {
                map.push(index, digest(if index == changed { 99_999 } else { index }));
            }
            map
        };
        let (before, after) = (packs(&map(u64::MAX)), packs(&map(300)));
        assert_eq!(before.iter().map(Vec::len).collect::<Vec<_>>(), [3, 2, 1]);
        assert_eq!((before[0] == after[0], before[1] == after[1], before[2] == after[2]), (true, false, true));
        // A block with two places in a region is there once.
        let mut twice = BlockMap::new(1 << 20);
        twice.push(0, digest(7));
        twice.push(3, digest(7));
        assert_eq!(packs(&twice), [vec![digest(7)]]);
    }

    #[test]
    fn regions_grow_before_a_manifest_does() {
        let mut map = BlockMap::new(4 << 40);
        for index in 0..20_000 {
            map.push(index * REGION, digest(index));
        }
        let packs = packs(&map);
        assert_eq!((packs.len(), packs[0].len()), (5000, 4));
    }

    #[test]
    fn only_what_is_ours_is_taken_for_ours() {
        let blob = |media_type: &str| Blob::of(media_type, b"x");
        let name = "web".parse().unwrap();
        let text = |artifact: &Artifact| serde_json::to_vec(artifact).unwrap();
        let ours = Artifact::new(&name, blob(MEDIA_TYPE), vec![blob(PACK_TYPE)]);
        assert_eq!(Artifact::parse(&text(&ours)), Ok(Some(ours.clone())));
        let another = Artifact::new(&name, blob("application/vnd.oci.image.config.v1+json"), vec![]);
        assert_eq!(Artifact::parse(&text(&another)), Ok(None));
        assert_eq!(Artifact::parse(b"<html>"), Ok(None));
        let newer = Artifact::new(&name, blob(MEDIA_TYPE), vec![blob("application/vnd.formation.image.blocks.v2")]);
        assert!(Artifact::parse(&text(&newer)).unwrap_err().contains("blocks.v2"));
        let mut map = BlockMap::new(1 << 20);
        map.push(0, digest(1));
        assert!(ours.fits(&map).is_ok());
        let mut bomb = ours;
        bomb.layers[0].size = u64::MAX;
        bomb.layers.push(blob(PACK_TYPE));
        assert!(bomb.fits(&map).is_err());
    }
}
