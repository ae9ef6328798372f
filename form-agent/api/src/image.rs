//! Images and kernel bundles, and how they reach a host: the client asks which blocks are missing and sends just those.

use std::collections::BTreeMap;

use form_types::{Digest, Name, Spec};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    pub name: Name,
    /// From 1, given by the host in the order of imports.
    pub version: u32,
    /// Of the manifest.
    pub digest: Digest,
    /// Size of the root file system, holes included.
    pub size_bytes: u64,
    /// What the blocks that are no holes take.
    pub stored_bytes: u64,
    pub created_at: Timestamp,
    /// Names of the VMs that run from it.
    pub used_by: Vec<Name>,
    /// Names of the VMs that ran from it and can go back to it.
    #[serde(default)]
    pub kept_for: Vec<Name>,
    /// Set by people for themselves: they are the host's own, and do not travel with the image.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// It is not to be removed, whoever asks.
    #[serde(default)]
    pub keep: bool,
}

/// `PATCH /v1/images/{reference}`: what is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageSetRequest {
    /// Whether the image is not to be removed.
    #[serde(default)]
    pub keep: Option<bool>,
    /// Label to its new value; `null` removes it.
    #[serde(default)]
    pub labels: BTreeMap<String, Option<String>>,
}

impl ImageSetRequest {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What an image is, besides its blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageConfig {
    pub image: Image,
    /// How to run it: its Formfile, without passwords.
    pub spec: Spec,
    /// What the base's package manager says is installed: name and version.
    pub packages: BTreeMap<String, String>,
    /// What it was built from, the base first.
    pub layers: Vec<Layer>,
    /// The kernel bundle of the kernel that it brings along, which a VM of it is to be started with; without one it is the caller's to
    /// choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Digest>,
}

/// What one step of the build did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Layer {
    /// The step in the words of the Formfile.
    pub step: String,
    /// The key of the layer in the builder's cache.
    pub layer: Digest,
    /// What of the file system it changed or added.
    pub changed_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MissingRequest {
    pub blocks: Vec<Digest>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MissingReply {
    pub missing: Vec<Digest>,
}

/// One block in the body of `PUT /v1/blocks`: its digest (32 bytes), the length of what follows (u32, little-endian, at most
/// [`BlockFrame::MAX_COMPRESSED`]) and the block, compressed with zstd. Frames follow each other without padding.
pub struct BlockFrame;

impl BlockFrame {
    pub const HEADER: usize = 36;
    /// A block holds 64 KiB; incompressible ones grow by a few bytes.
    pub const MAX_COMPRESSED: usize = 66 * 1024;

    pub fn header(digest: &Digest, compressed: u32) -> [u8; Self::HEADER] {
        let mut header = [0; Self::HEADER];
        header[..32].copy_from_slice(digest.as_bytes());
        header[32..].copy_from_slice(&compressed.to_le_bytes());
        header
    }

    pub fn parse_header(header: &[u8; Self::HEADER]) -> (Digest, u32) {
        let mut digest = [0; 32];
        digest.copy_from_slice(&header[..32]);
        let mut length = [0; 4];
        length.copy_from_slice(&header[32..]);
        (Digest::from_bytes(digest), u32::from_le_bytes(length))
    }

    /// The blocks of a body that is whole; `None` when it is not.
    #[must_use]
    pub fn split(mut body: &[u8]) -> Option<Vec<(Digest, Vec<u8>)>> {
        let mut frames = Vec::new();
        while !body.is_empty() {
            let (header, rest) = body.split_first_chunk()?;
            let (digest, length) = Self::parse_header(header);
            let (frame, rest) = rest.split_at_checked(length as usize)?;
            frames.push((digest, frame.to_vec()));
            body = rest;
        }
        Some(frames)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BlocksReply {
    pub stored: u64,
}

/// Asks for blocks of a stored image. The answer is a frame ([`BlockFrame`]) for each, in the order asked; its digest is that of what the
/// host has there, so that whoever knows the manifest sees which one is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReadBlocksRequest {
    /// Their numbers from 0: each is 64 KiB of the root file system, the last one what is left of it. From 1 to
    /// [`ReadBlocksRequest::MAX`] of them.
    #[schema(min_items = 1, max_items = 64)]
    pub blocks: Vec<u64>,
}

impl ReadBlocksRequest {
    /// 4 MiB: what an agent holds for one answer.
    pub const MAX: usize = 64;
}

/// Makes an image, or a kernel bundle, of blocks that are all there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// Of the manifest's text, which was sent before with `PUT /v1/manifests/{digest}`.
    pub manifest: Digest,
}

/// A manifest was taken in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ManifestReply {
    /// Length of its text.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Kernel {
    pub digest: Digest,
    /// `6.1.0-56-cloud-amd64`
    pub release: String,
    pub size_bytes: u64,
    /// Why it is not to be removed: `vm/web` runs with it or ran with it when it was healthy last, `image/disk:1` brings it along or is what
    /// a VM goes back to with it, `snapshot/web/before` was made with it.
    #[serde(default)]
    pub needed_by: Vec<String>,
    /// It was sent or asked for lately, perhaps for a VM that is still to come: until then it is not removed either.
    #[serde(default)]
    pub kept_until: Option<Timestamp>,
}

/// What reading the whole of an image found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    pub name: Name,
    pub version: u32,
    /// Of the manifest.
    pub digest: Digest,
    /// Blocks of 64 KiB that were read, holes included.
    pub blocks: u64,
    /// How many of them are not what they were.
    pub damaged_blocks: u64,
    /// The first of those, at most [`Verification::MAX_LISTED`].
    pub damaged: Vec<DamagedBlock>,
}

impl Verification {
    pub const MAX_LISTED: usize = 1000;
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DamagedBlock {
    /// The block's number, from 0.
    pub index: u64,
    /// Where it begins in the root file system, in bytes.
    pub offset: u64,
    /// What it should hash to; `None` when it should be zeros, or should not be there.
    pub digest: Option<Digest>,
}
