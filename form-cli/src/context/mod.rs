//! Which hosts a command talks to, and as whom.
//!
//! `~/.config/form/config.yaml` names contexts: a cluster or a sandbox, with its hosts and their keys. `~/.config/form/identity` is the
//! user's secret key. Without any context the agent of this machine is meant.

mod file;
mod identity;
mod passphrase;
mod registries;
mod sealed;
mod target;

use std::path::{Path, PathBuf};

use form_types::{Name, PublicKey};
use serde::{Deserialize, Serialize};

pub use self::{
    file::ConfigFile,
    identity::{
        create as create_identity, load as load_identity, load_or_create as load_or_create_identity, path as identity_path,
        rewrite as rewrite_identity,
    },
    passphrase::Source as PassphraseSource,
    registries::{RegistrySettings, registries},
    target::{LOCAL_SOCKET, Target, resolve},
};
use crate::failure::Failure;

/// Everything in `config.yaml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The context that is used when none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<Name>,
    #[serde(default)]
    pub contexts: Vec<Context>,
    #[serde(default, skip_serializing_if = "RegistrySettings::is_empty")]
    pub registries: RegistrySettings,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    pub name: Name,
    #[serde(default)]
    pub kind: ContextKind,
    #[serde(default)]
    pub hosts: Vec<KnownHost>,
    /// The directory of the throw-away hosts, for a sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContextKind {
    #[default]
    Cluster,
    /// Made by `form sandbox up`, removed by `form sandbox down`.
    Sandbox,
}

impl ContextKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Sandbox => "sandbox",
        }
    }
}

/// A host whose key was pinned when it was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownHost {
    /// What the host calls itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// `HOST` or `HOST:PORT`.
    pub address: String,
    pub public_key: PublicKey,
}

impl KnownHost {
    pub fn is_called(&self, text: &str) -> bool {
        self.address == text || self.name == text
    }

    pub fn label(&self) -> &str {
        if self.name.is_empty() { &self.address } else { &self.name }
    }
}

impl Config {
    pub fn context(&self, name: &Name) -> Option<&Context> {
        self.contexts.iter().find(|context| context.name == *name)
    }

    /// The context called `name`, made when there is none; it becomes the current one when there is no current one.
    pub fn context_or_new(&mut self, name: &Name) -> &mut Context {
        self.current.get_or_insert_with(|| name.clone());
        let index = self.contexts.iter().position(|context| context.name == *name).unwrap_or_else(|| {
            self.contexts.push(Context { name: name.clone(), kind: ContextKind::Cluster, hosts: Vec::new(), sandbox: None });
            self.contexts.len() - 1
        });
        &mut self.contexts[index]
    }

    /// The context that the user means: the named one, else the current one. `None` when there is none at all.
    ///
    /// # Errors
    /// When the meant one does not exist.
    pub fn chosen(&self, named: Option<&Name>) -> Result<Option<&Context>, Failure> {
        let Some(name) = named.or(self.current.as_ref()) else { return Ok(None) };
        match self.context(name) {
            Some(context) => Ok(Some(context)),
            None => {
                let known: Vec<&str> = self.contexts.iter().map(|context| context.name.as_str()).collect();
                let hint = if known.is_empty() {
                    "there is none yet: `form host add ADDRESS --token TOKEN` makes one".to_owned()
                } else {
                    format!("there are: {}", known.join(", "))
                };
                Err(Failure::not_found(format!("there is no context `{name}`")).hint(hint))
            }
        }
    }
}

/// `$XDG_CONFIG_HOME/form`, else `~/.config/form`.
///
/// # Errors
/// When neither variable names a directory.
pub fn directory() -> Result<PathBuf, Failure> {
    let absolute = |variable| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CONFIG_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".config")))
        .map(|config| config.join("form"))
        .ok_or_else(|| Failure::failed("there is no place for settings").hint("set HOME or XDG_CONFIG_HOME in the environment"))
}

/// Writes a file so that a crash leaves the old one or the new one, never half; for this user's eyes.
fn write_private(path: &Path, content: &str) -> Result<(), Failure> {
    use std::{
        fs,
        io::Write,
        os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    };
    let failed = |error: std::io::Error| Failure::io("write", path, &error);
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}.new", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let written = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh).and_then(|mut file| {
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written.map_err(failed)
}
