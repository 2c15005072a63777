//! Meta contexts of an export: which there are, and what they say of a range.

use std::sync::Arc;

use super::exports::Export;
use super::limits::{EXTENT_CALLS_MAX, EXTENTS_MAX};
use crate::block::{BlockSource, ByteRange, ExtentKind, ExtentMap};
use crate::error::Result;
use crate::nbd::wire::{DIRTY_BITMAP_PREFIX as DIRTY_BITMAP, STATE_DIRTY, STATE_HOLE, STATE_ZERO};

const ALLOCATION: &str = "base:allocation";
/// `docs/interop/nbd.rst` of QEMU: 0 is allocated nowhere, 1 in the top layer, 2 in the one below.
const DEPTH: &str = "qemu:allocation-depth";

/// How far a source looks first when a single extent is wanted.
const FIRST_WINDOW_BYTES: u64 = 1 << 20;

/// What a context tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Allocation,
    /// The export's change map of this index.
    Changes(usize),
    /// In which layer a range is.
    Depth,
}

/// A context of an export. Its id is the same on every connection, which no client may rely on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) id: u32,
    pub(super) name: String,
    meaning: Meaning,
}

/// One context's extents: lengths and flags.
pub(super) type Runs = Vec<(u64, u64)>;

/// Every context of the export.
pub(super) fn all(export: &Export) -> Vec<Context> {
    let changes = export.changes.iter().enumerate();
    let changes = changes
        .map(|(index, map)| (format!("{DIRTY_BITMAP}{}", map.name), Meaning::Changes(index)));
    let depth = (!export.layers.is_empty()).then(|| (DEPTH.to_owned(), Meaning::Depth));
    [(ALLOCATION.to_owned(), Meaning::Allocation)]
        .into_iter()
        .chain(depth)
        .chain(changes)
        .zip(1..)
        .map(|((name, meaning), id)| Context { id, name, meaning })
        .collect()
}

/// Those of `all` that a client's queries name, each once. A list may ask for whole families
/// (`base:`, `qemu:`, `qemu:dirty-bitmap:`; no query at all means everything), a choice may not.
pub(super) fn matching(all: Vec<Context>, queries: &[&[u8]], asked: Asked) -> Vec<Context> {
    let families = ["base:", "qemu:", DIRTY_BITMAP];
    let matches = |context: &Context| {
        let name = context.name.as_bytes();
        queries.contains(&name)
            || asked == Asked::List
                && (queries.is_empty()
                    || families.iter().any(|family| {
                        context.name.starts_with(family) && queries.contains(&family.as_bytes())
                    }))
    };
    all.into_iter().filter(matches).collect()
}

/// What the queries are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    List,
    Set,
}

impl Context {
    /// What it says of a prefix of `range`, at most `extents_max` extents and at least one; never
    /// past the range's end. `range` is not empty.
    pub(super) async fn runs(
        &self,
        export: &Export,
        range: ByteRange,
        extents_max: usize,
    ) -> Result<Runs> {
        let extents_max = extents_max.min(EXTENTS_MAX);
        let mut runs = Runs::new();
        let mut at = range.offset();
        // Who wants one extent (QEMU's client) asks again behind it: a walk to the end of the disk
        // each time would be quadratic.
        let mut window = if extents_max == 1 { FIRST_WINDOW_BYTES } else { range.len() };
        for _ in 0..EXTENT_CALLS_MAX {
            let asked = ByteRange::new(at, window.min(range.end() - at));
            window = window.saturating_mul(4);
            for (len, flags) in self.told(export, asked).await? {
                let full = runs.len() == extents_max;
                match runs.last_mut() {
                    Some(last) if last.1 == flags => last.0 += len,
                    _ if full => return Ok(runs),
                    _ => runs.push((len, flags)),
                }
                at += len;
            }
            if at == range.end() {
                break;
            }
        }
        Ok(runs)
    }

    /// What the disk itself says of a prefix of `range`: a byte at least, neighbours may be equal.
    async fn told(&self, export: &Export, range: ByteRange) -> Result<Runs> {
        let (source, flags): (_, fn(ExtentKind) -> u64) = match self.meaning {
            Meaning::Allocation => (&export.source, |kind| match kind {
                ExtentKind::Zero => STATE_HOLE | STATE_ZERO,
                ExtentKind::Data | ExtentKind::Unchanged => 0,
            }),
            Meaning::Changes(index) => (&export.changes[index].map, |kind| match kind {
                ExtentKind::Unchanged => 0,
                ExtentKind::Data | ExtentKind::Zero => STATE_DIRTY,
            }),
            Meaning::Depth => return depths(&export.layers, range).await,
        };
        let map = extents(source, range).await?;
        Ok(map.iter().map(|extent| (extent.range.len(), flags(extent.kind))).collect())
    }
}

