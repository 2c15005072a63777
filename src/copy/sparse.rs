//! Finds runs of zeroes in data that was read.

use crate::block::ByteRange;
use crate::content::is_zero;

/// A run of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Where on the disk.
    pub(super) range: ByteRange,
    /// Whether all of it is zero.
    pub(super) zero: bool,
}

/// Cuts `bytes`, which lie at `offset`, into runs of data and of zero blocks; blocks are the
/// `block_bytes` at multiples of that on the disk. Neighbours differ in kind.
pub(super) fn runs(bytes: &[u8], offset: u64, block_bytes: u64) -> Vec<Run> {
    let whole = ByteRange::new(offset, bytes.len() as u64);
    let mut runs: Vec<Run> = Vec::new();
    for range in whole.pieces(block_bytes) {
        let at = |n: u64| usize::try_from(n - offset).expect("a buffer fits the address space");
        let zero = is_zero(&bytes[at(range.offset())..at(range.end())]);
        match runs.last_mut() {
            Some(last) if last.zero == zero => {
                last.range = ByteRange::between(last.range.offset(), range.end());
            }
            _ => runs.push(Run { range, zero }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_partition_the_buffer_and_zero_runs_are_zero(
            blocks in prop::collection::vec(any::<bool>(), 1..30),
            offset in 0u64..200,
        ) {
            let bytes: Vec<u8> = blocks.iter().flat_map(|data| [u8::from(*data); 16]).collect();
            let mut at = offset;
            let mut last = None;
            for run in runs(&bytes, offset, 16) {
                prop_assert_eq!(run.range.offset(), at);
                prop_assert_ne!(Some(run.zero), last);
                let start = usize::try_from(at - offset).unwrap();
                let part = &bytes[start..start + usize::try_from(run.range.len()).unwrap()];
                if run.zero {
                    prop_assert!(part.iter().all(|b| *b == 0));
                } else {
                    prop_assert!(part.contains(&1));
                }
                at = run.range.end();
                last = Some(run.zero);
            }
            prop_assert_eq!(at, offset + bytes.len() as u64);
        }
    }
}
