//! What a server says about an export, checked.

use std::sync::Arc;

use super::error::{NbdError, violation};
use super::wire::{self, be32, export};

/// Size, abilities and limits of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size; at most `i64::MAX`.
    pub size_bytes: u64,
    /// What it can do: the bits of [`wire::export`]; 0 when the server sent none.
    pub transmission_flags: u16,
    /// Limits of requests.
    pub block_sizes: BlockSizes,
    /// Canonical name, if the server told.
    pub name: Option<String>,
    /// Description, if the server told.
    pub description: Option<String>,
}

impl ExportInfo {
    /// Checks the size (CVE-2023-5215: sizes past `i64::MAX` became negative).
    pub(super) fn new(peer: &Arc<str>, size_bytes: u64, flags: u16) -> Result<Self, NbdError> {
        if i64::try_from(size_bytes).is_err() {
            return Err(violation(peer, format!("export size {size_bytes} is above 2^63-1")));
        }
        let usable = flags & export::HAS_FLAGS != 0;
        Ok(Self {
            size_bytes,
            transmission_flags: if usable { flags } else { 0 },
            block_sizes: BlockSizes::default(),
            name: None,
            description: None,
        })
    }

    /// Whether `flag` of [`wire::export`] is set.
    pub fn has(&self, flag: u16) -> bool {
        self.transmission_flags & flag != 0
    }
}

/// Limits of requests; powers of two but for the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it.
    pub min_bytes: u64,
    /// Best requests are multiples of it.
    pub preferred_bytes: u64,
    /// Largest payload.
    pub payload_bytes_max: u64,
}

impl Default for BlockSizes {
    /// What proto.md says of servers that tell nothing.
    fn default() -> Self {
        Self {
            min_bytes: 512,
            preferred_bytes: 4096,
            payload_bytes_max: wire::PAYLOAD_BYTES_DEFAULT,
        }
    }
}

impl BlockSizes {
    /// Reads the 12 bytes of an INFO_BLOCK_SIZE and checks them ("Block size constraints").
    pub(super) fn decode(peer: &Arc<str>, data: &[u8]) -> Result<Self, NbdError> {
        let [min, preferred, max] = [be32(&data[..4]), be32(&data[4..8]), be32(&data[8..12])];
        let bad = |what: &str| {
            Err(violation(peer, format!("block sizes {min}, {preferred}, {max}: {what}")))
        };
        if !min.is_power_of_two() || min > wire::BLOCK_BYTES_MIN_MAX {
            return bad("the minimum is not a power of two up to 64 KiB");
        }
        if !preferred.is_power_of_two() || preferred < min.max(512) {
            return bad("the preferred size is not a power of two above 512 and the minimum");
        }
        if max < min || (max != u32::MAX && !max.is_multiple_of(min)) {
            return bad("the maximum is not a multiple of the minimum");
        }
        // "No limit" leaves what everybody must take; QEMU hangs up above that.
        let max = u64::from(max).min(wire::PAYLOAD_BYTES_DEFAULT);
        Ok(Self {
            min_bytes: u64::from(min),
            preferred_bytes: u64::from(preferred).min(max),
            payload_bytes_max: max,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_that_break_a_rule_are_refused() {
        let peer: Arc<str> = "test".into();
        let decode = |sizes: [u32; 3]| {
            let bytes: Vec<u8> = sizes.iter().flat_map(|n| n.to_be_bytes()).collect();
            BlockSizes::decode(&peer, &bytes)
        };
        assert_eq!(decode([1, 4096, 32 << 20]).unwrap().payload_bytes_max, 32 << 20);
        assert_eq!(decode([512, 512, u32::MAX]).unwrap().payload_bytes_max, 32 << 20);
        for sizes in [
            [0, 4096, 65536],
            [3, 4096, 65536],
            [1 << 17, 1 << 17, 1 << 20],
            [1, 256, 65536],
            [4096, 512, 65536],
            [512, 3000, 65536],
            [4096, 4096, 512],
            [4096, 4096, 5000],
        ] {
            assert!(decode(sizes).is_err(), "{sizes:?}");
        }
    }
}
