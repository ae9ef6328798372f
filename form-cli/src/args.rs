//! Arguments that several commands take, and how they are read.

use std::{str::FromStr, time::Duration};

use form_types::{
    Name,
    limits::{self, BitRate},
    size::{self, GIB, MIB},
    spec::{Port, Protocol, Restart, RestartPolicy},
};
use jiff::Timestamp;

/// A time limit: `30`, `90s`, `5m`, `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(pub Duration);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        duration(text).map(Self)
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "a time is a whole number of seconds, or one with s, m, h or d behind it (90s, 5m)".to_owned();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).filter(|seconds| *seconds <= 10 * 365 * 86_400).map(Duration::from_secs).ok_or_else(wrong)
}

/// `web`, or `vm/web` as other commands print it.
///
/// # Errors
/// When it is no name.
pub fn vm_name(text: &str) -> Result<Name, String> {
    text.strip_prefix("vm/").unwrap_or(text).parse().map_err(|error: form_types::name::NameError| error.to_string())
}

/// `data`, or `volume/data` as other commands print it.
///
/// # Errors
/// When it is no name.
pub fn volume_name(text: &str) -> Result<Name, String> {
    text.strip_prefix("volume/").unwrap_or(text).parse().map_err(|error: form_types::name::NameError| error.to_string())
}

/// `fast`, or `pool/fast` as hosts write it.
///
/// # Errors
/// When it is no name.
pub fn pool_name(text: &str) -> Result<Name, String> {
    text.strip_prefix("pool/").unwrap_or(text).parse().map_err(|error: form_types::name::NameError| error.to_string())
}

/// `vm/web`: the noun is written out, so that a script says what it waits for.
///
/// # Errors
/// When there is no noun that can be waited for, or no name.
pub fn vm_reference(text: &str) -> Result<Name, String> {
    match text.split_once('/') {
        Some(("vm", _)) => vm_name(text),
        _ => Err("say what to wait for as vm/NAME".to_owned()),
    }
}

/// An instant, or how long ago it was: `2026-01-31T12:00:00Z`, `10m`.
///
/// # Errors
/// When it is neither.
pub fn instant(text: &str) -> Result<Timestamp, String> {
    if let Ok(ago) = duration(text) {
        return Timestamp::now().checked_sub(ago).map_err(|error| error.to_string());
    }
    text.parse().map_err(|_| "an instant is a time like 2026-01-31T12:00:00Z, or how long ago it was like 10m".to_owned())
}

/// Port forwarding: `8080:80`, or `80` for the same port on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// 0 lets the system choose one.
    pub local: u16,
    pub remote: u16,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |_| "a forwarding is LOCAL:REMOTE, two ports from 1 to 65535 (LOCAL may be 0 for any), or one port for both".to_owned();
        let (local, remote) = text.split_once(':').unwrap_or((text, text));
        let remote: std::num::NonZeroU16 = remote.parse().map_err(wrong)?;
        Ok(Self { local: local.parse().map_err(wrong)?, remote: remote.get() })
    }
}

/// `KEY=VALUE`.
///
/// # Errors
/// When it is not.
pub fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// A label to be set: [`label`] within the limits of one.
///
/// # Errors
/// When it is none.
pub fn new_label(text: &str) -> Result<(String, String), String> {
    let (name, value) = label(text)?;
    form_types::label::check(&name, &value).map_err(|error| error.to_string())?;
    Ok((name, value))
}

/// `always`, `never`, `on-failure`, `on-failure:TIMES`.
///
/// # Errors
/// When it is none of them.
pub fn restart_policy(text: &str) -> Result<Restart, String> {
    let (policy, retries) = match text.split_once(':') {
        Some((policy, retries)) => (policy, Some(retries.parse().map_err(|_| format!("`{retries}` is no number of times"))?)),
        None => (text, None),
    };
    match (policy, retries) {
        ("always", None) => Ok(Restart { policy: RestartPolicy::Always, max_retries: None }),
        ("never", None) => Ok(Restart { policy: RestartPolicy::Never, max_retries: None }),
        ("on-failure", max_retries) => Ok(Restart { policy: RestartPolicy::OnFailure, max_retries }),
        _ => Err("a restart policy is always, never, on-failure or on-failure:TIMES".to_owned()),
    }
}

/// `512M`, `2G`: in MiB.
///
/// # Errors
/// When it is no size, or no whole number of MiB.
pub fn mebibytes(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text, MIB).map_err(|error| error.to_string())?.0;
    if bytes == 0 || bytes % MIB != 0 { Err("memory is a whole number of MiB".to_owned()) } else { Ok(bytes / MIB) }
}

/// `10G`: in GiB.
///
/// # Errors
/// When it is no size, or no whole number of GiB.
pub fn gibibytes(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text, GIB).map_err(|error| error.to_string())?.0;
    if bytes == 0 || bytes % GIB != 0 { Err("a root disk is a whole number of GiB".to_owned()) } else { Ok(bytes / GIB) }
}

/// A limit of what a VM does in a second; none: as much as it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ceiling(pub Option<u64>);

fn ceiling(text: &str, value: impl FnOnce(&str) -> Result<u64, String>) -> Result<Ceiling, String> {
    if text == "none" { Ok(Ceiling(None)) } else { value(text).map(|value| Ceiling(Some(value))) }
}

/// `500`, `none`: operations a second.
///
/// # Errors
/// When it is neither, or no limit.
pub fn iops(text: &str) -> Result<Ceiling, String> {
    ceiling(text, |text| {
        let iops = text.parse().map_err(|_| "write how many operations a second, or none".to_owned())?;
        limits::check_iops(iops).map_err(|error| error.to_string()).map(|()| iops)
    })
}

