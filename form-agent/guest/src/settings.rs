//! Reading the settings, and keeping them for the agent that runs beside the image's own init.

use std::{fs, path::Path};

use form_types::settings::Settings;

use crate::error::{Context, Error};

/// In the initramfs.
pub const INITRAMFS_PATH: &str = "/form/settings.json";

/// # Errors
/// When the file is missing or says what this version does not understand.
pub fn load(path: &Path) -> Result<Settings, Error> {
    let bytes = fs::read(path).at("read", path)?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Settings { source })
}

#[cfg(test)]
pub mod tests {
    use std::collections::BTreeMap;

    use super::*;

    pub fn empty() -> Settings {
        Settings {
            hostname: "vm".to_owned(),
            root_serial: None,
            grow_root: false,
            interfaces: Vec::new(),
            nameservers: Vec::new(),
            search_domains: Vec::new(),
            hosts: Vec::new(),
            users: Vec::new(),
            root_login: true,
            files: Vec::new(),
            volumes: Vec::new(),
            service: None,
            env: BTreeMap::new(),
            new_identity: false,
            shutdown_timeout_ms: 10_000,
        }
    }

    #[test]
    fn settings_come_back_and_strangers_are_refused() {
        let text = serde_json::to_string(&empty()).expect("has a JSON form");
        let path = std::env::temp_dir().join(format!("form-guest-settings-{}", std::process::id()));
        fs::write(&path, &text).expect("temporary file");
        assert_eq!(load(&path).expect("valid"), empty());
        fs::write(&path, text.replacen('{', r#"{"colour":1,"#, 1)).expect("temporary file");
        assert!(load(&path).expect_err("unknown key").to_string().contains("colour"));
        fs::remove_file(&path).expect("temporary file");
        assert!(load(&path).is_err());
    }
}
