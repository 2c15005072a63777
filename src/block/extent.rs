//! What the ranges of a disk hold: data, zeroes, or what they held at the base point.
//!
//! Invariant (*Partition*): an [`ExtentMap`] covers its range exactly: sorted, without gaps or
//! overlaps, neighbours of equal kind merged, no empty extent. The only way to build one is
//! [`ExtentMap::push`], which keeps this.

use super::ByteRange;

/// What a range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Must be read: content is unknown.
    Data,
    /// Reads as zeroes, known without reading. Zero is data: in an incremental it says that the
    /// range *now* is zero.
    Zero,
    /// Not written since the base point: equal to what the base holds.
    Unchanged,
}

/// A range with its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where; never empty.
    pub range: ByteRange,
    /// What.
    pub kind: ExtentKind,
}

/// A gap-free, coalesced list of extents from one offset on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentMap {
    start: u64,
    extents: Vec<Extent>,
}

impl ExtentMap {
    /// An empty map that begins at `start`.
    pub fn starting_at(start: u64) -> Self {
        Self { start, extents: Vec::new() }
    }

    /// A map of one extent (of none when `range` is empty).
    pub fn uniform(range: ByteRange, kind: ExtentKind) -> Self {
        let mut map = Self::starting_at(range.offset());
        map.push(range.len(), kind);
        map
    }

    /// Appends `len` bytes of `kind`; merges with the last extent where the kind is the same.
    ///
    /// # Panics
    /// When the end overflows.
    pub fn push(&mut self, len: u64, kind: ExtentKind) {
        if len == 0 {
            return;
        }
        let range = ByteRange::new(self.end(), len);
        match self.extents.last_mut() {
            Some(last) if last.kind == kind => {
                last.range = ByteRange::between(last.range.offset(), range.end());
            }
            _ => self.extents.push(Extent { range, kind }),
        }
    }

    /// Where the map begins.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// One past the last byte covered.
    pub fn end(&self) -> u64 {
        self.extents.last().map_or(self.start, |last| last.range.end())
    }

    /// Everything covered.
    pub fn range(&self) -> ByteRange {
        ByteRange::between(self.start, self.end())
    }

    /// Whether it covers no byte.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// The extents in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().copied()
    }

    /// How many extents.
    pub fn count(&self) -> usize {
        self.extents.len()
    }

    /// Bytes of `kind`.
    pub fn bytes_of(&self, kind: ExtentKind) -> u64 {
        self.iter().filter(|extent| extent.kind == kind).map(|extent| extent.range.len()).sum()
    }

    /// Lays a map of changes over a map of content: where `changed` is false the result is
    /// Unchanged, elsewhere what `self` says. `changed` yields `(len, changed)` runs and is read
    /// from `self.start()` on; the result ends where the shorter of both ends.
    #[must_use]
    pub fn masked(&self, changed: impl IntoIterator<Item = (u64, bool)>) -> Self {
        let mut out = Self::starting_at(self.start);
        let mut extents = self.iter().peekable();
        for (mut len, changed) in changed {
            while len > 0 {
                let Some(extent) = extents.peek() else { return out };
                let take = len.min(extent.range.end() - out.end());
                out.push(take, if changed { extent.kind } else { ExtentKind::Unchanged });
                len -= take;
                if out.end() == extent.range.end() {
                    extents.next();
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind() -> impl Strategy<Value = ExtentKind> {
        prop_oneof![Just(ExtentKind::Data), Just(ExtentKind::Zero), Just(ExtentKind::Unchanged)]
    }

    /// The kind of every byte, the slow and obvious way.
    fn bytes(map: &ExtentMap) -> Vec<ExtentKind> {
        map.iter().flat_map(|e| vec![e.kind; usize::try_from(e.range.len()).unwrap()]).collect()
    }

    proptest! {
        #[test]
        fn a_map_is_a_partition(start in 0u64..1000, runs in prop::collection::vec((0u64..50, kind()), 0..40)) {
            let mut map = ExtentMap::starting_at(start);
            for (len, kind) in &runs {
                map.push(*len, *kind);
            }
            let mut at = start;
            let mut last = None;
            for extent in map.iter() {
                prop_assert_eq!(extent.range.offset(), at);
                prop_assert!(!extent.range.is_empty());
                prop_assert_ne!(Some(extent.kind), last);
                at = extent.range.end();
                last = Some(extent.kind);
            }
            prop_assert_eq!(at, start + runs.iter().map(|(len, _)| len).sum::<u64>());
        }

        #[test]
        fn masking_equals_the_byte_by_byte_rule(
            runs in prop::collection::vec((0u64..50, kind()), 0..20),
            changes in prop::collection::vec((0u64..50, any::<bool>()), 0..20),
        ) {
            let mut map = ExtentMap::starting_at(7);
            for (len, kind) in runs {
                map.push(len, kind);
            }
            let flags = changes.iter().flat_map(|(len, c)| vec![*c; usize::try_from(*len).unwrap()]);
            let expected: Vec<_> = bytes(&map)
                .into_iter()
                .zip(flags)
                .map(|(kind, changed)| if changed { kind } else { ExtentKind::Unchanged })
                .collect();
            prop_assert_eq!(bytes(&map.masked(changes)), expected);
        }
    }
}
