//! Bases from OCI registries.
//!
//! `reference` what is asked for · `client` asks · `document` what comes back · `blobs` keeps it · `merge` makes one tree of its layers ·
//! `defaults` what its configuration means for a Formfile · `artifact` images of ours, both ways. Which registry is asked, and how, says [`Registries`]: none is written here.

pub(crate) mod artifact;
mod blobs;
mod challenge;
mod client;
mod credentials;
mod defaults;
mod digest;
mod document;
mod error;
mod merge;
mod pull;
mod reference;
mod unpack;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

pub use self::{
    artifact::Pushed,
    digest::{OciDigest, OciDigestError},
    error::OciError,
    reference::OciReference,
};
pub(crate) use self::{
    blobs::BlobStore,
    defaults::Defaults,
    digest::HashingReader,
    document::{MAX_DOCUMENT, OCI_INDEX, OCI_MANIFEST},
    pull::{Fetched, fetch, resolve},
    unpack::{UnpackError, unpack},
};

/// How this machine's user reaches registries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registries {
    /// `HOST[:PORT][/PATH]`, put before names without a registry. `None` refuses them.
    pub default: Option<String>,
    /// `HOST[:PORT]` that are spoken to without TLS. Those of this machine always are.
    pub insecure: BTreeSet<String>,
    /// Under which `HOST[:PORT]` a registry answers, when that is not its name.
    pub hosts: BTreeMap<String, String>,
    /// Docker's configuration file, for its logins.
    pub credentials: Option<PathBuf>,
}

impl Registries {
    /// Where a registry answers.
    fn host_of<'a>(&'a self, registry: &'a str) -> Result<&'a str, OciError> {
        let host = self.hosts.get(registry).map_or(registry, String::as_str);
        if reference::is_host(host) {
            return Ok(host);
        }
        Err(OciError::Settings { reason: format!("`{host}`, the host of the registry {registry}, is no HOST or HOST:PORT") })
    }

    /// Whether a host is spoken to without TLS.
    fn is_plain(&self, host: &str) -> bool {
        reference::is_loopback(host) || self.insecure.contains(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_and_what_is_listed_goes_without_tls() {
        let registries = Registries {
            insecure: BTreeSet::from(["plain.example:5000".to_owned()]),
            hosts: BTreeMap::from([
                ("hub.example".to_owned(), "api.hub.example:443".to_owned()),
                ("bad.example".to_owned(), "a/b".to_owned()),
            ]),
            ..Registries::default()
        };
        assert!(registries.is_plain("plain.example:5000") && registries.is_plain("localhost:1") && !registries.is_plain("plain.example"));
        assert_eq!(registries.host_of("hub.example").unwrap(), "api.hub.example:443");
        assert_eq!(registries.host_of("other.example").unwrap(), "other.example");
        assert!(registries.host_of("bad.example").is_err());
    }
}
