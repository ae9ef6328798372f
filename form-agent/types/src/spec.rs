//! `Spec`: what a Formfile means. The parser lowers to it, the image builder reads its build part, the agent its run part.
//!
//! Every key is always present in the JSON, so that two files which mean the same are byte-identical and share a digest.

use std::{collections::BTreeMap, ops::RangeInclusive};

use serde::{Deserialize, Serialize};

use crate::{Digest, Name};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Spec {
    pub name: Name,
    pub description: Option<String>,
    /// As written: `debian:12`, `./dir`, `./rootfs.tar`, `scratch`, `image:NAME[:VERSION]`, an OCI reference.
    pub from: String,
    /// `ARG`s with the value they have for this build; `None` where neither a default nor `--build-arg` gave one.
    pub args: BTreeMap<String, Option<String>>,
    pub steps: Vec<Step>,
    pub resources: Resources,
    pub users: Vec<User>,
    /// Who runs the service (`USER NAME`); `None` is root.
    pub run_as: Option<String>,
    pub env: Vec<Env>,
    pub workdir: Option<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub ports: Vec<Port>,
    pub volumes: Vec<Volume>,
    pub networks: Vec<Name>,
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub replicas: u32,
    pub restart: Restart,
    pub healthcheck: Option<Healthcheck>,
    pub labels: BTreeMap<String, String>,
    pub model: Option<Model>,
}

/// One build step, with the line of the Formfile that asked for it. The line is for messages and is no part of the digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Step {
    #[serde(flatten)]
    pub action: StepAction,
    pub line: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "kind", content = "args", rename_all = "lowercase")]
pub enum StepAction {
    Install {
        /// `NAME[:ARCHITECTURE][=VERSION]`, never an option or a pattern.
        packages: Vec<String>,
    },
    Run {
        command: Command,
        /// `ARG`s that have a value and the `ENV` of the system so far, ordered by name.
        env: Vec<(String, String)>,
        /// Absolute; it is made when it is missing.
        workdir: Option<String>,
    },
    Copy(Copy),
}

/// A shell text, or the words of a JSON array.
///
/// A shell text may have several lines (a heredoc). One that begins with `#!` is a script for the interpreter named there, any
/// other is for `/bin/sh -c`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Command {
    Shell(String),
    Exec(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Copy {
    pub sources: Vec<CopySource>,
    /// Absolute. Ends in `/` when it is a directory to copy into.
    pub to: String,
    /// `USER[:GROUP]`, names or numbers.
    pub chown: Option<String>,
    /// Octal digits.
    pub chmod: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum CopySource {
    /// A path or glob below the build context, without `.` and `..`; `.` alone is the context itself. A glob that finds several
    /// files needs a target that ends in `/`.
    Path(String),
    /// A heredoc: the file's name (used when the target is a directory) and its text.
    Inline { name: String, text: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Resources {
    /// 1 to 128.
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 128))]
    pub vcpus: u32,
    /// 128 to 262144; from 16 on in a VM that runs a kernel of its own.
    #[cfg_attr(feature = "openapi", schema(minimum = 16, maximum = 262144))]
    pub memory_mib: u64,
    /// 5 to 65536; 0 in a VM that runs a kernel of its own, which has no root disk.
    #[cfg_attr(feature = "openapi", schema(minimum = 0, maximum = 65536))]
    pub disk_gib: u64,
    pub gpus: Vec<Gpu>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Gpu {
    /// A model, or a PCI address.
    pub model: String,
    pub count: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct User {
    pub name: String,
    pub sudo: bool,
    pub shell: String,
    pub groups: Vec<String>,
    pub ssh_authorized_keys: Vec<String>,
    pub lock_passwd: bool,
    pub ssh_pwauth: bool,
    pub disable_root: bool,
    pub chpasswd_expire: bool,
    pub has_passwd: bool,
    /// The password as written. Never serialised; it is part of the digest through [`Spec::digest`] and is hashed by the
    /// client at deploy.
    #[serde(skip)]
    pub passwd: Option<Secret>,
}

/// A text that must not be shown: it has no `Display`, and its debug form hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secret(…)")
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Env {
    pub scope: EnvScope,
    pub key: String,
    pub value: String,
}

/// Written `system`, `user:NAME` or `service:NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EnvScope {
    System,
    User(String),
    Service(String),
}

impl TryFrom<String> for EnvScope {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "system" => Ok(Self::System),
            Some(("user", name)) if !name.is_empty() => Ok(Self::User(name.to_owned())),
            Some(("service", name)) if !name.is_empty() => Ok(Self::Service(name.to_owned())),
            _ => Err("a scope is `system`, `user:NAME` or `service:NAME`".to_owned()),
        }
    }
}