/// In which of `layers`, the topmost first, a prefix of `range` is.
async fn depths(layers: &[Arc<dyn BlockSource>], range: ByteRange) -> Result<Runs> {
    let mut runs = Runs::new();
    // What follows what is known, the next one last: a range, and the first layer that may have it,
    // or its depth.
    let mut open = vec![(range, Where::From(0))];
    while let Some((range, place)) = open.pop() {
        let index = match place {
            Where::Depth(depth) => {
                runs.push((range.len(), depth));
                continue;
            }
            Where::From(index) => index,
        };
        let lowest = index + 1 == layers.len();
        let map = extents(&layers[index], range).await?;
        if map.end() < range.end() {
            // The answer ends where this one does.
            open.clear();
        }
        let place = |kind| match kind {
            ExtentKind::Unchanged if !lowest => Where::From(index + 1),
            // Zeroes of an upper layer hide what is below: they are there.
            ExtentKind::Zero if lowest => Where::Depth(0),
            _ => Where::Depth(index as u64 + 1),
        };
        let found: Vec<_> = map.iter().map(|extent| (extent.range, place(extent.kind))).collect();
        open.extend(found.into_iter().rev());
    }
    Ok(runs)
}

/// Where a range is.
enum Where {
    /// In this layer, counted from 1; 0 is nowhere.
    Depth(u64),
    /// In the layer of this index, or below.
    From(usize),
}

async fn extents(source: &Arc<dyn BlockSource>, range: ByteRange) -> Result<ExtentMap> {
    let map = source.extents(range).await?;
    assert!(!map.is_empty() && map.end() <= range.end(), "a source breaks its contract");
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::memory::MemoryDisk;

    fn names(queries: &[&str], asked: Asked) -> Vec<String> {
        let disk = Arc::new(MemoryDisk::zeroed(4096));
        let export = Export::read_only("", disk.clone() as _).with_changes("b", disk as _);
        let queries: Vec<&[u8]> = queries.iter().map(|query| query.as_bytes()).collect();
        matching(all(&export), &queries, asked).into_iter().map(|context| context.name).collect()
    }

    #[tokio::test]
    async fn the_depth_is_that_of_the_first_layer_that_has_a_range() {
        let layer = |ranges: &[(u64, u64)], zeroes: std::ops::Range<usize>| {
            let mut content = vec![1; 12 << 12];
            content[zeroes].fill(0);
            let ranges = ranges.iter().map(|(at, len)| ByteRange::new(at << 12, len << 12));
            Arc::new(MemoryDisk::changed_since_base(content, ranges.collect())) as _
        };
        // 0 1 2 3 4 5 6 7 8 9 10 11, in blocks of 4 KiB
        //     t t       t              the top layer
        //   m m m m                    the middle one
        //         . . .                zeroes of the lowest
        let top = layer(&[(2, 2), (7, 1)], 0..0);
        let middle = layer(&[(1, 4)], 0..0);
        let lowest = layer(&[(0, 12)], 4 << 12..7 << 12);
        let export = Export::read_only("", Arc::new(MemoryDisk::zeroed(12 << 12)));
        let export = export.with_layers(vec![top, middle, lowest]);
        let context = all(&export).pop().unwrap();
        assert_eq!(context.name, "qemu:allocation-depth");
        let expected: [(u64, u64); 8] =
            [(1, 3), (1, 2), (2, 1), (1, 2), (2, 0), (1, 1), (4, 3), (0, 0)];
        let expected = expected.map(|(blocks, depth)| (blocks << 12, depth));
        let runs = context.runs(&export, ByteRange::new(0, 12 << 12), 99).await.unwrap();
        assert_eq!(runs, expected[..7]);
        let runs = context.runs(&export, ByteRange::new(0, 12 << 12), 3).await.unwrap();
        assert_eq!(runs, expected[..3]);
    }

    #[test]
    fn a_list_may_ask_for_families_and_a_choice_may_not() {
        let both = ["base:allocation", "qemu:dirty-bitmap:b"];
        assert_eq!(names(&[], Asked::List), both);
        assert_eq!(names(&[], Asked::Set), [""; 0]);
        assert_eq!(names(&["base:", "qemu:"], Asked::List), both);
        assert_eq!(names(&["qemu:dirty-bitmap:"], Asked::List), both[1..]);
        assert_eq!(names(&["base:", "qemu:"], Asked::Set), [""; 0]);
        assert_eq!(names(&["qemu:dirty-bitmap:b", "x", both[0], both[0]], Asked::Set), both);
        assert_eq!(names(&["base:alloc", "qemu:dirty-bitmap:c"], Asked::List), [""; 0]);
    }
}
