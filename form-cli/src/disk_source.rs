//! Where a volume that is imported comes from.

use std::path::PathBuf;

use form_api::{ErrorCode, volume::Piece};
use form_nbd::{Client, Uri};

use crate::{disk_file::DiskFile, failure::Failure};

/// A disk to read.
pub enum DiskSource {
    File(PathBuf, DiskFile),
    Nbd(Uri, Box<Client>),
}

impl DiskSource {
    /// # Errors
    /// When it cannot be read, or is an image that needs another file.
    pub fn of_file(path: PathBuf) -> Result<Self, Failure> {
        let disk = DiskFile::open(&path)?;
        Ok(Self::File(path, disk))
    }

    /// Blocks until the server has said what it serves.
    ///
    /// # Errors
    /// When there is no such export.
    pub fn of_export(uri: Uri) -> Result<Self, Failure> {
        let client = Client::connect(&uri).map_err(|error| failed(&uri, &error))?;
        Ok(Self::Nbd(uri, Box::new(client)))
    }

    pub const fn size(&self) -> u64 {
        match self {
            Self::File(_, disk) => disk.size(),
            Self::Nbd(_, client) => client.size(),
        }
    }

    /// What it is and where: `qcow2 from disk.qcow2`.
    pub fn describe(&self) -> String {
        match self {
            Self::File(path, disk) => format!("{} from {}", disk.format().as_str(), path.display()),
            Self::Nbd(uri, _) => format!("what {uri} serves"),
        }
    }

    /// Calls `each` with everything that is no hole and not zeros, in pieces, until it says that this is enough.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn pieces(self, mut each: impl FnMut(u64, &[u8]) -> bool) -> Result<(), Failure> {
        let (uri, mut client) = match self {
            Self::File(_, disk) => return disk.pieces(each),
            Self::Nbd(uri, client) => (uri, client),
        };
        let mut read = || -> Result<(), form_nbd::Error> {
            let mut buffer = vec![0; Piece::MAX_BYTES];
            let mut at = 0;
            while at < client.size() {
                let extent = client.extent(at)?;
                let end = at + extent.length;
                while !extent.is_hole && at < end {
                    let count = usize::try_from(end - at).unwrap_or(buffer.len()).min(buffer.len());
                    let piece = &mut buffer[..count];
                    client.read_at(piece, at)?;
                    if piece.iter().any(|byte| *byte != 0) && !each(at, piece) {
                        return Ok(());
                    }
                    at += count as u64;
                }
                at = end;
            }
            Ok(())
        };
        read().map_err(|error| failed(&uri, &error))
    }
}

fn failed(uri: &Uri, error: &form_nbd::Error) -> Failure {
    use form_nbd::Error::{Broken, Disk, NoTls, Nonsense, Refused, Silent, Tls, Unknown, Unreachable, WantsTls};
    let (code, hint) = match error {
        Unreachable { .. } => (ErrorCode::Unavailable, Some("look at the address, and whether its server runs")),
        Broken(_) | Silent => (ErrorCode::Unavailable, Some("run the same command again")),
        Unknown(_) => (ErrorCode::NotFound, Some("`nbdinfo --list` shows what a server has")),
        WantsTls => (ErrorCode::Failed, Some("write nbds:// instead of nbd://, and ?tls-certificates=DIRECTORY at its end")),
        NoTls => (ErrorCode::Failed, Some("write nbd:// instead of nbds:// where the network is yours")),
        Refused(_) | Tls(_) | Nonsense(_) | Disk { .. } => (ErrorCode::Failed, None),
    };
    let failure = Failure::new(code, format!("{uri}: {error}"));
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}
