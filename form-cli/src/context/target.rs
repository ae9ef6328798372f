//! From `--context` and `--host` to an agent.

use std::path::{Path, PathBuf};

use form_api::{
    ErrorCode,
    client::{Client, Timeouts},
};
use form_types::{Name, SecretKey};

use super::{Config, KnownHost};
use crate::failure::Failure;

/// Where the agent of this machine listens.
pub const LOCAL_SOCKET: &str = "/run/formation/agent.sock";

/// Whom a command talks to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Local(PathBuf),
    Remote(KnownHost),
}

/// Finds the host that is meant.
///
/// `host` (`--host`, `FORM_HOST`) is `unix:/path`, or the name or address of a host that was added. Without it the first host of the
/// chosen context is meant, and without any context the agent of this machine.
///
/// # Errors
/// When a context or host does not exist, or there is nothing to choose from.
pub fn resolve(config: &Config, context: Option<&Name>, host: Option<&str>, local: &Path) -> Result<Target, Failure> {
    if let Some(host) = host {
        return match host.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Target::Local(path.into())),
            Some(_) => Err(Failure::usage("a socket is named by its absolute path").hint("write `unix:/run/formation/agent.sock`")),
            None => known(config, context, host),
        };
    }
    match config.chosen(context)? {
        Some(context) => match context.hosts.first() {
            Some(host) => Ok(Target::Remote(host.clone())),
            None => Err(Failure::new(ErrorCode::Unavailable, format!("the context `{}` has no host", context.name))
                .hint("add one with `form host add ADDRESS --token TOKEN`; `form-agent init` on the host prints the token")),
        },
        None if local.exists() => Ok(Target::Local(local.to_owned())),
        None => Err(Failure::new(ErrorCode::Unavailable, "there is no host to talk to")
            .hint("`form sandbox up` makes a throw-away one here; `form host add ADDRESS --token TOKEN` adds one that runs `form-agent`, whose `form-agent init` prints the token")),
    }
}

fn known(config: &Config, context: Option<&Name>, host: &str) -> Result<Target, Failure> {
    // The chosen context comes first: two contexts may know hosts of one name.
    let chosen = config.chosen(context)?;
    let others = config.contexts.iter().filter(|_| context.is_none());
    let found = chosen.into_iter().chain(others).flat_map(|context| &context.hosts).find(|known| known.is_called(host));
    found.cloned().map(Target::Remote).ok_or_else(|| {
        Failure::not_found(format!("no host `{host}` has been added"))
            .hint(format!("`form host ls` lists them; `form host add {host} --token TOKEN` adds it; `unix:/path` names a socket"))
    })
}

impl Target {
    /// `identity` gives the user's key; a socket needs none.
    ///
    /// # Errors
    /// When the user's key cannot be had.
    pub fn client(&self, timeouts: Timeouts, identity: impl FnOnce() -> Result<SecretKey, Failure>) -> Result<Client, Failure> {
        match self {
            Self::Local(path) => Ok(Client::unix(path, timeouts)),
            Self::Remote(host) => Ok(Client::quic(&host.address, host.public_key, &identity()?, timeouts)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::{Context, ContextKind};

    fn host(name: &str, address: &str) -> KnownHost {
        KnownHost { name: name.to_owned(), address: address.to_owned(), public_key: SecretKey::from_bytes([1; 32]).public() }
    }

    fn config() -> Config {
        let context = |name: &str, hosts| Context { name: name.parse().unwrap(), kind: ContextKind::Cluster, hosts, sandbox: None };
        let contexts =
            vec![context("a", vec![host("one", "10.0.0.1"), host("two", "10.0.0.2")]), context("b", vec![host("one", "10.1.0.1")])];
        Config { current: Some("a".parse().unwrap()), contexts, ..Config::default() }
    }

    fn address(target: Target) -> String {
        match target {
            Target::Local(path) => path.display().to_string(),
            Target::Remote(host) => host.address,
        }
    }

    #[test]
    fn who_is_meant() {
        let (config, none) = (config(), Path::new("/nowhere/at/all"));
        let b: Name = "b".parse().unwrap();
        let find = |context: Option<&Name>, host: Option<&str>| resolve(&config, context, host, none).map(address);
        assert_eq!(find(None, None).unwrap(), "10.0.0.1");
        assert_eq!(find(Some(&b), None).unwrap(), "10.1.0.1");
        assert_eq!(find(None, Some("one")).unwrap(), "10.0.0.1");
        assert_eq!(find(None, Some("10.1.0.1")).unwrap(), "10.1.0.1");
        assert_eq!(find(Some(&b), Some("one")).unwrap(), "10.1.0.1");
        assert_eq!(find(None, Some("unix:/x/y.sock")).unwrap(), "/x/y.sock");
        assert_eq!(find(Some(&b), Some("two")).unwrap_err().exit_code(), 3);
        assert_eq!(find(Some(&"c".parse().unwrap()), None).unwrap_err().exit_code(), 3);
        assert_eq!(find(None, Some("unix:relative")).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn without_a_context_the_machine_itself_is_meant() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config::default();
        assert_eq!(address(resolve(&config, None, None, directory.path()).unwrap()), directory.path().display().to_string());
        assert_eq!(resolve(&config, None, None, Path::new("/nowhere/at/all")).unwrap_err().exit_code(), 7);
    }
}
