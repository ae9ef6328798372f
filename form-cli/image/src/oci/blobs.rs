//! Blobs of registries on this machine's disk, named by their digest: what was fetched once is not fetched again.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::{
    OciDigest, OciError,
    client::{Client, Sink},
    digest::HashingReader,
};

/// Unfinished downloads begin with this.
const TEMPORARY: &str = "tmp-";

#[derive(Clone, Debug)]
pub(crate) struct BlobStore {
    directory: PathBuf,
}

fn during<T>(action: &str, path: &Path, result: io::Result<T>) -> Result<T, OciError> {
    result.map_err(|source| OciError::Io { action: format!("{action} {}", path.display()), source })
}

impl BlobStore {
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    pub fn path(&self, digest: &OciDigest) -> PathBuf {
        self.directory.join(digest.hex())
    }

    /// Whether a blob is there whole and undamaged.
    pub fn has(&self, digest: &OciDigest) -> bool {
        let Ok(file) = File::open(self.path(digest)) else { return false };
        let mut reader = HashingReader::new(file, u64::MAX);
        io::copy(&mut reader, &mut io::sink()).is_ok() && reader.digest() == *digest
    }

    /// A small blob, when it is there and undamaged.
    pub fn read(&self, digest: &OciDigest) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(digest)).ok()?;
        (OciDigest::of(&bytes) == *digest).then_some(bytes)
    }

    /// Keeps a small blob.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn add(&self, bytes: &[u8]) -> Result<OciDigest, OciError> {
        let digest = OciDigest::of(bytes);
        let mut file = self.temporary()?;
        let written = file.as_file_mut().write_all(bytes);
        during("write", file.path(), written)?;
        self.keep(file, &digest)?;
        Ok(digest)
    }

    /// Fetches a blob of `size` bytes.
    ///
    /// # Errors
    /// When it cannot be had, has another size or digest, or the disk is full. Nothing of it is kept then.
    pub fn fetch(&self, client: &mut Client<'_>, digest: &OciDigest, size: u64, what: &str) -> Result<(), OciError> {
        let mut download = Download { file: self.temporary()?, received: 0, size, what };
        client.blob(digest, &mut download)?;
        if download.received != size {
            return Err(OciError::Size { what: what.to_owned(), expected: size, found: download.received });
        }
        let path = download.file.path().to_owned();
        let mut reader = HashingReader::new(during("read", &path, File::open(&path))?, u64::MAX);
        during("read", &path, io::copy(&mut reader, &mut io::sink()))?;
        let found = reader.digest();
        if found != *digest {
            return Err(OciError::Digest { what: what.to_owned(), expected: *digest, found });
        }
        self.keep(download.file, digest)
    }

    fn temporary(&self) -> Result<tempfile::NamedTempFile, OciError> {
        during("create", &self.directory, fs::create_dir_all(&self.directory))?;
        during("create a file in", &self.directory, tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(&self.directory))
    }

    fn keep(&self, file: tempfile::NamedTempFile, digest: &OciDigest) -> Result<(), OciError> {
        let path = self.path(digest);
        during("write", &path, file.as_file().sync_all())?;
        during("write", &path, file.persist(&path).map(drop).map_err(|error| error.error))
    }

    /// Removes what killed builds left. Only while the cache is locked.
    pub fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(TEMPORARY)) {
            let _ = fs::remove_file(entry.path());
        }
    }

    /// Removes one that is needed no more.
    pub fn remove(&self, digest: &OciDigest) {
        if let Err(error) = fs::remove_file(self.path(digest)) {
            tracing::debug!(%digest, %error, "a blob stays until the next prune");
        }
    }

    /// Removes every blob: a base that is wanted is in the layers. Gives back the bytes that went.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn clear(&self) -> io::Result<u64> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error),
        };
        let mut bytes = 0;
        for entry in entries {
            let entry = entry?;
            bytes += entry.metadata()?.len();
            fs::remove_file(entry.path())?;
        }
        Ok(bytes)
    }
}

/// A blob on its way into a file.
struct Download<'a> {
    file: tempfile::NamedTempFile,
    received: u64,
    size: u64,
    what: &'a str,
}

impl Sink for Download<'_> {
    fn received(&self) -> u64 {
        self.received
    }

    fn is_complete(&self) -> bool {
        self.received == self.size && self.size > 0
    }

    fn restart(&mut self) -> Result<(), OciError> {
        self.received = 0;
        let file = self.file.as_file_mut();
        let rewound = file.set_len(0).and_then(|()| io::Seek::rewind(file));
        during("write", self.file.path(), rewound)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), OciError> {
        self.received += bytes.len() as u64;
        // More than was announced is not even written.
        if self.received > self.size {
            return Err(OciError::Size { what: self.what.to_owned(), expected: self.size, found: self.received });
        }
        let written = self.file.as_file_mut().write_all(bytes);
        during("write", self.file.path(), written)
    }
}
