//! How much a disk or a network interface does in a second at most.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// The highest limit of operations a second.
pub const MOST_IOPS: u64 = 1_000_000_000;

/// The lowest limit of bytes a second: with less a guest only seems to have died.
pub const LEAST_BYTES_PER_SECOND: u64 = 1024;

/// The highest limit of bytes a second.
pub const MOST_BYTES_PER_SECOND: u64 = 1 << 40;

/// What a disk does in a second at most, reads and writes together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DiskLimits {
    /// Operations a second; a flush is one too. None: as many as it can.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 1_000_000_000))]
    pub iops: Option<u64>,
    /// None: as many as it can.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 1024, maximum = 1_099_511_627_776_i64))]
    pub bytes_per_second: Option<u64>,
}

/// What a VM does in a second at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VmLimits {
    /// Of its root disk. Volumes have their own.
    #[serde(default)]
    pub disk: DiskLimits,
    /// Of its network interface, each way. None: as many as it can.
    #[serde(default)]
    pub net_bytes_per_second: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    #[error("a limit is 1 to {MOST_IOPS} operations a second, not {0}")]
    Iops(u64),
    #[error("a limit is {LEAST_BYTES_PER_SECOND} (1 KiB) to {MOST_BYTES_PER_SECOND} (1 TiB) bytes a second, not {0}")]
    BytesPerSecond(u64),
}

/// # Errors
/// When no disk can have this limit.
pub const fn check_iops(iops: u64) -> Result<(), LimitError> {
    if iops < 1 || iops > MOST_IOPS { Err(LimitError::Iops(iops)) } else { Ok(()) }
}

/// # Errors
/// When no disk or network interface can have this limit.
pub const fn check_bytes_per_second(bytes: u64) -> Result<(), LimitError> {
    if bytes < LEAST_BYTES_PER_SECOND || bytes > MOST_BYTES_PER_SECOND { Err(LimitError::BytesPerSecond(bytes)) } else { Ok(()) }
}

impl DiskLimits {
    /// # Errors
    /// When no disk can have such limits.
    pub fn check(&self) -> Result<(), LimitError> {
        self.iops.map_or(Ok(()), check_iops)?;
        self.bytes_per_second.map_or(Ok(()), check_bytes_per_second)
    }

    /// With what a change says: left out stays, none is none.
    #[must_use]
    pub fn with(self, iops: Option<Option<u64>>, bytes_per_second: Option<Option<u64>>) -> Self {
        Self { iops: iops.unwrap_or(self.iops), bytes_per_second: bytes_per_second.unwrap_or(self.bytes_per_second) }
    }
}

/// For fields of a change that may be left out (with `default`), or `null`: then what they change is none from now on.
///
/// # Errors
/// Those of the value.
pub fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// Bits a second, as the speed of network links is given: in thousands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitRate(pub u64);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the speed of a network is a whole number with kbit, Mbit or Gbit behind it (100Mbit, 1Gbit)")]
pub struct BitRateError;

const UNITS: [(&str, u64); 3] = [("Gbit", 1_000_000_000), ("Mbit", 1_000_000), ("kbit", 1000)];

impl BitRate {
    pub const fn of_bytes(bytes_per_second: u64) -> Self {
        Self(bytes_per_second.saturating_mul(8))
    }

    pub const fn bytes_per_second(self) -> u64 {
        self.0 / 8
    }
}

impl std::str::FromStr for BitRate {
    type Err = BitRateError;

    /// Any case, also with `/s` behind it.
    fn from_str(text: &str) -> Result<Self, BitRateError> {
        let text = text.strip_suffix("/s").unwrap_or(text);
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let (_, factor) = UNITS.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or(BitRateError)?;
        let number: u64 = number.parse().map_err(|_| BitRateError)?;
        number.checked_mul(factor).map(Self).ok_or(BitRateError)
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, factor) = UNITS.into_iter().find(|(_, factor)| self.0 >= *factor).unwrap_or(("bit", 1));
        let value = self.0 as f64 / factor as f64;
        // What is a whole number is shown as one.
        if self.0.is_multiple_of(factor) { write!(formatter, "{value:.0} {name}/s") } else { write!(formatter, "{value:.1} {name}/s") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_bounds() {
        let limits = |iops, bytes_per_second| DiskLimits { iops, bytes_per_second };
        for good in [limits(None, None), limits(Some(1), Some(1024)), limits(Some(MOST_IOPS), Some(1 << 40))] {
            assert_eq!(good.check(), Ok(()));
        }
        assert_eq!(limits(Some(0), None).check(), Err(LimitError::Iops(0)));
        assert_eq!(limits(None, Some(1023)).check(), Err(LimitError::BytesPerSecond(1023)));
        assert!(limits(Some(u64::MAX), None).check().is_err() && limits(None, Some(u64::MAX)).check().is_err());
    }

    #[test]
    fn what_is_left_out_of_a_change_stays_and_null_is_none() {
        #[derive(Deserialize)]
        struct Change {
            #[serde(default, deserialize_with = "given")]
            iops: Option<Option<u64>>,
            #[serde(default, deserialize_with = "given")]
            bytes_per_second: Option<Option<u64>>,
        }
        let before = DiskLimits { iops: Some(10), bytes_per_second: Some(2048) };
        for (json, iops, bytes_per_second) in [
            ("{}", Some(10), Some(2048)),
            (r#"{"iops": null}"#, None, Some(2048)),
            (r#"{"iops": 7, "bytes_per_second": null}"#, Some(7), None),
        ] {
            let change: Change = serde_json::from_str(json).unwrap();
            assert_eq!(before.with(change.iops, change.bytes_per_second), DiskLimits { iops, bytes_per_second }, "{json}");
        }
    }

    #[test]
    fn speeds_of_networks() {
        for (text, bits, shown) in [
            ("100Mbit", 100_000_000, "100 Mbit/s"),
            ("1gbit/s", 1_000_000_000, "1 Gbit/s"),
            ("1500Mbit", 1_500_000_000, "1.5 Gbit/s"),
            ("64kbit", 64_000, "64 kbit/s"),
        ] {
            let rate: BitRate = text.parse().unwrap();
            assert_eq!((rate.0, rate.to_string().as_str()), (bits, shown));
            assert_eq!(BitRate::of_bytes(rate.bytes_per_second()), rate);
        }
        for bad in ["", "100", "Mbit", "1.5Gbit", "100M", "-1Mbit", "99999999999999Gbit"] {
            assert_eq!(bad.parse::<BitRate>(), Err(BitRateError), "{bad}");
        }
    }
}
