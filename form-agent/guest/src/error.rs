//! What can go wrong while the machine starts, with what was being done.

use std::{io, path::PathBuf};

use thiserror::Error;

#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot {what}: {source}")]
    System { what: String, source: io::Error },
    #[error("no block device has the serial `{serial}` after {waited_ms} ms; there are {present}. Attach the disk with this serial")]
    DeviceMissing { serial: String, waited_ms: u128, present: String },
    #[error("no network interface has the address {mac}; there are {present}. Attach the interface with this address")]
    InterfaceMissing { mac: String, present: String },
    #[error("`{text}` is no hardware address: six bytes like 52:54:00:12:34:56 are needed")]
    BadMac { text: String },
    #[error("{device} holds no ext4 file system: make one on it, or name another disk")]
    NotExt4 { device: String },
    #[error("{device} holds something that is no ext4 file system, and is left as it is: attach it without a path, or use another volume")]
    NotBlank { device: String },
    #[error("{device} holds no file system, and none is made on a volume that is attached read-only: attach it for writing once")]
    BlankReadOnly { device: String },
    #[error("{device} is in use: {users}")]
    InUse { device: String, users: String },
    #[error("{device} has {has} bytes after {waited_ms} ms, not {wanted}")]
    SizeMissing { device: String, has: u64, wanted: u64, waited_ms: u128 },
    #[error("{has} of {wanted} processors are there after {waited_ms} ms")]
    ProcessorsMissing { has: u32, wanted: u32, waited_ms: u128 },
    #[error("{path} is not an absolute path without `..`")]
    BadPath { path: String },
    #[error("the settings cannot be read: {source}. The host's agent and form-guest must be of one version")]
    Settings { source: serde_json::Error },
    #[error("there is no user `{name}` in this image: create it with a USER or RUN line")]
    NoSuchUser { name: String },
    #[error("there is no group `{name}` in this image: create it with a RUN line")]
    NoSuchGroup { name: String },
    #[error("{file} has no free number left for `{name}`")]
    NoFreeId { file: &'static str, name: String },
    #[error("{program} failed with {status}: {output}")]
    Program { program: &'static str, status: String, output: String },
    #[error("the kernel answered a {what} request with {source}")]
    Netlink { what: String, source: io::Error },
    #[error("the kernel's answer to a {what} request cannot be read")]
    NetlinkAnswer { what: &'static str },
}

/// Adds what was being done to a bare system error.
pub trait Context<T> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, Error>;
    fn doing(self, what: impl Into<String>) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, Error> {
        self.map_err(|source| Error::File { action, path: path.into(), source: source.into() })
    }

    fn doing(self, what: impl Into<String>) -> Result<T, Error> {
        self.map_err(|source| Error::System { what: what.into(), source: source.into() })
    }
}
