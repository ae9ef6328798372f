//! Names of images in registries: `HOST[:PORT]/PATH[:TAG][@sha256:DIGEST]` (OCI distribution specification, "Pulling manifests").

use std::fmt;

use super::{OciDigest, OciError};

/// Which image is asked for, and of which registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OciReference {
    /// `HOST` or `HOST:PORT`, as written.
    pub registry: String,
    /// The path in the registry: `library/alpine`.
    pub repository: String,
    /// `latest` where neither a tag nor a digest is written.
    pub tag: Option<String>,
    /// Counts more than the tag when both are there.
    pub digest: Option<OciDigest>,
}

impl OciReference {
    /// Understands a reference. `default` (`HOST[:PORT][/PATH]`) is put before a name that has no registry of its own.
    ///
    /// # Errors
    /// When it is malformed, or names no registry and there is no default.
    pub fn parse(text: &str, default: Option<&str>) -> Result<Self, OciError> {
        let wrong = |reason: &str| OciError::Reference { text: text.chars().take(300).collect(), reason: reason.to_owned() };
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => (rest, Some(digest.parse::<OciDigest>().map_err(|error| wrong(&error.to_string()))?)),
        };
        let qualified = match (has_registry(rest), default) {
            (true, _) => rest.to_owned(),
            (false, Some(default)) if has_registry(&format!("{default}/x")) => format!("{}/{rest}", default.trim_end_matches('/')),
            (false, Some(default)) => {
                return Err(wrong(&format!("the default registry `{default}` is no host: write HOST, HOST:PORT or HOST/PATH")));
            }
            (false, None) => return Err(OciError::NoRegistry { text: text.chars().take(300).collect() }),
        };
        let (registry, path) = qualified.split_once('/').ok_or_else(|| wrong("it has no path"))?;
        let last = path.rfind('/').map_or(0, |at| at + 1);
        let (repository, tag) = match path[last..].split_once(':') {
            None => (path, None),
            Some((name, tag)) => (&path[..last + name.len()], Some(tag)),
        };
        if !is_host(registry) {
            return Err(wrong(&format!("`{registry}` is no host")));
        }
        if repository.len() > 255 || !repository.split('/').all(is_path_part) {
            return Err(wrong("a path has lower-case letters, digits, `.`, `_` and `-`, in parts between slashes"));
        }
        if !tag.is_none_or(is_tag) {
            return Err(wrong("a tag has at most 128 letters, digits, `_`, `.` and `-`, and begins with none of the last two"));
        }
        let tag = tag.map(str::to_owned).or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Ok(Self { registry: registry.to_owned(), repository: repository.to_owned(), tag, digest })
    }

    /// What a registry is asked for: a digest, else the tag.
    pub(crate) fn target(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl fmt::Display for OciReference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(formatter, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(formatter, "@{digest}")?;
        }
        Ok(())
    }
}

/// A first part with a dot or a colon is a host, and so is `localhost`: `team/app` is a path, `registry.example/app` is not.
fn has_registry(text: &str) -> bool {
    text.split_once('/').is_some_and(|(first, _)| first == "localhost" || first.contains(['.', ':']))
}

/// Whether `HOST[:PORT]` is this machine.
pub(crate) fn is_loopback(registry: &str) -> bool {
    let (host, _) = split_port(registry);
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn split_port(registry: &str) -> (&str, Option<&str>) {
    match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (registry, None),
    }
}

/// A name, an IPv4 address or an IPv6 address in brackets, with an optional port.
pub(crate) fn is_host(registry: &str) -> bool {
    let (host, port) = split_port(registry);
    let port_fits =
        port.is_none_or(|port| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0));
    let label_fits = |label: &str| {
        let letters = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        !label.is_empty() && label.len() <= 63 && letters && !label.starts_with('-') && !label.ends_with('-')
    };
    let host_fits = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.len() <= 253 && host.split('.').all(label_fits),
    };
    port_fits && host_fits
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` of the specification.
fn is_path_part(part: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = part.as_bytes();
    if !bytes.first().is_some_and(|byte| is_word(*byte)) || !bytes.last().is_some_and(|byte| is_word(*byte)) {
        return false;
    }
    part.split(|char: char| char.is_ascii_lowercase() || char.is_ascii_digit())
        .all(|between| matches!(between, "" | "." | "_" | "__") || between.bytes().all(|byte| byte == b'-'))
}

fn is_tag(tag: &str) -> bool {
    let first = tag.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '_');
    first && tag.len() <= 128 && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_are_understood() {
        for (text, registry, repository, target) in [
            ("registry.example/a", "registry.example", "a", "latest"),
            ("registry.example:5000/team/app:1.2", "registry.example:5000", "team/app", "1.2"),
            ("localhost/a_b/c__d/e---f", "localhost", "a_b/c__d/e---f", "latest"),
            ("127.0.0.1:5000/a:V-1", "127.0.0.1:5000", "a", "V-1"),
            ("[::1]:5000/a", "[::1]:5000", "a", "latest"),
        ] {
            let reference = OciReference::parse(text, None).unwrap();
            assert_eq!((reference.registry.as_str(), reference.repository.as_str()), (registry, repository));
            assert_eq!(reference.target(), target);
        }
        let both = format!("registry.example/a:1@{DIGEST}");
        let reference = OciReference::parse(&both, None).unwrap();
        assert_eq!((reference.target().as_str(), reference.tag.as_deref()), (DIGEST, Some("1")));
        assert_eq!(reference.to_string(), both);
        assert_eq!(OciReference::parse(&format!("registry.example/a@{DIGEST}"), None).unwrap().tag, None);
    }

    #[test]
    fn a_name_without_a_registry_needs_a_configured_one() {
        for name in ["nginx:1.25", "team/app", "nginx"] {
            assert!(matches!(OciReference::parse(name, None), Err(OciError::NoRegistry { .. })), "{name}");
        }
        let with = |default| OciReference::parse("nginx:1.25", Some(default)).map(|reference| reference.to_string());
        assert_eq!(with("registry.example").unwrap(), "registry.example/nginx:1.25");
        assert_eq!(with("localhost:5000/team/").unwrap(), "localhost:5000/team/nginx:1.25");
        assert!(with("registry").unwrap_err().to_string().contains("default registry"));
        let own = OciReference::parse("other.example/a", Some("registry.example")).unwrap();
        assert_eq!(own.registry, "other.example");
    }

    #[test]
    fn malformed_references_are_refused() {
        for bad in [
            "registry.example/",
            "registry.example/A",
            "registry.example/a//b",
            "registry.example/a:",
            "registry.example/a:-x",
            "registry.example/a..b",
            "registry.example/../a",
            "registry.example/a-",
            "registry.example/a___b",
            "registry.example:0/a",
            "registry.example:99999/a",
            "registry.example:5x/a",
            "-x.example/a",
            "a..b/c",
            "user@registry.example/a",
            "registry.example/a@sha256:00",
            "[::zz]:1/a",
            "registry.example/a b",
        ] {
            assert!(matches!(OciReference::parse(bad, None), Err(OciError::Reference { .. })), "{bad}");
        }
    }

    #[test]
    fn this_machine_is_known() {
        for local in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.8.0.1", "[::1]:80"] {
            assert!(is_loopback(local), "{local}");
        }
        for other in ["registry.example", "localhost.example:5000", "10.0.0.1:5000", "[fe80::1]"] {
            assert!(!is_loopback(other), "{other}");
        }
    }
}
