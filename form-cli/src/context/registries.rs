//! How registries are reached: the `registries` of `config.yaml`, and Docker's logins.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    path::PathBuf,
};

use form_image::Registries;
use serde::{Deserialize, Serialize};

use super::{ConfigFile, directory};
use crate::failure::Failure;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistrySettings {
    /// `HOST[:PORT][/PATH]`, for names without a registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
    /// `HOST[:PORT]` without TLS.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub insecure: BTreeSet<String>,
    /// Registry, and the `HOST[:PORT]` that answers for it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hosts: BTreeMap<String, String>,
}

impl RegistrySettings {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What a build needs to know of registries.
///
/// # Errors
/// When `config.yaml` cannot be read or understood.
pub fn registries() -> Result<Registries, Failure> {
    // A build needs no settings, so it does without a place for them.
    let settings = if directory().is_ok() { ConfigFile::load()?.config.registries } else { RegistrySettings::default() };
    Ok(Registries { default: settings.default, insecure: settings.insecure, hosts: settings.hosts, credentials: credentials() })
}

/// `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
fn credentials() -> Option<PathBuf> {
    let directory = |variable| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    directory("DOCKER_CONFIG").or_else(|| directory("HOME").map(|home| home.join(".docker"))).map(|directory| directory.join("config.json"))
}
