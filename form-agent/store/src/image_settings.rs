//! What the owner of a host has set of an image: `<root>/vm-images/<digest>/settings.json`. It is the host's own, and no part of the image:
//! it changes no digest, and does not travel with it.

use std::{collections::BTreeMap, io, path::Path};

use form_types::Digest;
use serde::{Deserialize, Serialize};

use crate::{
    ImageEntry, Store,
    durable::{read_json, replace_file, to_json},
    error::{Result, StoreError},
    hold,
};

const SETTINGS: &str = "settings.json";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageSettings {
    pub labels: BTreeMap<String, String>,
    /// It is not to be removed.
    pub keep: bool,
}

impl ImageSettings {
    /// Those of the image in `directory`. Where they cannot be read nobody knows whether it is to be kept: then it is.
    pub(crate) fn read(directory: &Path) -> Self {
        let path = directory.join(SETTINGS);
        match read_json(&path) {
            Ok(settings) => settings,
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Self::default(),
            Err(error) => {
                tracing::warn!(%error, "the settings of an image cannot be read: it is kept; `form image set` writes them anew");
                Self { keep: true, ..Self::default() }
            }
        }
    }
}

impl Store {
    /// Gives an image other settings.
    ///
    /// # Errors
    /// [`StoreError::NoImageDigest`], and those of the file system: then they are as before.
    pub fn set_image(&self, digest: &Digest, change: impl FnOnce(&mut ImageSettings)) -> Result<ImageEntry> {
        let _turn = hold(&self.locks.images);
        let mut settings = self.by_digest(digest)?.settings;
        change(&mut settings);
        let path = self.image_dir(digest).join(SETTINGS);
        replace_file(&self.images, &path, &to_json(&path, &settings)?, 0o644)?;
        self.by_digest(digest)
    }
}
