//! The user's key file: the secret key in hexadecimal digits, or sealed under a passphrase.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use form_api::ErrorCode;
use form_types::{PublicKey, SecretKey};

use super::{
    directory,
    passphrase::Source,
    sealed::{SealError, SealedKey},
    write_private,
};
use crate::failure::Failure;

/// `~/.config/form/identity`
///
/// # Errors
/// When there is no home directory.
pub fn path() -> Result<PathBuf, Failure> {
    Ok(directory()?.join("identity"))
}

/// A key as it is in its file.
pub enum Stored {
    Plain(SecretKey),
    Sealed(SealedKey),
}

impl Stored {
    pub fn public(&self) -> PublicKey {
        match self {
            Self::Plain(key) => key.public(),
            Self::Sealed(sealed) => sealed.public_key,
        }
    }

    pub const fn has_passphrase(&self) -> bool {
        matches!(self, Self::Sealed(_))
    }

    /// # Errors
    /// When there is no passphrase to be had, or it is the wrong one.
    pub fn unlock(self, passphrase: &Source<'_>) -> Result<SecretKey, Failure> {
        match self {
            Self::Plain(key) => Ok(key),
            Self::Sealed(sealed) => {
                let passphrase = passphrase.get("Passphrase of your key")?;
                sealed.open(&passphrase).map_err(|error| wrong(&error))
            }
        }
    }
}

fn wrong(error: &SealError) -> Failure {
    match error {
        SealError::WrongPassphrase => Failure::new(ErrorCode::NotAllowed, format!("your key cannot be unlocked: {error}"))
            .hint("nobody can recover a lost passphrase: restore a copy of the key, or make another with `form key new --force`"),
        _ => Failure::failed(format!("your key cannot be unlocked: {error}"))
            .hint("restore the file from a copy, or make another with `form key new --force`"),
    }
}

/// The user's key as it is stored: its public half needs no passphrase.
///
/// # Errors
/// When there is no key, others may read it, or it is damaged.
pub fn load() -> Result<Stored, Failure> {
    load_from(&path()?)
}

fn load_from(path: &Path) -> Result<Stored, Failure> {
    let text = fs::read_to_string(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure::not_found("you have no key yet").hint("make one with `form key new`"),
        _ => Failure::io("read", path, &error),
    })?;
    let text = zeroize::Zeroizing::new(text);
    let mode = fs::metadata(path).map_err(|error| Failure::io("read", path, &error))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(Failure::new(ErrorCode::NotAllowed, format!("others may read your key {}", path.display()))
            .hint(format!("`chmod 600 {}`; if somebody may have read it, make another with `form key new --force`", path.display())));
    }
    let damaged = |error: String| {
        Failure::failed(format!("{} holds no key: {error}", path.display()))
            .hint("restore it from a copy, or make another with `form key new --force`")
    };
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(&text).map(Stored::Sealed).map_err(|error| damaged(error.to_string()));
    }
    SecretKey::from_hex(&text).map(Stored::Plain).map_err(|error| damaged(error.to_string()))
}

/// Makes a key. An existing one is replaced only with `force`: hosts that know it would no longer know you.
///
/// # Errors
/// When there is one already, there is no passphrase to be had, or the file cannot be written.
pub fn create(force: bool, passphrase: Option<&Source<'_>>) -> Result<PublicKey, Failure> {
    create_at(&path()?, force, passphrase)
}

fn create_at(path: &Path, force: bool, passphrase: Option<&Source<'_>>) -> Result<PublicKey, Failure> {
    if path.exists() && !force {
        return Err(Failure::new(ErrorCode::Conflict, format!("there is a key already: {}", path.display()))
            .hint("hosts know you by it. `form key show` shows its public half; `--force` replaces it for good"));
    }
    let key = SecretKey::random().map_err(|error| Failure::failed(format!("no randomness: {error}")))?;
    write(path, &key, passphrase)?;
    Ok(key.public())
}

/// Writes the key anew: under a new passphrase, or under none.
///
/// # Errors
/// When there is no passphrase to be had, or the file cannot be written; the old file is then still there.
pub fn rewrite(key: &SecretKey, passphrase: Option<&Source<'_>>) -> Result<(), Failure> {
    write(&path()?, key, passphrase)
}

fn write(path: &Path, key: &SecretKey, passphrase: Option<&Source<'_>>) -> Result<(), Failure> {
    let text = match passphrase {
        None => zeroize::Zeroizing::new(format!("{}\n", key.to_hex())),
        Some(source) => {
            let passphrase = source.get_new("New passphrase for your key")?;
            let sealed = SealedKey::seal(key, &passphrase).map_err(|error| Failure::failed(error.to_string()))?;
            let json = serde_json::to_string_pretty(&sealed).map_err(|error| Failure::failed(error.to_string()))?;
            zeroize::Zeroizing::new(json + "\n")
        }
    };
    write_private(path, &text)
}

/// The user's key, made at its first use, without a passphrase.
///
/// # Errors
/// As [`load`] and [`create`].
pub fn load_or_create() -> Result<Stored, Failure> {
    let path = path()?;
    if !path.exists() {
        create_at(&path, false, None)?;
    }
    load_from(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_private_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("form/identity");
        assert_eq!(load_from(&path).err().unwrap().exit_code(), 3);
        let key = create_at(&path, false, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(load_from(&path).unwrap().public(), key);
        assert_eq!(create_at(&path, false, None).unwrap_err().exit_code(), 5);
        assert_ne!(create_at(&path, true, None).unwrap(), key);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(load_from(&path).err().unwrap().exit_code(), 4);
    }
}
