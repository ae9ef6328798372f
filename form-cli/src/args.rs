//! Arguments that several commands take, and how they are read.

use std::{str::FromStr, time::Duration};

use form_types::Name;
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
}
