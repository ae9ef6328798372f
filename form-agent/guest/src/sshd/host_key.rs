//! The server's own key: made once, kept in the root file system where an image's own sshd would look for it.

use std::{fs, path::Path};

use russh::keys::{
    PrivateKey,
    ssh_key::{LineEnding, private::Ed25519Keypair},
};
use rustix::{io::Errno, rand::GetRandomFlags};

use crate::{files, report::say};

const NAME: &str = "ssh_host_ed25519_key";

#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    #[error("there is no randomness for a host key: {0}")]
    Random(#[from] Errno),
    #[error("a new host key cannot be written as text: {0}")]
    Encode(#[from] russh::keys::ssh_key::Error),
    #[error("the host key cannot be kept: {0}")]
    Keep(#[from] crate::error::Error),
}

/// Reads the key in `directory` (`/etc/ssh`), or makes one.
///
/// # Errors
/// When there is neither a key nor room for one.
pub fn load_or_make(directory: &Path) -> Result<PrivateKey, HostKeyError> {
    let path = directory.join(NAME);
    if let Ok(text) = fs::read(&path) {
        match PrivateKey::from_openssh(&text) {
            Ok(key) if !key.is_encrypted() => return Ok(key),
            Ok(_) => say(format_args!("sshd: {} has a passphrase and is replaced", path.display())),
            Err(error) => say(format_args!("sshd: {} is no key and is replaced: {error}", path.display())),
        }
    }
    let key = make()?;
    files::write(&path, key.to_openssh(LineEnding::LF)?.as_bytes(), Some(0o600))?;
    let public = format!("{}\n", key.public_key().to_openssh()?);
    files::write(&path.with_extension("pub"), public.as_bytes(), Some(0o644))?;
    Ok(key)
}

/// From the kernel's randomness alone: a copy of this machine has the same memory, and another kernel's randomness.
fn make() -> Result<PrivateKey, HostKeyError> {
    let mut seed = [0; 32];
    let mut filled = 0;
    while let Some(rest) = seed.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, GetRandomFlags::empty()) {
            Err(Errno::INTR) => {}
            count => filled += count?,
        }
    }
    Ok(PrivateKey::from(Ed25519Keypair::from_seed(&seed)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_made_once_and_anew_when_it_is_gone() {
        let directory = std::env::temp_dir().join(format!("form-guest-host-key-{}", std::process::id()));
        let first = load_or_make(&directory).unwrap();
        let public = |key: &PrivateKey| key.public_key().to_openssh().unwrap();
        assert_eq!(public(&load_or_make(&directory).unwrap()), public(&first));
        let path = directory.join(NAME);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(fs::read_to_string(&path).unwrap().starts_with("-----BEGIN OPENSSH PRIVATE KEY-----\n"));
        assert_eq!(fs::read_to_string(directory.join("ssh_host_ed25519_key.pub")).unwrap(), public(&first) + "\n");
        fs::remove_file(&path).unwrap();
        let second = load_or_make(&directory).unwrap();
        assert_ne!(public(&second), public(&first));
        fs::write(&path, "garbage").unwrap();
        assert_ne!(public(&load_or_make(&directory).unwrap()), public(&second));
        fs::remove_dir_all(&directory).unwrap();
    }
}
