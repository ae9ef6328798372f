//! Records of snapshots, in two lines: what it is (format, version and BLAKE3 digest of the second line), and the record.

use std::path::Path;

use form_types::Digest;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{durable::to_json, error::Result};

/// What such a file is, and how it is read.
pub struct Kind {
    pub format: &'static str,
    /// Raised with every change of what the record describes.
    pub version: u32,
}

#[derive(Serialize, Deserialize)]
struct Head {
    format: String,
    version: u32,
    /// Of the line with the record.
    digest: Digest,
}

/// Why a record cannot be read.
pub enum Fault {
    /// Of a release that this one does not know.
    Version(u32),
    Damaged(String),
}

impl Kind {
    /// The text of a record that will be at `path`.
    pub fn write(&self, path: &Path, record: &impl Serialize) -> Result<Vec<u8>> {
        let body = to_json(path, record)?;
        let head = Head { format: self.format.to_owned(), version: self.version, digest: Digest::of(&body) };
        let mut text = to_json(path, &head)?;
        text.push(b'\n');
        text.extend_from_slice(&body);
        Ok(text)
    }

    /// `file` is what the record is called, for the words of a fault.
    pub fn read<T: DeserializeOwned>(&self, file: &str, text: &[u8]) -> Result<T, Fault> {
        let (head, body) = text.split_at(text.iter().position(|byte| *byte == b'\n').unwrap_or(text.len()));
        let body = body.get(1..).unwrap_or_default();
        let foreign = || Fault::Damaged(format!("{file} is not a snapshot's"));
        let head: Head = serde_json::from_slice(head).map_err(|_| foreign())?;
        if head.format != self.format {
            return Err(foreign());
        }
        if head.version != self.version {
            return Err(Fault::Version(head.version));
        }
        if Digest::of(body) != head.digest {
            return Err(Fault::Damaged(format!("{file} is torn: its checksum is wrong")));
        }
        serde_json::from_slice(body).map_err(|error| Fault::Damaged(format!("{file}: {error}")))
    }
}
