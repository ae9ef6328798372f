//! Where things are on a host, and what its owner has set in `agent.yaml`.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddr,
    num::NonZeroU64,
    path::{Path, PathBuf},
};

use form_types::{Name, PublicKey};
use serde::{Deserialize, Serialize};

/// Every directory and file of an agent (design, section 7). `--root DIR` moves all of them, so several agents share a machine.
#[derive(Clone, Debug)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn config(&self) -> PathBuf {
        self.root.join("etc/formation/agent.yaml")
    }

    pub fn host_key(&self) -> PathBuf {
        self.root.join("etc/formation/host.key")
    }

    /// Images, kernels, volumes and disks.
    pub fn data(&self) -> PathBuf {
        self.root.join("var/lib/formation")
    }

    /// One directory a VM, with its root disk.
    pub fn vms(&self) -> PathBuf {
        self.data().join("vms")
    }

    /// One directory a VM, with its snapshots.
    pub fn snapshots(&self) -> PathBuf {
        self.data().join("snapshots")
    }

    pub fn database(&self) -> PathBuf {
        self.data().join("db")
    }

    pub fn logs(&self) -> PathBuf {
        self.root.join("var/log/formation")
    }

    pub fn socket(&self) -> PathBuf {
        self.root.join("run/formation/agent.sock")
    }

    /// A socket each volume that is exported there.
    pub fn exports(&self) -> PathBuf {
        self.root.join("run/formation/nbd")
    }

    /// One directory a running VM.
    pub fn vm_runtime(&self) -> PathBuf {
        self.root.join("run/form-vm")
    }

    /// # Errors
    /// When a directory cannot be made.
    pub fn create_all(&self) -> io::Result<()> {
        let directories = [
            self.root.join("etc/formation"),
            self.data(),
            self.database(),
            self.logs(),
            self.root.join("run/formation"),
            self.vm_runtime(),
        ];
        directories.iter().try_for_each(std::fs::create_dir_all)
    }
}

/// `/etc/formation/agent.yaml`. Every key has a default; an unknown key is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// UDP address of the QUIC listener.
    pub listen: SocketAddr,
    /// The host's name; its machine's host name without one.
    pub name: Option<String>,
    /// The owner's key, when it is known before the first start.
    pub owner: Option<PublicKey>,
    /// Most VMs on this host.
    pub max_vms: u32,
    /// Memory that VMs may not take, in MiB.
    pub memory_reserve_mib: u64,
    /// Guests may together have so many vCPUs for each of the machine's.
    pub vcpu_overcommit: u32,
    /// VM processes run as uids from here on.
    pub vm_uid_base: u32,
    /// Without it: the resolvers of `/etc/resolv.conf`.
    pub dns_upstreams: Vec<SocketAddr>,
    /// Where `form-vmm` and `form-guest` are.
    pub library: Option<PathBuf>,
    /// Pools of volumes besides `local`: names and directories.
    pub pools: BTreeMap<Name, PathBuf>,
    /// Longest wait for a guest to report, in seconds. Generous: software emulation is slow.
    pub boot_timeout_seconds: u64,
    /// A guest that runs and has not answered for so long is unhealthy, in seconds.
    pub guest_timeout_seconds: NonZeroU64,
    /// A log file is rotated at this size, one old one is kept.
    pub log_file_bytes: u64,
    /// Where metrics and operations are sent.
    pub opentelemetry: Option<OpenTelemetry>,
}

/// A collector of OpenTelemetry's protocol over HTTP.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenTelemetry {
    pub endpoint: Endpoint,
    /// Sent with each request; they may be secret.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    #[serde(default = "a_minute")]
    pub interval_seconds: NonZeroU64,
}

const fn a_minute() -> NonZeroU64 {
    const SECONDS: NonZeroU64 = NonZeroU64::new(60).unwrap();
    SECONDS
}

impl fmt::Debug for OpenTelemetry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("OpenTelemetry").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// `http://HOST:PORT` or `https://…`, perhaps with a path that `/v1/metrics` is put behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoint(String);

