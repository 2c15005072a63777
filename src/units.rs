//! Byte sizes as people write and read them, and the field's constants.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Kind};

/// 1 KiB.
pub const KIB: u64 = 1024;
/// 1 MiB.
pub const MIB: u64 = 1024 * KIB;
/// 1 GiB.
pub const GIB: u64 = 1024 * MIB;
/// 1 TiB.
pub const TIB: u64 = 1024 * GIB;

/// A number of bytes that prints with binary units (`1.5 GiB`) and parses what qemu-img accepts:
/// a number with an optional suffix `b`, `k`, `M`, `G`, `T` (binary; `KiB`, `MB`, … mean the same).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            n if n >= TIB => (TIB, "TiB"),
            n if n >= GIB => (GIB, "GiB"),
            n if n >= MIB => (MIB, "MiB"),
            n if n >= KIB => (KIB, "KiB"),
            n => return f.pad(&format!("{n} B")),
        };
        // Tenths in integer arithmetic: exact at any size.
        let tenths = u128::from(self.0) * 10 / u128::from(unit);
        f.pad(&format!("{}.{} {name}", tenths / 10, tenths % 10))
    }
}

impl FromStr for ByteSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || {
            Error::new(Kind::Usage, format!("'{text}' is not a size"))
                .hint("write a number with an optional suffix k, M, G or T, such as 512M")
        };
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, suffix) = text.split_at(digits);
        let unit =
            match suffix.trim().to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
                "" => 1,
                "k" => KIB,
                "m" => MIB,
                "g" => GIB,
                "t" => TIB,
                _ => return Err(bad()),
            };
        let number: u64 = number.parse().map_err(|_| bad())?;
        number.checked_mul(unit).map(ByteSize).ok_or_else(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("1M", MIB),
            ("2GiB", 2 * GIB),
            ("3 TB", 3 * TIB),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
        for text in ["", "k", "1x", "-1", "1.5G", "99999999999T"] {
            assert_eq!(text.parse::<ByteSize>().unwrap_err().kind(), Kind::Usage, "{text}");
        }
    }

    #[test]
    fn sizes_print_with_one_decimal() {
        assert_eq!(ByteSize(0).to_string(), "0 B");
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteSize(u64::MAX).to_string(), "16777215.9 TiB");
    }
}
