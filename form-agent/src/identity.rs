//! Who this host is: its key, its cluster, its owner.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use form_types::{ClusterId, Digest, HostId, PublicKey, SecretKey};
use serde::{Deserialize, Serialize};

use crate::config::Paths;

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} does not hold a host key: restore it from a copy, or move it away and run `form-agent init` for a new host")]
    Key { path: PathBuf },
    #[error("{path} is damaged ({source}): restore it from a copy, or move it away and run `form-agent init` again")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("the operating system has no random bytes to give: {0}")]
    Entropy(String),
}

/// What `form-agent init` settles and a claim changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Membership {
    cluster: ClusterId,
    owner: Option<PublicKey>,
    /// BLAKE3 of the one-time secret that makes somebody the owner; gone once used.
    claim_secret: Option<Digest>,
}

#[derive(Debug)]
pub struct Identity {
    key: SecretKey,
    membership: Membership,
    path: PathBuf,
}

/// Writes a file so that a crash leaves the old one or the new one, never half.
///
/// # Errors
/// When the file cannot be written, made durable or put in place.
pub fn write_atomically(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(&temporary)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), |parent| fs::File::open(parent)?.sync_all())
}

impl Identity {
    /// Reads the host's identity, making what is missing: a key and a cluster at the first start. `owner` is the configured one.
    ///
    /// # Errors
    /// When a file cannot be read or written, or is damaged.
    pub fn open(paths: &Paths, owner: Option<PublicKey>) -> Result<Self, IdentityError> {
        let key = Self::open_key(&paths.host_key())?;
        let path = paths.database().join("identity.json");
        let membership = match Self::read_membership(&path)? {
            Some(membership) => membership,
            None => Membership {
                cluster: ClusterId::random().map_err(|error| IdentityError::Entropy(error.to_string()))?,
                owner: None,
                claim_secret: None,
            },
        };
        let mut identity = Self { key, membership, path };
        if identity.membership.owner.is_none() {
            identity.membership.owner = owner;
        }
        identity.save()?;
        Ok(identity)
    }

    fn read_membership(path: &Path) -> Result<Option<Membership>, IdentityError> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|source| IdentityError::Json { path: path.to_owned(), source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(IdentityError::Io { path: path.to_owned(), source }),
        }
    }

    fn open_key(path: &Path) -> Result<SecretKey, IdentityError> {
        match fs::read_to_string(path) {
            Ok(text) => SecretKey::from_hex(&text).map_err(|_| IdentityError::Key { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = SecretKey::random().map_err(|error| IdentityError::Entropy(error.to_string()))?;
                write_atomically(path, 0o600, format!("{}\n", key.to_hex()).as_bytes())
                    .map_err(|source| IdentityError::Io { path: path.to_owned(), source })?;
                Ok(key)
            }
            Err(source) => Err(IdentityError::Io { path: path.to_owned(), source }),
        }
    }

    fn save(&self) -> Result<(), IdentityError> {
        let json = serde_json::to_vec_pretty(&self.membership).map_err(|source| IdentityError::Json { path: self.path.clone(), source })?;
        write_atomically(&self.path, 0o600, &json).map_err(|source| IdentityError::Io { path: self.path.clone(), source })
    }

    pub const fn key(&self) -> &SecretKey {
        &self.key
    }

    pub fn host_id(&self) -> HostId {
        HostId::of(&self.key.public())
    }

    pub const fn cluster(&self) -> ClusterId {
        self.membership.cluster
    }

    pub const fn owner(&self) -> Option<PublicKey> {
        self.membership.owner
    }

    /// A new one-time token, `<host key>.<secret>`: with its first half the client pins the host, with the second it becomes the owner.
    /// An earlier token stops working.
    ///
    /// # Errors
    /// When the identity cannot be saved.
    pub fn new_token(&mut self) -> Result<String, IdentityError> {
        let secret = SecretKey::random().map_err(|error| IdentityError::Entropy(error.to_string()))?.to_hex();
        self.membership.claim_secret = Some(Digest::of(secret.as_bytes()));
        self.save()?;
        let key = self.key.public().to_string();
        Ok(format!("{}.{secret}", key.trim_start_matches("ed25519:")))
    }

    /// Makes `key` the owner when there is none and the secret is the token's. The owner may claim again: it changes nothing.
    ///
    /// # Errors
    /// When the identity cannot be saved.
    pub fn claim(&mut self, key: PublicKey, secret: &str) -> Result<bool, IdentityError> {
        // `form-agent init` may have written a new token while this agent runs.
        self.membership = Self::read_membership(&self.path)?.unwrap_or_else(|| self.membership.clone());
        if self.membership.owner == Some(key) {
            return Ok(true);
        }
        // Digests are compared, so the time this takes says nothing about the secret.
        if self.membership.owner.is_some() || self.membership.claim_secret != Some(Digest::of(secret.as_bytes())) {
            return Ok(false);
        }
        self.membership.owner = Some(key);
        self.membership.claim_secret = None;
        self.save()?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_with_the_token_owns_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        paths.create_all().unwrap();
        let mut identity = Identity::open(&paths, None).unwrap();
        let token = identity.new_token().unwrap();
        let (_, secret) = token.split_once('.').unwrap();
        let (first, second) = (SecretKey::from_bytes([1; 32]).public(), SecretKey::from_bytes([2; 32]).public());
        assert!(!identity.claim(first, "wrong").unwrap());
        assert!(identity.claim(first, secret).unwrap());
        assert!(identity.claim(first, "again").unwrap());
        assert!(!identity.claim(second, secret).unwrap());
        let (key, cluster) = (identity.key().public(), identity.cluster());
        let again = Identity::open(&paths, None).unwrap();
        assert_eq!((again.key().public(), again.cluster(), again.owner()), (key, cluster, Some(first)));
        assert_eq!(fs::metadata(paths.host_key()).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_running_agent_takes_the_token_of_a_later_init() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        paths.create_all().unwrap();
        let mut running = Identity::open(&paths, None).unwrap();
        let token = Identity::open(&paths, None).unwrap().new_token().unwrap();
        let (_, secret) = token.split_once('.').unwrap();
        assert!(running.claim(SecretKey::from_bytes([1; 32]).public(), secret).unwrap());
    }

    #[test]
    fn a_damaged_key_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        paths.create_all().unwrap();
        fs::write(paths.host_key(), "nonsense").unwrap();
        assert!(matches!(Identity::open(&paths, None), Err(IdentityError::Key { .. })));
        assert_eq!(fs::read_to_string(paths.host_key()).unwrap(), "nonsense");
    }
}
