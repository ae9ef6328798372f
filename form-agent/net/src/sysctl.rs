//! Kernel switches below `/proc/sys/net`, and what they were before.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use crate::error::{NetError, Result};

const ROOT: &str = "/proc/sys/net";

/// Whether this kernel speaks IPv6.
pub fn has_ipv6() -> bool {
    Path::new(ROOT).join("ipv6/conf/all/forwarding").exists()
}

fn read(key: &str) -> Result<String> {
    let path = Path::new(ROOT).join(key);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(NetError::Read { path: path.display().to_string(), source }),
    }
}

/// Sets a switch, unless it has the value already (a read-only /proc/sys is fine then).
pub fn set(key: &str, value: &str) -> Result<()> {
    if read(key)? == value {
        return Ok(());
    }
    let path = Path::new(ROOT).join(key);
    fs::write(&path, value).map_err(|source| NetError::Sysctl { path: path.display().to_string(), value: value.to_owned(), source })
}

/// The switches of the whole host that VMs need, with a record of what they were, so that `teardown` can put them back.
pub struct HostSwitches {
    record: PathBuf,
}

impl HostSwitches {
    /// `directory` is where the record is kept.
    pub fn new(directory: &Path) -> Self {
        Self { record: directory.join("sysctl.json") }
    }

    /// Turns on forwarding. The record is written first, so that a crash in between loses nothing.
    pub fn enable(&self) -> Result<()> {
        let mut wanted = vec![("ipv4/ip_forward".to_owned(), "1".to_owned())];
        if has_ipv6() {
            // With forwarding on, an interface stops listening to router advertisements unless told otherwise: a host that got
            // its own address by one would lose it when that expires.
            for interface in ipv6_interfaces()? {
                let key = format!("ipv6/conf/{interface}/accept_ra");
                if read(&key).is_ok_and(|value| value == "1") {
                    wanted.push((key, "2".to_owned()));
                }
            }
            wanted.push(("ipv6/conf/all/forwarding".to_owned(), "1".to_owned()));
        }
        let mut before = self.recorded()?;
        let mut changed = false;
        for (key, value) in &wanted {
            let now = read(key)?;
            if now != *value && !before.contains_key(key) {
                before.insert(key.clone(), now);
                changed = true;
            }
        }
        if changed {
            self.write(&before)?;
        }
        wanted.iter().try_for_each(|(key, value)| set(key, value))
    }

    /// Puts back what [`HostSwitches::enable`] changed. A switch that is gone (its interface was removed) is passed over.
    pub fn restore(&self) -> Result<()> {
        // Back to front would undo forwarding first; the map's order (accept_ra before forwarding, by name) does not matter,
        // for each value is absolute.
        for (key, value) in self.recorded()? {
            match set(&key, &value) {
                Err(NetError::Read { .. }) => {}
                other => other?,
            }
        }
        self.forget()
    }

    /// Leaves the switches on and drops the record: another agent on this machine needs them.
    pub fn forget(&self) -> Result<()> {
        match fs::remove_file(&self.record) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(NetError::Write { path: self.record.display().to_string(), source })
            }
            _ => Ok(()),
        }
    }

    fn recorded(&self) -> Result<BTreeMap<String, String>> {
        match fs::read(&self.record) {
            // A torn record is as good as none: the switches keep their present values.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).unwrap_or_default()),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(source) => Err(NetError::Read { path: self.record.display().to_string(), source }),
        }
    }

    fn write(&self, before: &BTreeMap<String, String>) -> Result<()> {
        let fault = |source| NetError::Write { path: self.record.display().to_string(), source };
        let bytes = serde_json::to_vec_pretty(before).map_err(|error| fault(error.into()))?;
        if let Some(directory) = self.record.parent() {
            fs::create_dir_all(directory).map_err(fault)?;
        }
        let temporary = self.record.with_extension("tmp");
        fs::write(&temporary, bytes).map_err(fault)?;
        fs::rename(&temporary, &self.record).map_err(fault)
    }
}

fn ipv6_interfaces() -> Result<Vec<String>> {
    let path = Path::new(ROOT).join("ipv6/conf");
    let fault = |source| NetError::Read { path: path.display().to_string(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).map_err(fault)? {
        if let Ok(name) = entry.map_err(fault)?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}
