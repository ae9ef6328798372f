//! Why an image of a registry cannot be had.

use std::io;

use super::OciDigest;

#[derive(Debug, thiserror::Error)]
pub enum OciError {
    #[error("`{text}` is no reference to an image: {reason}")]
    Reference { text: String, reason: String },
    #[error("`{text}` names no registry")]
    NoRegistry { text: String },
    #[error("the settings cannot be used: {reason}")]
    Settings { reason: String },
    #[error("{registry} does not answer")]
    Unreachable {
        registry: String,
        #[source]
        source: Box<ureq::Error>,
    },
    #[error("{registry} answers with status {status} to {request}")]
    Status { registry: String, request: String, status: u16 },
    #[error("{registry} has no {what}")]
    NotFound { registry: String, what: String },
    /// `known`: a user name and password were sent.
    #[error("{registry} refuses {}", if *known { "the user name and password that are configured for it" } else { "what is asked for without a login" })]
    Denied { registry: String, known: bool },
    #[error("{registry} asks for a login that cannot be given: {reason}")]
    Login { registry: String, reason: String },
    #[error("{what} should have digest {expected} but has {found}")]
    Digest { what: String, expected: OciDigest, found: OciDigest },
    #[error("{what} has {size} bytes: the limit is {limit}")]
    TooLarge { what: String, size: u64, limit: u64 },
    #[error("{what} should have {expected} bytes but has {found}")]
    Size { what: String, expected: u64, found: u64 },
    #[error("there is no image for linux/amd64{}", if .others.is_empty() { String::new() } else { format!(", only for {}", .others.join(", ")) })]
    Platform { others: Vec<String> },
    #[error("this is {what}")]
    Unsupported { what: String },
    #[error("the {what} cannot be understood")]
    Json {
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("the layers unpack to more than the {limit_gib} GiB of the disk")]
    DiskBudget { limit_gib: u64 },
    #[error("the layers hold more than {limit} files")]
    TooManyFiles { limit: usize },
    /// `number` counts from 1.
    #[error("layer {number} cannot be used: {reason}")]
    Layer { number: usize, reason: String },
    #[error("cannot {action}")]
    Io {
        action: String,
        #[source]
        source: io::Error,
    },
    #[error("cancelled")]
    Cancelled,
}

impl OciError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NoRegistry { .. } => {
                "write `HOST/PATH:TAG`, or name a `default` below `registries` in ~/.config/form/config.yaml; \
                 other bases are `debian:12`, `scratch`, `image:NAME`, `./directory` and `./rootfs.tar`"
            }
            Self::Unreachable { source, .. } if is_certificate(source) => {
                "have the authority of its certificate among those of this machine (`update-ca-certificates`), or in a file that SSL_CERT_FILE names"
            }
            Self::Unreachable { .. } => {
                "a registry without TLS must be listed below `registries: insecure` in ~/.config/form/config.yaml; \
                 `form build --locked` needs no registry when the locked base is in the cache"
            }
            Self::Status { .. } => {
                "when the registry answers under another host, name it below `registries: hosts` in ~/.config/form/config.yaml"
            }
            Self::NotFound { .. } => "look for the tag in the registry: a tag or digest may have been removed",
            Self::Denied { known: false, .. } => {
                "the image does not exist, or needs a login: put one into ~/.docker/config.json (`auths`), as `docker login` does"
            }
            Self::Denied { known: true, .. } => "log in anew, with a user who may do that: the login is in ~/.docker/config.json",
            Self::Digest { .. } | Self::Size { .. } => {
                "the registry, or something on the way to it, damages images: try again, then push the image anew"
            }
            Self::DiskBudget { .. } => "ask for more with `DISK 20G` in the Formfile (`--disk 20G` of `form image pull`)",
            Self::Platform { .. } => "push an image for linux/amd64, or choose another one",
            _ => return None,
        };
        Some(text.to_owned())
    }
}

/// Whether a registry was found and its certificate refused.
pub(super) fn is_certificate(error: &ureq::Error) -> bool {
    let found = match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()),
        _ => None,
    };
    matches!(found, Some(rustls::Error::InvalidCertificate(_)))
}

#[cfg(test)]
mod tests {
    use rustls::CertificateError;

    use super::*;

    #[test]
    fn a_refused_certificate_has_its_own_hint() {
        let hint = |source: rustls::Error| {
            let source = Box::new(ureq::Error::Io(io::Error::new(io::ErrorKind::InvalidData, source)));
            OciError::Unreachable { registry: "registry.example".to_owned(), source }.hint().unwrap()
        };
        assert!(hint(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)).contains("SSL_CERT_FILE"));
        // An answer that is no TLS.
        assert!(hint(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)).contains("insecure"));
    }
}
