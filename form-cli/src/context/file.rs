//! `config.yaml`, read and changed.

use std::{fs, io, path::PathBuf};

use super::{Config, directory, write_private};
use crate::failure::Failure;

#[derive(Debug)]
pub struct ConfigFile {
    path: PathBuf,
    pub config: Config,
}

impl ConfigFile {
    /// The user's file; an empty configuration where there is none.
    ///
    /// # Errors
    /// When it cannot be read, or is not what this version understands.
    pub fn load() -> Result<Self, Failure> {
        Self::load_from(directory()?.join("config.yaml"))
    }

    fn load_from(path: PathBuf) -> Result<Self, Failure> {
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self { path, config: Config::default() }),
            Err(error) => return Err(Failure::io("read", &path, &error)),
        };
        if text.trim().is_empty() {
            return Ok(Self { path, config: Config::default() });
        }
        let config = serde_yaml::from_str(&text).map_err(|error| {
            Failure::usage(format!("{} cannot be understood: {error}", path.display()))
                .hint("mend it, or move it away and add your hosts again")
        })?;
        Ok(Self { path, config })
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self) -> Result<(), Failure> {
        let yaml =
            serde_yaml::to_string(&self.config).map_err(|error| Failure::failed(format!("the settings cannot be written: {error}")))?;
        write_private(&self.path, &yaml)
    }
}

#[cfg(test)]
mod tests {
    use form_types::SecretKey;

    use super::*;
    use crate::context::{ContextKind, KnownHost};

    #[test]
    fn what_is_saved_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("form/config.yaml");
        let mut file = ConfigFile::load_from(path.clone()).unwrap();
        assert_eq!(file.config, Config::default());
        let name = "home".parse().unwrap();
        let context = file.config.context_or_new(&name);
        let public_key = SecretKey::from_bytes([1; 32]).public();
        context.hosts.push(KnownHost { name: "den".to_owned(), address: "10.0.0.1".to_owned(), public_key });
        file.save().unwrap();
        let again = ConfigFile::load_from(path.clone()).unwrap();
        assert_eq!(again.config, file.config);
        assert_eq!(again.config.current, Some(name));

        fs::write(&path, "contexts: [{name: box, kind: sandbox, sandbox: /tmp/x}]").unwrap();
        let config = ConfigFile::load_from(path.clone()).unwrap().config;
        assert_eq!(config.contexts[0].kind, ContextKind::Sandbox);
        fs::write(&path, "registries: {default: r.example/team, insecure: ['10.0.0.1:5000'], hosts: {r.example: api.r.example}}").unwrap();
        let mut file = ConfigFile::load_from(path.clone()).unwrap();
        assert_eq!(file.config.registries.default.as_deref(), Some("r.example/team"));
        // Adding a host leaves them.
        file.config.context_or_new(&"home".parse().unwrap());
        file.save().unwrap();
        assert_eq!(ConfigFile::load_from(path.clone()).unwrap().config.registries, file.config.registries);
        fs::write(&path, "contexts: 5").unwrap();
        assert!(ConfigFile::load_from(path).unwrap_err().error.message.contains("config.yaml"));
    }
}