impl From<EnvScope> for String {
    fn from(scope: EnvScope) -> Self {
        match scope {
            EnvScope::System => "system".to_owned(),
            EnvScope::User(name) => format!("user:{name}"),
            EnvScope::Service(name) => format!("service:{name}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Port {
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub port: u16,
    pub protocol: Protocol,
    /// The host's port, when it is published there.
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub host_port: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = SpecVolume))]
pub struct Volume {
    pub name: Name,
    pub path: String,
    pub size_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Restart {
    pub policy: RestartPolicy,
    /// For `on-failure` only; `None` is without end.
    pub max_retries: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Healthcheck {
    pub kind: HealthcheckKind,
    pub port: Option<u16>,
    pub path: Option<String>,
    pub command: Option<Command>,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    pub retries: u32,
    pub start_period_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum HealthcheckKind {
    Http,
    Tcp,
    Command,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Model {
    pub id: String,
    pub required: bool,
}

impl Resources {
    /// What a VM may have of each.
    pub const VCPUS: RangeInclusive<u32> = 1..=128;
    pub const MEMORY_MIB: RangeInclusive<u64> = 128..=262_144;
    /// Of a VM that runs a kernel of its own.
    pub const OWN_KERNEL_MEMORY_MIB: RangeInclusive<u64> = 16..=262_144;
    pub const DISK_GIB: RangeInclusive<u64> = 5..=65_536;
}

impl Spec {
    /// Of a VM that runs a kernel of its own. What a Formfile says beside this is for Formation's guest.
    pub fn of_own_kernel(name: Name, vcpus: u32, memory_mib: u64) -> Self {
        Self {
            name,
            description: None,
            from: "scratch".to_owned(),
            args: BTreeMap::new(),
            steps: Vec::new(),
            resources: Resources { vcpus, memory_mib, disk_gib: 0, gpus: Vec::new() },
            users: Vec::new(),
            run_as: None,
            env: Vec::new(),
            workdir: None,
            entrypoint: Vec::new(),
            cmd: Vec::new(),
            ports: Vec::new(),
            volumes: Vec::new(),
            networks: Vec::new(),
            replicas: 1,
            restart: Restart { policy: RestartPolicy::Always, max_retries: None },
            healthcheck: None,
            labels: BTreeMap::new(),
            model: None,
        }
    }

    /// The same under another name, with what refers to the old one.
    #[must_use]
    pub fn renamed(mut self, name: &Name) -> Self {
        let old = std::mem::replace(&mut self.name, name.clone());
        for env in &mut self.env {
            if matches!(&env.scope, EnvScope::Service(service) if service == old.as_str()) {
                env.scope = EnvScope::Service(name.as_str().to_owned());
            }
        }
        self
    }

    /// The canonical JSON: every key present, in the order of the fields, no white space.
    ///
    /// # Errors
    /// Never in practice: every field has a JSON form.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// What the file means, as one digest: the canonical JSON without the lines of the steps, and the passwords.
    ///
    /// # Errors
    /// As [`Spec::to_json`].
    pub fn digest(&self) -> Result<Digest, serde_json::Error> {
        let mut meaning = self.clone();
        for step in &mut meaning.steps {
            step.line = 0;
        }
        let mut text = meaning.to_json()?;
        for user in &self.users {
            let passwd = user.passwd.as_ref().map(Secret::expose);
            text.push('\0');
            text.push_str(&serde_json::to_string(&(&user.name, passwd))?);
        }
        Ok(Digest::of(text.as_bytes()))
    }
}
