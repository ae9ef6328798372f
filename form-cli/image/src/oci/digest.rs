//! SHA-256 digests: how OCI registries name a manifest or a blob (OCI image specification, "Digests").

use std::{fmt, io, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Written `sha256:` and 64 lower-case hexadecimal digits. Other algorithms are not read: registries use none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OciDigest([u8; 32]);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is no digest: it must be `sha256:` and 64 lower-case hexadecimal digits")]
pub struct OciDigestError(String);

impl OciDigest {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digits alone: a file name.
    pub(crate) fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for OciDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for OciDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for OciDigest {
    type Err = OciDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || OciDigestError(text.chars().take(100).collect());
        let digits = text.strip_prefix("sha256:").ok_or_else(wrong)?;
        let mut bytes = [0; 32];
        // Upper case would be a second name for the same thing.
        if digits.bytes().any(|byte| byte.is_ascii_uppercase()) || hex::decode_to_slice(digits, &mut bytes).is_err() {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for OciDigest {
    type Error = OciDigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<OciDigest> for String {
    fn from(digest: OciDigest) -> Self {
        digest.to_string()
    }
}

/// Hashes and counts what passes through, and stops after a number of bytes.
pub(crate) struct HashingReader<R> {
    inner: R,
    hasher: Sha256,
    count: u64,
    limit: u64,
}

impl<R: io::Read> HashingReader<R> {
    /// `limit`: more bytes than these are an error of kind [`io::ErrorKind::FileTooLarge`].
    pub fn new(inner: R, limit: u64) -> Self {
        Self { inner, hasher: Sha256::new(), count: 0, limit }
    }

    /// Bytes so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// More than the limit came.
    pub fn is_exceeded(&self) -> bool {
        self.count > self.limit
    }

    pub fn digest(self) -> OciDigest {
        OciDigest(self.hasher.finalize().into())
    }
}

impl<R: io::Read> io::Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_exceeded() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let count = self.inner.read(buffer)?;
        self.count += count as u64;
        if self.is_exceeded() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn digests_have_one_form() {
        let digest = OciDigest::of(b"");
        assert_eq!(digest.to_string(), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for bad in ["", "sha256:", "sha512:00", "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855", "sha256:e3b0"] {
            assert!(bad.parse::<OciDigest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_read_is_hashed_and_bounded() {
        let mut reader = HashingReader::new(&b"hello"[..], 5);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!((reader.count(), reader.is_exceeded(), reader.digest()), (5, false, OciDigest::of(b"hello")));
        let mut reader = HashingReader::new(&b"hello"[..], 4);
        assert_eq!(reader.read_to_string(&mut String::new()).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert!(reader.is_exceeded());
    }
}
