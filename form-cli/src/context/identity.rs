//! The user's key file.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use form_api::ErrorCode;
use form_types::SecretKey;

use super::{directory, write_private};
use crate::failure::Failure;

/// `~/.config/form/identity`
///
/// # Errors
/// When there is no home directory.
pub fn path() -> Result<PathBuf, Failure> {
    Ok(directory()?.join("identity"))
}

/// # Errors
/// When there is no key, others may read it, or it is damaged.
pub fn load() -> Result<SecretKey, Failure> {
    load_from(&path()?)
}

fn load_from(path: &Path) -> Result<SecretKey, Failure> {
    let text = fs::read_to_string(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure::not_found("you have no key yet").hint("make one with `form key new`"),
        _ => Failure::io("read", path, &error),
    })?;
    let mode = fs::metadata(path).map_err(|error| Failure::io("read", path, &error))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(Failure::new(ErrorCode::NotAllowed, format!("others may read your key {}", path.display()))
            .hint(format!("`chmod 600 {}`; if somebody may have read it, make another with `form key new --force`", path.display())));
    }
    SecretKey::from_hex(&text).map_err(|error| {
        Failure::failed(format!("{} holds no key: {error}", path.display()))
            .hint("restore it from a copy, or make another with `form key new --force`")
    })
}

/// Makes a key. An existing one is replaced only with `force`: hosts that know it would no longer know you.
///
/// # Errors
/// When there is one already, or it cannot be written.
pub fn create(force: bool) -> Result<SecretKey, Failure> {
    create_at(&path()?, force)
}

fn create_at(path: &Path, force: bool) -> Result<SecretKey, Failure> {
    if path.exists() && !force {
        return Err(Failure::new(ErrorCode::Conflict, format!("there is a key already: {}", path.display()))
            .hint("hosts know you by it. `form key show` shows its public half; `--force` replaces it for good"));
    }
    let key = SecretKey::random().map_err(|error| Failure::failed(format!("no randomness: {error}")))?;
    write_private(path, &format!("{}\n", key.to_hex()))?;
    Ok(key)
}

/// The user's key, made at its first use.
///
/// # Errors
/// As [`load`] and [`create`].
pub fn load_or_create() -> Result<SecretKey, Failure> {
    let path = path()?;
    if path.exists() { load_from(&path) } else { create_at(&path, false) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_private_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("form/identity");
        assert_eq!(load_from(&path).unwrap_err().exit_code(), 3);
        let key = create_at(&path, false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(load_from(&path).unwrap().public(), key.public());
        assert_eq!(create_at(&path, false).unwrap_err().exit_code(), 5);
        assert_ne!(create_at(&path, true).unwrap().public(), key.public());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(load_from(&path).unwrap_err().exit_code(), 4);
    }
}
