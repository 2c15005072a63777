//! Half-open byte ranges of a disk.

use std::fmt;

/// The bytes `offset .. offset + len` of a disk. The end never overflows `u64`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    offset: u64,
    len: u64,
}

impl ByteRange {
    /// `len` bytes from `offset`.
    ///
    /// # Panics
    /// When the end overflows: peer-supplied numbers go through [`ByteRange::checked`].
    pub fn new(offset: u64, len: u64) -> Self {
        Self::checked(offset, len).expect("a range of a disk ends below 2^64")
    }

    /// `len` bytes from `offset`, or `None` when the end overflows.
    pub fn checked(offset: u64, len: u64) -> Option<Self> {
        offset.checked_add(len).map(|_| Self { offset, len })
    }

    /// The bytes from `start` up to, not including, `end`.
    ///
    /// # Panics
    /// When `end < start`.
    pub fn between(start: u64, end: u64) -> Self {
        assert!(start <= end, "range ends before it starts: {start}..{end}");
        Self { offset: start, len: end - start }
    }

    /// First byte.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether every byte of `other` is in `self`.
    pub fn contains(self, other: Self) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }

    /// The bytes in both; empty (at the later start) when there are none.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        let start = self.offset.max(other.offset);
        Self::between(start, self.end().min(other.end()).max(start))
    }

    /// The smallest range that contains `self`, starts and ends at multiples of `unit` and does
    /// not pass `limit` (the disk's end, which need not be a multiple).
    ///
    /// # Panics
    /// When `unit` is zero or `self` passes `limit`.
    #[must_use]
    pub fn widen(self, unit: u64, limit: u64) -> Self {
        assert!(unit > 0 && self.end() <= limit, "cannot widen {self:?} to {unit} below {limit}");
        if self.is_empty() {
            return self;
        }
        let start = self.offset - self.offset % unit;
        let end = self.end().checked_next_multiple_of(unit).map_or(limit, |end| end.min(limit));
        Self::between(start, end)
    }

    /// Cuts the range at multiples of `unit`: every piece lies within one aligned unit.
    pub fn pieces(self, unit: u64) -> impl Iterator<Item = Self> {
        assert!(unit > 0, "pieces of no size");
        let mut start = self.offset;
        std::iter::from_fn(move || {
            if start >= self.end() {
                return None;
            }
            let next =
                (start / unit + 1).checked_mul(unit).map_or(self.end(), |n| n.min(self.end()));
            let piece = Self::between(start, next);
            start = next;
            Some(piece)
        })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.offset, self.end())
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {}..{}", self.offset, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn overflowing_ranges_do_not_exist() {
        assert_eq!(ByteRange::checked(u64::MAX, 1), None);
        assert!(ByteRange::checked(u64::MAX, 0).is_some());
    }

    proptest! {
        #[test]
        fn pieces_partition_the_range(offset in 0u64..10_000, len in 0u64..10_000, unit in 1u64..700) {
            let range = ByteRange::new(offset, len);
            let mut at = offset;
            for piece in range.pieces(unit) {
                prop_assert_eq!(piece.offset(), at);
                prop_assert!(!piece.is_empty());
                prop_assert_eq!(piece.offset() / unit, (piece.end() - 1) / unit);
                at = piece.end();
            }
            prop_assert_eq!(at, range.end());
        }

        #[test]
        fn widening_contains_and_aligns(offset in 0u64..10_000, len in 1u64..10_000, unit in 1u64..700) {
            let range = ByteRange::new(offset, len);
            let limit = range.end() + 13;
            let wide = range.widen(unit, limit);
            prop_assert!(wide.contains(range));
            prop_assert!(wide.offset().is_multiple_of(unit));
            prop_assert!(wide.end().is_multiple_of(unit) || wide.end() == limit);
        }
    }
}
