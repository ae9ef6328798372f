//! What a sandbox is, kept in its directory from one start to the next.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use form_types::{Digest, Name, PublicKey, SecretKey};
use serde::{Deserialize, Serialize};

use super::Accelerator;
use crate::{context::KnownHost, failure::Failure};

const FILE: &str = "sandbox.json";

/// `sandbox.json` of a host, readable by its owner alone: it holds the host's secret key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of the programs in it.
    pub version: String,
    pub cpus: u32,
    pub memory_mib: u64,
    pub disk_gib: u64,
    /// Of this machine's loopback address, UDP: leads to the agent.
    pub port: u16,
    pub accelerator: Accelerator,
    /// The context that was current before, to go back to.
    #[serde(default)]
    pub previous_context: Option<Name>,
    /// How the sandbox's hosts see each other, in the first one's record; a sandbox with one host has nothing to see.
    #[serde(default)]
    pub peers: Option<Peers>,
    /// Of the programs that are on its disk, as they were when it was made; see [`super::installed_programs`].
    #[serde(default)]
    pub programs: Option<Digest>,
    host_key: String,
}

/// The hosts of a sandbox that has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    pub hosts: u32,
    /// UDP port of the multicast group that is their network.
    pub port: u16,
}

impl Record {
    /// How many hosts the sandbox of this first host's record has.
    pub fn hosts(&self) -> u32 {
        self.peers.map_or(1, |peers| peers.hosts)
    }

    pub fn new(cpus: u32, memory_mib: u64, disk_gib: u64, port: u16, accelerator: Accelerator, host_key: &SecretKey) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let host_key = host_key.to_hex();
        Self { version, cpus, memory_mib, disk_gib, port, accelerator, previous_context: None, peers: None, programs: None, host_key }
    }

    /// What is to be said of a host that goes on with other programs than those that are installed now; nothing of one that was made
    /// before this was noted, unless its version says it.
    pub fn outdated(&self, host: &Name, installed: Option<Digest>) -> Option<String> {
        let version = env!("CARGO_PKG_VERSION");
        let way = "`form sandbox down` and `up` make a new one";
        if self.version != version {
            return Some(format!("the agent of {host} is of version {}, this is {version}; {way}", self.version));
        }
        let differs = self.programs.zip(installed).is_some_and(|(its, installed)| its != installed);
        differs.then(|| format!("{host} goes on with the programs that it was made with, and others are installed now; {way}"))
    }

    /// `None` when the sandbox was never made to its end.
    ///
    /// # Errors
    /// When it is there and cannot be understood.
    pub fn load(directory: &Path) -> Result<Option<Self>, Failure> {
        let path = directory.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::io("read", &path, &error)),
        };
        let record: Result<Self, _> = serde_json::from_slice(&text);
        record.map(Some).map_err(|error| {
            Failure::failed(format!("{} cannot be understood: {error}", path.display()))
                .hint("another version may have made it; `form sandbox down` removes the sandbox")
        })
    }

    /// Writes it so that a crash leaves the old one or the new one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), Failure> {
        let json = serde_json::to_vec_pretty(self).map_err(|error| Failure::failed(format!("the sandbox has no JSON form: {error}")))?;
        write_private(&directory.join(FILE), &json)
    }

    /// # Errors
    /// When the file was changed by hand.
    pub fn host_key(&self) -> Result<SecretKey, Failure> {
        SecretKey::from_hex(&self.host_key).map_err(|error| {
            Failure::failed(format!("the sandbox's key is damaged: {error}")).hint("`form sandbox down` removes the sandbox")
        })
    }

    /// # Errors
    /// As [`Record::host_key`].
    pub fn public_key(&self) -> Result<PublicKey, Failure> {
        Ok(self.host_key()?.public())
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The host as a context knows it.
    ///
    /// # Errors
    /// As [`Record::host_key`].
    pub fn known_host(&self, name: &Name) -> Result<KnownHost, Failure> {
        Ok(KnownHost { name: name.to_string(), address: self.address(), public_key: self.public_key()? })
    }
}

/// Writes a file with secrets: for its owner alone, whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let fresh = path.with_extension("new");
    let written = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    });
    written.map_err(|error| Failure::io("write", path, &error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_saved_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Record::load(directory.path()).unwrap().is_none());
        let key = SecretKey::from_bytes([7; 32]);
        let mut record = Record::new(2, 2048, 20, 40_000, Accelerator::Software, &key);
        record.previous_context = Some("home".parse().unwrap());
        assert_eq!(record.hosts(), 1);
        record.peers = Some(Peers { hosts: 3, port: 40_001 });
        record.save(directory.path()).unwrap();
        assert_eq!(Record::load(directory.path()).unwrap().as_ref(), Some(&record));
        assert_eq!(record.hosts(), 3);
        let path = directory.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let host = record.known_host(&"box".parse().unwrap()).unwrap();
        assert_eq!((host.address.as_str(), host.public_key), ("127.0.0.1:40000", key.public()));
        fs::write(&path, "{}").unwrap();
        assert!(Record::load(directory.path()).unwrap_err().error.hint.unwrap().contains("form sandbox down"));
    }

    #[test]
    fn a_host_with_other_programs_than_those_installed_is_told() {
        let name: Name = "box".parse().unwrap();
        let mut record = Record::new(2, 2048, 20, 40_000, Accelerator::Software, &SecretKey::from_bytes([7; 32]));
        let (old, new) = (Some(Digest::of(b"old")), Some(Digest::of(b"new")));
        assert_eq!(record.outdated(&name, new), None, "one that was made before this was noted");
        record.programs = old;
        assert_eq!((record.outdated(&name, old), record.outdated(&name, None)), (None, None));
        let said = record.outdated(&name, new).unwrap();
        assert!(said.contains("box goes on with the programs") && said.contains("form sandbox down"), "{said}");
        record.version = "0.0.9".to_owned();
        assert!(record.outdated(&name, old).unwrap().contains("of version 0.0.9"));
    }
}
