//! Sizes in bytes, and the words people write them in.

use std::fmt;

use serde::{Deserialize, Serialize};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    #[error("a size is a whole number with K, M, G or T behind it (512M, 20G)")]
    Syntax,
    #[error("the size does not fit: the largest is 16777215T")]
    TooLarge,
}

/// Reads `512`, `512M`, `20G`, `1TiB`: binary units, any case, `B` and `iB` allowed. A bare number counts `unit` bytes.
///
/// # Errors
/// When the text is no size, or the size does not fit 64 bits.
pub fn parse(text: &str, unit: u64) -> Result<Bytes, SizeError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::Syntax);
    }
    let multiplier = match suffix.to_ascii_lowercase().as_str() {
        "" => unit,
        "k" | "kb" | "kib" => KIB,
        "m" | "mb" | "mib" => MIB,
        "g" | "gb" | "gib" => GIB,
        "t" | "tb" | "tib" => TIB,
        _ => return Err(SizeError::Syntax),
    };
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
    number.checked_mul(multiplier).map(Bytes).ok_or(SizeError::TooLarge)
}

impl fmt::Display for Bytes {
    /// The largest binary unit that keeps three figures: `512 MiB`, `1.5 GiB`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            bytes if bytes >= TIB => (TIB, "TiB"),
            bytes if bytes >= GIB => (GIB, "GiB"),
            bytes if bytes >= MIB => (MIB, "MiB"),
            bytes if bytes >= KIB => (KIB, "KiB"),
            bytes => return formatter.pad(&format!("{bytes} B")),
        };
        let value = self.0 as f64 / unit as f64;
        let text = if self.0.is_multiple_of(unit) || value >= 100.0 { format!("{value:.0} {name}") } else { format!("{value:.1} {name}") };
        formatter.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading() {
        assert_eq!(parse("512", MIB), Ok(Bytes(512 * MIB)));
        assert_eq!(parse("2G", MIB), Ok(Bytes(2 * GIB)));
        assert_eq!(parse("1tib", GIB), Ok(Bytes(TIB)));
        assert_eq!(parse("", MIB), Err(SizeError::Syntax));
        assert_eq!(parse("-1", MIB), Err(SizeError::Syntax));
        assert_eq!(parse("1.5G", MIB), Err(SizeError::Syntax));
        assert_eq!(parse("99999999999999999999", MIB), Err(SizeError::TooLarge));
        assert_eq!(parse("99999999999T", MIB), Err(SizeError::TooLarge));
    }

    #[test]
    fn writing() {
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(512 * MIB).to_string(), "512 MiB");
        assert_eq!(Bytes(3 * GIB / 2).to_string(), "1.5 GiB");
    }
}
