//! `server:/export` and mount options, as they are written.

use std::{
    fmt::{self, Display, Formatter},
    net::Ipv6Addr,
};

use serde::{Deserialize, Serialize};

/// Kernels take no longer ones.
const MAX_SOURCE: usize = 1024;
/// Tenths of a second.
const TIMEO: u32 = 50;
const RETRANS: u32 = 1;

/// An export of an NFS server, and how it is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct NfsExport {
    /// A name or an address, without brackets.
    server: String,
    /// Absolute.
    path: String,
    /// None: the newest that the server speaks.
    version: Option<String>,
    /// After how many tenths of a second a request is repeated.
    timeo: u32,
    /// How often.
    retrans: u32,
    /// Others, as they are written.
    more: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    source: String,
    #[serde(default)]
    options: String,
}

/// Why a text is no export, or names no options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NfsError {
    #[error("`{0}` is no NFS export: write SERVER:/PATH, as in storage.example:/volumes or [fd00::1]:/volumes")]
    Source(String),
    #[error("`{0}` is no mount option that a pool can have: there are {OPTIONS}")]
    Option(String),
}

const OPTIONS: &str = "vers=4.0|4.1|4.2, timeo=TENTHS_OF_A_SECOND (10 to 600), retrans=COUNT (0 to 5), port=, rsize=, wsize= and nconnect=";

impl NfsExport {
    /// # Errors
    /// When the source names no server or no absolute path, or an option is not one of those that a pool can have.
    pub fn new(source: &str, options: &str) -> Result<Self, NfsError> {
        let (server, path) = parse_source(source).ok_or_else(|| NfsError::Source(source.chars().take(200).collect()))?;
        let mut export = Self { server, path, version: None, timeo: TIMEO, retrans: RETRANS, more: Vec::new() };
        for option in options.split(',').map(str::trim).filter(|option| !option.is_empty()) {
            export.set(option).ok_or_else(|| NfsError::Option(option.chars().take(80).collect()))?;
        }
        Ok(export)
    }

    fn set(&mut self, option: &str) -> Option<()> {
        let (key, value) = option.split_once('=')?;
        let number = |least: u32, most: u32| value.parse::<u32>().ok().filter(|number| (least..=most).contains(number));
        match key {
            "vers" | "nfsvers" => {
                let version = match value {
                    "4" => None,
                    "4.0" | "4.1" | "4.2" => Some(value.to_owned()),
                    _ => return None,
                };
                self.version = version;
            }
            "timeo" => self.timeo = number(10, 600)?,
            "retrans" => self.retrans = number(0, 5)?,
            "port" | "rsize" | "wsize" | "nconnect" => {
                let (least, most) = match key {
                    "port" => (1, u32::from(u16::MAX)),
                    "nconnect" => (1, 16),
                    _ => (1024, 1 << 20),
                };
                let number = number(least, most)?;
                self.more.retain(|other| !other.starts_with(&format!("{key}=")));
                self.more.push(format!("{key}={number}"));
            }
            _ => return None,
        }
        Some(())
    }

    pub fn server(&self) -> &str {
        &self.server
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// As mount(8) shows it.
    pub fn source(&self) -> String {
        if self.server.contains(':') { format!("[{}]:{}", self.server, self.path) } else { format!("{}:{}", self.server, self.path) }
    }

    /// Those that differ from what every pool has.
    pub fn options(&self) -> String {
        let version = self.version.as_ref().map(|version| format!("vers={version}"));
        let timeo = (self.timeo != TIMEO).then(|| format!("timeo={}", self.timeo));
        let retrans = (self.retrans != RETRANS).then(|| format!("retrans={}", self.retrans));
        let all: Vec<String> = [version, timeo, retrans].into_iter().flatten().chain(self.more.clone()).collect();
        all.join(",")
    }

    /// What the kernel is told, but for the version and what depends on addresses.
    pub(super) fn kernel_options(&self) -> String {
        let mut all = vec![format!("timeo={}", self.timeo), format!("retrans={}", self.retrans)];
        all.extend(self.more.iter().cloned());
        all.join(",")
    }

    /// Those to try, the best first.
    pub(super) fn versions(&self) -> Vec<&str> {
        self.version.as_ref().map_or_else(|| vec!["4.2", "4.1", "4.0"], |version| vec![version])
    }

    /// Whether both are the same directory of the same server, as far as their names say.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let parts = |export: &Self| export.path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect::<Vec<_>>();
        let (one, two) = (parts(self), parts(other));
        self.server == other.server && (one.starts_with(&two) || two.starts_with(&one))
    }
}

fn parse_source(source: &str) -> Option<(String, String)> {
    if source.len() > MAX_SOURCE || source.contains(|letter: char| letter.is_whitespace() || letter.is_control()) {
        return None;
    }
    let (server, path) = match source.strip_prefix('[') {
        Some(rest) => {
            let (server, path) = rest.split_once("]:")?;
            server.parse::<Ipv6Addr>().ok()?;
            (server, path)
        }
        None => source.split_once(':')?,
    };
    let is_name =
        |server: &str| !server.is_empty() && server.chars().all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter));
    let is_server = is_name(server) || source.starts_with('[');
    let is_path = path.starts_with('/') && path.split('/').all(|part| part != "." && part != "..");
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    (is_server && is_path).then(|| (server.to_owned(), format!("/{}", parts.join("/"))))
}

impl Display for NfsExport {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.source())
    }
}

impl TryFrom<Written> for NfsExport {
    type Error = NfsError;

    fn try_from(written: Written) -> Result<Self, NfsError> {
        Self::new(&written.source, &written.options)
    }
}

impl From<NfsExport> for Written {
    fn from(export: NfsExport) -> Self {
        Self { source: export.source(), options: export.options() }
    }
}
