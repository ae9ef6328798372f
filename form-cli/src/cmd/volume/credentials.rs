//! The directory of an NBD client's certificate, as libnbd (`tls-certificates=`) and QEMU (`tls-creds-x509,dir=`) read it.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use form_api::ErrorCode;
use form_nbd::tls::{AUTHORITY_FILE, CERTIFICATE_FILE, Credentials, KEY_FILE};

use crate::failure::Failure;

/// A client's new key and certificate. Until [`NewCredentials::keep`] their directory is gone when this is.
pub struct NewCredentials {
    directory: PathBuf,
    own: Credentials,
    kept: bool,
}

impl NewCredentials {
    /// # Errors
    /// When something is there already, or cannot be made there.
    pub fn create(directory: &Path) -> Result<Self, Failure> {
        let own = Credentials::for_client().map_err(|error| Failure::failed(error.to_string()))?;
        let made = fs::DirBuilder::new().mode(0o700).create(directory);
        let full = || directory.read_dir().map_or(true, |mut entries| entries.next().is_some());
        match made {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !full() => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Failure::new(ErrorCode::Conflict, format!("{} is there already, and not empty", directory.display()))
                    .hint("name a new directory: its files will be of this export alone"));
            }
            Err(error) => return Err(Failure::io("create", directory, &error)),
        }
        let new = Self { directory: directory.to_owned(), own, kept: false };
        new.write(CERTIFICATE_FILE, &new.own.certificate)?;
        new.write(KEY_FILE, &new.own.key)?;
        Ok(new)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Failure> {
        let path = self.directory.join(name);
        let mut options = fs::OpenOptions::new();
        let written = options.write(true).create_new(true).mode(0o600).open(&path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(|error| Failure::io("write", &path, &error))
    }

    /// In PEM, for the server.
    pub fn certificate(&self) -> &str {
        &self.own.certificate
    }

    /// Keeps them, with the server's authority (in PEM). QEMU looks for its own authority there too, or it does not believe in its certificate.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(mut self, authority: &str) -> Result<(), Failure> {
        self.write(AUTHORITY_FILE, &format!("{authority}{}", self.own.authority))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for NewCredentials {
    fn drop(&mut self) {
        if !self.kept {
            // As far as they are there; what is not ours stays.
            for name in [CERTIFICATE_FILE, KEY_FILE, AUTHORITY_FILE] {
                let _ = fs::remove_file(self.directory.join(name));
            }
            let _ = fs::remove_dir(&self.directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn they_are_whole_and_secret_or_not_there() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("tls");
        drop(NewCredentials::create(&directory).unwrap());
        assert!(!directory.exists(), "an export that failed leaves nothing");
        let new = NewCredentials::create(&directory).unwrap();
        assert!(new.certificate().starts_with("-----BEGIN CERTIFICATE-----"));
        new.keep("the server's\n").unwrap();
        let mode = |name: &str| fs::metadata(directory.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(""), mode(KEY_FILE), mode(CERTIFICATE_FILE), mode(AUTHORITY_FILE)), (0o700, 0o600, 0o600, 0o600));
        assert!(fs::read_to_string(directory.join(AUTHORITY_FILE)).unwrap().starts_with("the server's\n-----BEGIN"));
        assert_eq!(NewCredentials::create(&directory).err().unwrap().exit_code(), 5, "nothing is overwritten");
        assert!(directory.join(KEY_FILE).exists());
        fs::create_dir(place.path().join("empty")).unwrap();
        NewCredentials::create(&place.path().join("empty")).unwrap().keep("").unwrap();
        assert!(NewCredentials::create(&place.path().join("no/where")).is_err());
    }
}
