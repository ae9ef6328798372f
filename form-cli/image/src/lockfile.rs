//! `Formfile.lock`: which base and packages a build got, so that `--locked` can refuse others.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

use crate::{BuildError, OciDigest, error::IoContext, layer::write_whole};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    pub version: u32,
    pub from: String,
    /// What the tag of a registry's image stood for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<OciDigest>,
    /// Name and version of every package in the image.
    pub packages: BTreeMap<String, String>,
}

/// More differences than this say no more.
const SHOWN: usize = 20;

impl Lock {
    pub fn new(from: &str, base: Option<OciDigest>, packages: BTreeMap<String, String>) -> Self {
        Self { version: 1, from: from.to_owned(), base, packages }
    }

    /// # Errors
    /// When it is there but unreadable, or no lock file.
    pub fn read(path: &Path) -> Result<Option<Self>, BuildError> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(BuildError::Io { action: "read", path: path.to_owned(), source }),
        };
        let lock = serde_json::from_slice(&text).map_err(std::io::Error::from).during("understand", path)?;
        Ok(Some(lock))
    }

    /// # Errors
    /// Those of the disk.
    pub fn write(&self, path: &Path) -> Result<(), BuildError> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        write_whole(path, &text)
    }

    /// The locked digest of a base from a registry.
    ///
    /// # Errors
    /// When another base is locked, or the lock was made before the base came from a registry.
    pub fn base_of(&self, from: &str) -> Result<OciDigest, BuildError> {
        let differences = match self.base {
            Some(base) if self.from == from => return Ok(base),
            Some(_) => vec![format!("`FROM {from}` was locked as `FROM {}`", self.from)],
            None => vec![format!("no digest is locked for `FROM {from}`")],
        };
        Err(BuildError::Locked { differences })
    }

    /// What is other than locked. Packages that the image does not have (yet) are no difference while it is being built.
    pub fn differences(&self, from: &str, packages: &BTreeMap<String, String>, complete: bool) -> Vec<String> {
        let mut found = Vec::new();
        if self.from != from {
            found.push(format!("`FROM {from}` was locked as `FROM {}`", self.from));
        }
        for (name, version) in packages {
            match self.packages.get(name) {
                None => found.push(format!("{name} {version} is not locked")),
                Some(locked) if locked != version => found.push(format!("{name} is {version} now but locked to {locked}")),
                Some(_) => {}
            }
        }
        if complete {
            found.extend(
                self.packages.keys().filter(|name| !packages.contains_key(*name)).map(|name| format!("{name} is locked but not installed")),
            );
        }
        if found.len() > SHOWN {
            let more = found.len() - SHOWN;
            found.truncate(SHOWN);
            found.push(format!("and {more} more; build without --locked to lock what there is now"));
        }
        found
    }
}

/// Name and version of the installed packages in the text of `/var/lib/dpkg/status`.
pub(crate) fn installed_packages(status: &str) -> BTreeMap<String, String> {
    let field = |stanza: &str, name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned));
    status
        .split("\n\n")
        .filter(|stanza| field(stanza, "Status").is_some_and(|status| status.ends_with(" installed")))
        .filter_map(|stanza| Some((field(stanza, "Package")?, field(stanza, "Version")?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named() {
        let status = "Package: curl\nStatus: install ok installed\nVersion: 7.88\n\nPackage: old\nStatus: deinstall ok config-files\nVersion: 1\n\nPackage: zip\nStatus: install ok installed\nVersion: 3\n";
        let packages = installed_packages(status);
        assert_eq!(packages, BTreeMap::from([("curl".to_owned(), "7.88".to_owned()), ("zip".to_owned(), "3".to_owned())]));
        let mut lock = Lock::new("debian:12", None, packages.clone());
        assert!(lock.differences("debian:12", &packages, true).is_empty());
        lock.packages.insert("curl".to_owned(), "7.87".to_owned());
        lock.packages.insert("jq".to_owned(), "1".to_owned());
        lock.packages.remove("zip");
        assert_eq!(lock.differences("debian:12", &packages, false).len(), 2);
        assert_eq!(lock.differences("debian:13", &packages, true).len(), 4);
    }
    #[test]
    fn a_base_is_locked_by_its_digest() {
        let digest = OciDigest::of(b"manifest");
        let lock = Lock::new("registry.example/a:1", Some(digest), BTreeMap::new());
        let text = serde_json::to_string(&lock).unwrap();
        assert!(text.contains(&format!("\"base\":\"{digest}\"")), "{text}");
        assert_eq!(serde_json::from_str::<Lock>(&text).unwrap(), lock);
        assert_eq!(lock.base_of("registry.example/a:1").unwrap(), digest);
        assert!(lock.base_of("registry.example/a:2").unwrap_err().to_string().contains("was locked as"));
        // Files that were written before have no such line.
        let old: Lock = serde_json::from_str(r#"{"version":1,"from":"debian:12","packages":{}}"#).unwrap();
        assert!(old.base_of("debian:12").unwrap_err().to_string().contains("no digest is locked"));
        assert!(!serde_json::to_string(&old).unwrap().contains("base"));
    }
}