/// `50MiB`, `50M`, `none`: bytes a second.
///
/// # Errors
/// When it is neither, or no limit.
pub fn bandwidth(text: &str) -> Result<Ceiling, String> {
    ceiling(text, |text| {
        let bytes = size::parse(text.strip_suffix("/s").unwrap_or(text), 1).map_err(|error| error.to_string())?.0;
        limits::check_bytes_per_second(bytes).map_err(|error| error.to_string()).map(|()| bytes)
    })
}

/// `100Mbit`, `none`: in bytes a second.
///
/// # Errors
/// When it is neither, or no limit.
pub fn net_bandwidth(text: &str) -> Result<Ceiling, String> {
    ceiling(text, |text| {
        let bytes = text.parse::<BitRate>().map_err(|error| error.to_string())?.bytes_per_second();
        limits::check_bytes_per_second(bytes).map_err(|error| error.to_string()).map(|()| bytes)
    })
}

/// A port on the host that leads to one of the VM, as `EXPOSE` says it: `8080:80`, `53:53/udp`; `80` is the same port on both sides.
///
/// # Errors
/// When it is none.
pub fn published(text: &str) -> Result<Port, String> {
    let wrong = || "write HOSTPORT:PORT or PORT, from 1 to 65535, with /udp behind it for UDP".to_owned();
    let (ports, protocol) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.split('/').next().unwrap_or_default(), Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return Err(wrong()),
    };
    let (host, guest) = ports.split_once(':').unwrap_or((ports, ports));
    let number = |text: &str| text.parse::<std::num::NonZeroU16>().map(std::num::NonZeroU16::get).map_err(|_| wrong());
    Ok(Port { port: number(guest)?, protocol, host_port: Some(number(host)?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        assert_eq!("90".parse(), Ok(Limit(Duration::from_secs(90))));
        assert_eq!("5m".parse(), Ok(Limit(Duration::from_secs(300))));
        for bad in ["", "m", "-1", "1.5", "5 m", "5x", "99999999999999999999d", "999999d"] {
            assert!(bad.parse::<Limit>().is_err(), "{bad}");
        }
    }

    #[test]
    fn references() {
        assert_eq!(vm_name("vm/web").unwrap(), vm_name("web").unwrap());
        assert!(vm_reference("web").is_err());
        assert!(vm_reference("image/web").is_err());
        assert!(vm_reference("vm/Web").is_err());
    }

    #[test]
    fn instants() {
        assert_eq!(instant("2026-01-31T12:00:00Z").unwrap().to_string(), "2026-01-31T12:00:00Z");
        let ago = Timestamp::now().as_second() - instant("10m").unwrap().as_second();
        assert!((599..=601).contains(&ago));
        assert!(instant("yesterday").is_err());
    }

    #[test]
    fn forwardings() {
        assert_eq!("8080:80".parse(), Ok(Forward { local: 8080, remote: 80 }));
        assert_eq!("80".parse(), Ok(Forward { local: 80, remote: 80 }));
        assert_eq!("0:80".parse(), Ok(Forward { local: 0, remote: 80 }));
        for bad in ["", "80:", "80:0", "x", "1:2:3", "70000"] {
            assert!(bad.parse::<Forward>().is_err(), "{bad}");
        }
    }

    #[test]
    fn policies_and_sizes() {
        assert_eq!(restart_policy("on-failure:3"), Ok(Restart { policy: RestartPolicy::OnFailure, max_retries: Some(3) }));
        assert_eq!(restart_policy("always"), Ok(Restart { policy: RestartPolicy::Always, max_retries: None }));
        for bad in ["", "sometimes", "never:2", "on-failure:x"] {
            assert!(restart_policy(bad).is_err(), "{bad}");
        }
        assert_eq!((mebibytes("512"), mebibytes("2G")), (Ok(512), Ok(2048)));
        for bad in ["0", "1K", "x"] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ceilings() {
        assert_eq!((iops("500"), iops("none")), (Ok(Ceiling(Some(500))), Ok(Ceiling(None))));
        for text in ["50MiB", "50M", "50mb/s"] {
            assert_eq!(bandwidth(text), Ok(Ceiling(Some(50 << 20))), "{text}");
        }
        assert_eq!((bandwidth("2048"), bandwidth("none")), (Ok(Ceiling(Some(2048))), Ok(Ceiling(None))));
        assert_eq!((net_bandwidth("100Mbit"), net_bandwidth("none")), (Ok(Ceiling(Some(12_500_000))), Ok(Ceiling(None))));
        for bad in ["", "0", "-1", "1.5", "many", "None"] {
            assert!(iops(bad).is_err() && bandwidth(bad).is_err() && net_bandwidth(bad).is_err(), "{bad}");
        }
        // Bytes are not taken for bits, nor bits for bytes.
        assert!(bandwidth("100Mbit").is_err() && net_bandwidth("100MiB").is_err() && net_bandwidth("1kbit").is_err());
    }

    #[test]
    fn published_ports() {
        let port = |text: &str| published(text).map(|port| (port.host_port, port.port, port.protocol));
        assert_eq!(port("8080:80"), Ok((Some(8080), 80, Protocol::Tcp)));
        assert_eq!(port("53/udp"), Ok((Some(53), 53, Protocol::Udp)));
        assert_eq!(port("80:81/tcp"), Ok((Some(80), 81, Protocol::Tcp)));
        for bad in ["", "0", "80:", ":80", "80/sctp", "70000", "1:2:3", "80/"] {
            assert!(published(bad).is_err(), "{bad}");
        }
        assert_eq!((gibibytes("10"), gibibytes("1T")), (Ok(10), Ok(1024)));
        assert!(gibibytes("512M").is_err());
    }
}