impl Endpoint {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let refuse = |why: &str| Err(format!("the endpoint {text:?} {why}: write http://HOST:4318 or https://HOST"));
        match text.parse::<http::Uri>() {
            Ok(uri) if uri.query().is_some() => refuse("has a query"),
            Ok(uri) if matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty()) => {
                Ok(Self(text))
            }
            Ok(_) => refuse("is not one of HTTP"),
            Err(error) => refuse(&format!("cannot be read ({error})")),
        }
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.0
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, form_api::DEFAULT_PORT)),
            name: None,
            owner: None,
            max_vms: 250,
            memory_reserve_mib: 256,
            vcpu_overcommit: 16,
            // Behind the ids of the build sandbox (1879048192 to 1879113727), so that a build never has a VM's uid.
            vm_uid_base: 1_879_113_728,
            dns_upstreams: Vec::new(),
            library: None,
            pools: BTreeMap::new(),
            boot_timeout_seconds: 180,
            guest_timeout_seconds: NonZeroU64::new(60).unwrap_or(NonZeroU64::MIN),
            log_file_bytes: 16 * 1024 * 1024,
            opentelemetry: None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not a valid configuration: {source}")]
    Parse { path: PathBuf, source: serde_yaml::Error },
    #[error("{program} is not in {searched}: install Formation whole, or name its directory with `library:` in agent.yaml or FORM_LIBRARY")]
    Library { program: &'static str, searched: String },
}

impl Config {
    /// The configuration at `path`, or the defaults where there is none.
    ///
    /// # Errors
    /// When the file cannot be read or does not fit.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) if text.trim().is_empty() => Ok(Self::default()),
            Ok(text) => serde_yaml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    /// The path of `form-vmm` or `form-guest`: configured, by environment, beside the agent as installed (`../lib/formation`), or the system's.
    ///
    /// # Errors
    /// When it is in none of them.
    pub fn program(&self, program: &'static str) -> Result<PathBuf, ConfigError> {
        let mut directories: Vec<PathBuf> = Vec::new();
        match (&self.library, std::env::var_os("FORM_LIBRARY")) {
            (Some(library), _) => directories.push(library.clone()),
            (None, Some(library)) => directories.push(library.into()),
            (None, None) => {
                let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("lib/formation")));
                directories.extend(beside);
                directories.push("/usr/lib/formation".into());
            }
        }
        directories.iter().map(|directory| directory.join(program)).find(|path| path.is_file()).ok_or_else(|| {
            let searched = directories.iter().map(|directory| directory.display().to_string()).collect::<Vec<_>>().join(", ");
            ConfigError::Library { program, searched }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_unknown_keys() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.yaml");
        assert_eq!(Config::load(&path).unwrap(), Config::default());
        std::fs::write(&path, "max_vms: 3\nlisten: 127.0.0.1:9000\n").unwrap();
        assert_eq!(Config::load(&path).unwrap().max_vms, 3);
        std::fs::write(&path, "max_vm: 3\n").unwrap();
        let error = Config::load(&path).unwrap_err().to_string();
        assert!(error.contains("max_vm"), "{error}");
    }

    #[test]
    fn a_collector_has_an_address_of_http() {
        let read = |text: &str| serde_yaml::from_str::<Config>(text).map(|config| config.opentelemetry.unwrap());
        let settings = read("opentelemetry: { endpoint: 'http://collector:4318', headers: { authorization: hunter2 } }").unwrap();
        assert_eq!((settings.endpoint.as_str(), settings.interval_seconds.get()), ("http://collector:4318", 60));
        assert!(!format!("{settings:?}").contains("hunter2"), "what is logged of it tells no secrets");
        for wrong in ["collector:4318", "grpc://collector:4317", "http://", "http://collector/?a=b", ""] {
            let error = read(&format!("opentelemetry: {{ endpoint: '{wrong}' }}")).unwrap_err().to_string();
            assert!(error.contains("write http://HOST:4318"), "{wrong}: {error}");
        }
        assert!(read("opentelemetry: { endpoint: 'http://collector', interval_seconds: 0 }").is_err());
    }
}
