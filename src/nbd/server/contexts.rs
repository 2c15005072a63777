//! Meta contexts of an export: which there are, and what they say of a range.

use super::exports::Export;
use super::limits::{EXTENT_CALLS_MAX, EXTENTS_MAX};
use crate::block::{ByteRange, ExtentKind};
use crate::error::Result;
use crate::nbd::wire::{STATE_DIRTY, STATE_HOLE, STATE_ZERO};

const ALLOCATION: &str = "base:allocation";
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// How far a source looks first when a single extent is wanted.
const FIRST_WINDOW_BYTES: u64 = 1 << 20;

/// What a context tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Allocation,
    /// The export's change map of this index.
    Changes(usize),
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
    [(ALLOCATION.to_owned(), Meaning::Allocation)]
        .into_iter()
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
        let source = match self.meaning {
            Meaning::Allocation => &export.source,
            Meaning::Changes(index) => &export.changes[index].map,
        };
        let extents_max = extents_max.min(EXTENTS_MAX);
        let mut runs = Runs::new();
        let mut at = range.offset();
        // Who wants one extent (QEMU's client) asks again behind it: a walk to the end of the disk
        // each time would be quadratic.
        let mut window = if extents_max == 1 { FIRST_WINDOW_BYTES } else { range.len() };
        for _ in 0..EXTENT_CALLS_MAX {
            let asked = ByteRange::new(at, window.min(range.end() - at));
            window = window.saturating_mul(4);
            let map = source.extents(asked).await?;
            assert!(!map.is_empty() && map.end() <= asked.end(), "a source breaks its contract");
            for extent in map.iter() {
                let flags = self.flags(extent.kind);
                let full = runs.len() == extents_max;
                match runs.last_mut() {
                    Some(last) if last.1 == flags => last.0 += extent.range.len(),
                    _ if full => return Ok(runs),
                    _ => runs.push((extent.range.len(), flags)),
                }
            }
            at = map.end();
            if at == range.end() {
                break;
            }
        }
        Ok(runs)
    }

    fn flags(&self, kind: ExtentKind) -> u64 {
        match (self.meaning, kind) {
            (Meaning::Allocation, ExtentKind::Zero) => STATE_HOLE | STATE_ZERO,
            (Meaning::Allocation, _) | (Meaning::Changes(_), ExtentKind::Unchanged) => 0,
            (Meaning::Changes(_), _) => STATE_DIRTY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::memory::MemoryDisk;
    use std::sync::Arc;

    fn names(queries: &[&str], asked: Asked) -> Vec<String> {
        let disk = Arc::new(MemoryDisk::zeroed(4096));
        let export = Export::read_only("", disk.clone() as _).with_changes("b", disk as _);
        let queries: Vec<&[u8]> = queries.iter().map(|query| query.as_bytes()).collect();
        matching(all(&export), &queries, asked).into_iter().map(|context| context.name).collect()
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
