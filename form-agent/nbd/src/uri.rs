//! Addresses of exports (NetworkBlockDevice/nbd, `doc/uri.md`).

use std::{fmt, path::PathBuf, str::FromStr};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// The port that IANA gave to NBD.
const PORT: u16 = 10809;

const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Unix(PathBuf),
    /// A name or an address, without brackets.
    Tcp {
        host: String,
        port: u16,
    },
}

/// `nbd://HOST[:PORT]/EXPORT`, `nbds://…` with TLS, `nbd+unix:///EXPORT?socket=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    pub place: Place,
    /// May be empty.
    pub export: String,
    pub tls: bool,
    /// `tls-certificates`: a directory with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`.
    pub certificates: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUri {
    #[error(
        "{0:?} is no address of an NBD export: write nbd://HOST:PORT/EXPORT, nbds://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"
    )]
    Form(String),
    #[error("{0:?} names no socket: write nbd+unix:///EXPORT?socket=PATH")]
    NoSocket(String),
    #[error("{uri:?}: {parameter:?} is not understood; `socket` and `tls-certificates` are")]
    Parameter { uri: String, parameter: String },
}

impl FromStr for Uri {
    type Err = BadUri;

    fn from_str(text: &str) -> Result<Self, BadUri> {
        let bad = || BadUri::Form(text.to_owned());
        let url = url::Url::parse(text).map_err(|_| bad())?;
        let (tls, unix) = match url.scheme() {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(bad()),
        };
        let decode = |part: &str| percent_decode_str(part).decode_utf8().map(|part| part.into_owned()).map_err(|_| bad());
        let (mut socket, mut certificates) = (None, None);
        for pair in url.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "socket" if unix => socket = Some(PathBuf::from(decode(value)?)),
                "tls-certificates" if tls => certificates = Some(PathBuf::from(decode(value)?)),
                _ => return Err(BadUri::Parameter { uri: text.to_owned(), parameter: name.to_owned() }),
            }
        }
        let host = url.host_str().unwrap_or_default();
        if url.cannot_be_a_base() || url.fragment().is_some() || host.is_empty() != unix || url.password().is_some() {
            return Err(bad());
        }
        let place = if unix {
            Place::Unix(socket.filter(|path| path.is_absolute()).ok_or_else(|| BadUri::NoSocket(text.to_owned()))?)
        } else {
            let host = decode(host.trim_start_matches('[').trim_end_matches(']'))?;
            Place::Tcp { host, port: url.port().unwrap_or(PORT) }
        };
        let export = decode(url.path().strip_prefix('/').unwrap_or_default())?;
        Ok(Self { place, export, tls, certificates })
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |text: &str| utf8_percent_encode(text, PLAIN).to_string();
        let (scheme, export) = (if self.tls { "nbds" } else { "nbd" }, plain(&self.export));
        let mut parameters = Vec::new();
        match &self.place {
            Place::Unix(path) => {
                write!(formatter, "{scheme}+unix:///{export}")?;
                parameters.push(format!("socket={}", plain(&path.to_string_lossy())));
            }
            Place::Tcp { host, port } if host.contains(':') => write!(formatter, "{scheme}://[{host}]:{port}/{export}")?,
            Place::Tcp { host, port } => write!(formatter, "{scheme}://{host}:{port}/{export}")?,
        }
        parameters.extend(self.certificates.iter().map(|path| format!("tls-certificates={}", plain(&path.to_string_lossy()))));
        if parameters.is_empty() { Ok(()) } else { write!(formatter, "?{}", parameters.join("&")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Uri {
        Uri { place: Place::Tcp { host: host.to_owned(), port }, export: "data".to_owned(), tls: false, certificates: None }
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for (text, uri) in [
            ("nbd://127.0.0.1:1/data", tcp("127.0.0.1", 1)),
            ("nbd://[::1]:10809/data", tcp("::1", 10809)),
            ("nbd://storage.example:2/data", tcp("storage.example", 2)),
            ("nbds://h:3/data?tls-certificates=/a%20b", Uri { tls: true, certificates: Some("/a b".into()), ..tcp("h", 3) }),
            (
                "nbd+unix:///data?socket=/run/a%20b%26+/data.sock".replace('+', "%2B").replace("nbd%2B", "nbd+").as_str(),
                Uri { place: Place::Unix("/run/a b&+/data.sock".into()), ..tcp("", 0) },
            ),
        ] {
            assert_eq!(text.parse::<Uri>().unwrap(), uri, "{text}");
            assert_eq!(uri.to_string(), text);
        }
        assert_eq!("nbd://h/data".parse::<Uri>().unwrap(), tcp("h", PORT));
        assert_eq!("nbd://h".parse::<Uri>().unwrap().export, "");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", "disk.raw", "http://h/x", "nbd:h:1", "nbd:///x", "nbd+unix://h/x?socket=/s", "nbd://u:p@h/x", "nbd://h:99999/x"] {
            assert!(matches!(text.parse::<Uri>(), Err(BadUri::Form(_))), "{text}");
        }
        assert!(matches!("nbd+unix:///x".parse::<Uri>(), Err(BadUri::NoSocket(_))));
        assert!(matches!("nbd://h/x?socket=/s".parse::<Uri>(), Err(BadUri::Parameter { .. })));
        assert!(matches!("nbds://h/x?tls-psk-file=/s".parse::<Uri>(), Err(BadUri::Parameter { .. })));
    }
}
