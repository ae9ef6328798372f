//! A disk that is a copy of another machine's: what two machines must not share is forgotten, and made anew as at a first start.

use std::{fs, io, path::Path};

use crate::error::{Context, Error};

/// Files that only one machine may have: machine-id(5) and its older copy, the seed of systemd-random-seed(8).
const OWN: [&str; 3] = ["etc/machine-id", "var/lib/dbus/machine-id", "var/lib/systemd/random-seed"];

/// Removes what names the machine that the disk was copied from. It does no harm to do so twice.
///
/// # Errors
/// Those of the file system; what can be removed is removed all the same.
pub fn forget(root: &Path) -> Result<(), Error> {
    let mut result = Ok(());
    let mut remove = |path: &Path| match fs::remove_file(path) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            result = Err(error).at("remove", path);
        }
        _ => {}
    };
    OWN.iter().for_each(|path| remove(&root.join(path)));
    for entry in fs::read_dir(root.join("etc/ssh")).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            remove(&entry.path());
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_others_goes_and_everything_else_stays() {
        let root = std::env::temp_dir().join(format!("form-guest-identity-{}", std::process::id()));
        let path = |name: &str| root.join(name);
        for name in ["etc/machine-id", "etc/ssh/ssh_host_ed25519_key", "etc/ssh/ssh_host_ed25519_key.pub", "etc/ssh/sshd_config"] {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), name).unwrap();
        }
        forget(&root).unwrap();
        forget(&root).unwrap();
        let left: Vec<_> = fs::read_dir(path("etc/ssh")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["sshd_config"]);
        assert!(!path("etc/machine-id").exists());
        fs::remove_dir_all(&root).unwrap();
    }
}
