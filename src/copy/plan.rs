//! Extents in, steps out: which ranges are read, zeroed or kept. Pure; the invariant *Partition* of
//! the engine is kept here and checked against a byte-wise model.
//!
//! The disk is cut into cells (the sink's alignment: a chunk of the repository, a sector of a
//! device). What a cell becomes:
//!
//! | in the cell | step |
//! |---|---|
//! | Unchanged only | keep |
//! | Zero only | zero |
//! | anything else | read from the first to the last byte that is not Zero, fill the rest with zeroes |
//!
//! Unchanged bytes beside a change are read like data: the chunk is made anew, and what the base
//! holds of it is the source's to tell. Neighbours of one kind are merged; reads end at multiples
//! of the request size.

use std::collections::VecDeque;

use super::Shape;
use crate::block::{ByteRange, Extent, ExtentKind};
use crate::units::GIB;

/// Zero and keep steps end at multiples of this, so that a stop is noticed and progress shows.
const RUN_BYTES: u64 = GIB;

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Leave as in the base.
    Keep(ByteRange),
    /// Make zero.
    Zero(ByteRange),
    /// Read `span`, write all of `range`; what is outside `span` is zero.
    Read { range: ByteRange, span: ByteRange },
}

#[cfg(test)]
impl Step {
    pub(super) fn range(&self) -> ByteRange {
        match *self {
            Self::Keep(range) | Self::Zero(range) | Self::Read { range, .. } => range,
        }
    }
}

/// Turns a stream of extents into steps.
#[derive(Debug)]
pub(super) struct Planner {
    shape: Shape,
    /// One past the last byte seen.
    at: u64,
    /// The cell that `at` lies in, if it does not lie on a border.
    cell: Option<Cell>,
    /// The last step, which the next may extend.
    last: Option<Step>,
    ready: VecDeque<Step>,
}

/// What was seen of a cell so far.
#[derive(Clone, Copy, Debug)]
struct Cell {
    start: u64,
    /// From the first to the last byte that is not known to be zero.
    span: Option<ByteRange>,
    changed: bool,
}

impl Planner {
    pub(super) fn new(shape: Shape) -> Self {
        Self { shape, at: 0, cell: None, last: None, ready: VecDeque::new() }
    }

    /// Takes the next extent; it begins where the last one ended.
    pub(super) fn push(&mut self, extent: Extent) {
        assert_eq!(extent.range.offset(), self.at, "extents follow each other");
        assert!(extent.range.end() <= self.shape.size_bytes, "extents lie within the disk");
        let (kind, mut rest) = (extent.kind, extent.range);
        while !rest.is_empty() {
            let border = self.cell_end(rest.offset());
            let whole_cells = self.cell.is_none() && self.whole_end(rest) > rest.offset();
            let end = if whole_cells { self.whole_end(rest) } else { border.min(rest.end()) };
            let part = ByteRange::between(rest.offset(), end);
            rest = ByteRange::between(end, rest.end());
            self.at = end;
            if whole_cells {
                self.emit_run(part, kind);
            } else {
                self.grow_cell(part, kind);
                if end == border {
                    self.close_cell();
                }
            }
        }
    }

    /// The next step that no later extent can change.
    pub(super) fn pop(&mut self) -> Option<Step> {
        if self.at == self.shape.size_bytes {
            self.ready.extend(self.last.take());
        }
        self.ready.pop_front()
    }

    /// Where the cell with `offset` in it ends.
    fn cell_end(&self, offset: u64) -> u64 {
        let next = (offset / self.shape.cell_bytes + 1).checked_mul(self.shape.cell_bytes);
        next.unwrap_or(u64::MAX).min(self.shape.size_bytes)
    }

    /// Where the last cell that `range`, beginning at a border, covers wholly ends.
    fn whole_end(&self, range: ByteRange) -> u64 {
        if range.end() == self.shape.size_bytes {
            return range.end();
        }
        (range.end() - range.end() % self.shape.cell_bytes).max(range.offset())
    }

    fn grow_cell(&mut self, part: ByteRange, kind: ExtentKind) {
        let fresh = Cell { start: part.offset(), span: None, changed: false };
        let cell = self.cell.get_or_insert(fresh);
        cell.changed |= kind != ExtentKind::Unchanged;
        if kind != ExtentKind::Zero {
            let start = cell.span.map_or(part.offset(), ByteRange::offset);
            cell.span = Some(ByteRange::between(start, part.end()));
        }
    }

    fn close_cell(&mut self) {
        let cell = self.cell.take().expect("a cell that ends was begun");
        let range = ByteRange::between(cell.start, self.at);
        self.emit(match cell.span {
            _ if !cell.changed => Step::Keep(range),
            None => Step::Zero(range),
            Some(span) => Step::Read { range, span },
        });
    }

    fn emit_run(&mut self, run: ByteRange, kind: ExtentKind) {
        match kind {
            ExtentKind::Data => run
                .pieces(self.shape.request_bytes)
                .for_each(|piece| self.emit(Step::Read { range: piece, span: piece })),
            ExtentKind::Zero => run.pieces(RUN_BYTES).for_each(|p| self.emit(Step::Zero(p))),
            ExtentKind::Unchanged => run.pieces(RUN_BYTES).for_each(|p| self.emit(Step::Keep(p))),
        }
    }

    /// Appends a step, or extends the last one by it.
    fn emit(&mut self, step: Step) {
        let merged = self.last.and_then(|last| self.merge(last, step));
        match merged {
            Some(merged) => self.last = Some(merged),
            None => self.ready.extend(self.last.replace(step)),
        }
    }

    fn merge(&self, last: Step, next: Step) -> Option<Step> {
        let same_unit = |a: ByteRange, b: ByteRange, unit: u64| {
            (a.offset() / unit == b.offset() / unit).then(|| hull(a, b))
        };
        match (last, next) {
            (Step::Keep(a), Step::Keep(b)) => same_unit(a, b, RUN_BYTES).map(Step::Keep),
            (Step::Zero(a), Step::Zero(b)) => same_unit(a, b, RUN_BYTES).map(Step::Zero),
            (Step::Read { range: a, span: x }, Step::Read { range: b, span: y }) => {
                let range = same_unit(a, b, self.shape.request_bytes)?;
                // Known zeroes are read only within what is written at once.
                let write_bytes = self.shape.write_bytes;
                let at_once = (a.end() - 1) / write_bytes == b.offset() / write_bytes;
                (at_once || x.end() == y.offset()).then(|| Step::Read { range, span: hull(x, y) })
            }
            _ => None,
        }
    }
}

/// From the start of `a` to the end of `b`.
fn hull(a: ByteRange, b: ByteRange) -> ByteRange {
    ByteRange::between(a.offset(), b.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::ExtentMap;
    use proptest::prelude::*;

    fn kind() -> impl Strategy<Value = ExtentKind> {
        prop_oneof![Just(ExtentKind::Data), Just(ExtentKind::Zero), Just(ExtentKind::Unchanged)]
    }

    fn plan(map: &ExtentMap, shape: Shape) -> Vec<Step> {
        let mut planner = Planner::new(shape);
        let mut steps = Vec::new();
        for extent in map.iter() {
            planner.push(extent);
            while let Some(step) = planner.pop() {
                steps.push(step);
            }
        }
        steps
    }

    #[test]
    fn what_is_read_for_several_writes_has_no_known_zeroes_between_them() {
        // Data at the beginning of each of four chunks, whole chunks after that.
        let mut map = ExtentMap::starting_at(0);
        for _ in 0..4 {
            map.push(1, ExtentKind::Data);
            map.push(3, ExtentKind::Zero);
        }
        map.push(16, ExtentKind::Data);
        let steps = plan(&map, Shape { write_bytes: 4, ..shape(32, 4, 16) });
        let read = |start, len, span| Step::Read {
            range: ByteRange::new(start, len),
            span: ByteRange::new(start, span),
        };
        let of_each = (0..4).map(|n| read(4 * n, 4, 1));
        assert_eq!(steps, of_each.chain([read(16, 16, 16)]).collect::<Vec<_>>());
    }

    fn shape(size_bytes: u64, cell_bytes: u64, request_bytes: u64) -> Shape {
        Shape { size_bytes, cell_bytes, request_bytes, write_bytes: request_bytes, requests: 1 }
    }

    #[test]
    fn a_chunk_with_a_change_and_unchanged_bytes_is_read_whole() {
        let mut map = ExtentMap::starting_at(0);
        map.push(5, ExtentKind::Unchanged);
        map.push(3, ExtentKind::Zero);
        map.push(1, ExtentKind::Unchanged);
        map.push(7, ExtentKind::Zero);
        map.push(16, ExtentKind::Unchanged);
        let (range, span) = (ByteRange::new(0, 16), ByteRange::new(0, 9));
        let expected = vec![Step::Read { range, span }, Step::Keep(ByteRange::new(16, 16))];
        assert_eq!(plan(&map, shape(32, 16, 16)), expected);
    }

    proptest! {
        /// The model: what each byte's cell says byte by byte.
        #[test]
        fn steps_partition_the_disk_and_agree_with_the_bytewise_model(
            runs in prop::collection::vec((1u64..90, kind()), 1..40),
            cell_shift in 0u32..6,
            request_cells in 1u64..5,
        ) {
            let cell_bytes = 1 << cell_shift;
            let mut map = ExtentMap::starting_at(0);
            for (len, kind) in runs {
                map.push(len, kind);
            }
            let size = map.end();
            let shape = shape(size, cell_bytes, cell_bytes * request_cells);
            let kinds: Vec<_> = map.iter()
                .flat_map(|e| vec![e.kind; usize::try_from(e.range.len()).unwrap()]).collect();
            let mut at = 0;
            for step in plan(&map, shape) {
                let range = step.range();
                prop_assert_eq!(range.offset(), at);
                prop_assert!(!range.is_empty());
                prop_assert!(range.offset().is_multiple_of(cell_bytes));
                prop_assert!(range.end().is_multiple_of(cell_bytes) || range.end() == size);
                for byte in range.offset()..range.end() {
                    let cell = byte - byte % cell_bytes;
                    let cell = &kinds[usize::try_from(cell).unwrap()..usize::try_from((cell + cell_bytes).min(size)).unwrap()];
                    let kind = kinds[usize::try_from(byte).unwrap()];
                    match step {
                        Step::Keep(_) => prop_assert!(cell.iter().all(|k| *k == ExtentKind::Unchanged)),
                        Step::Zero(_) => prop_assert!(cell.iter().all(|k| *k == ExtentKind::Zero)),
                        Step::Read { range, span } => {
                            prop_assert!(range.contains(span) && !span.is_empty());
                            prop_assert!(range.len() <= shape.request_bytes);
                            prop_assert!(cell.contains(&ExtentKind::Data)
                                || cell.contains(&ExtentKind::Unchanged) && cell.contains(&ExtentKind::Zero));
                            // What is not read is known to be zero.
                            let read = span.contains(ByteRange::new(byte, 1));
                            prop_assert!(read || kind == ExtentKind::Zero);
                        }
                    }
                }
                if let Step::Read { span, .. } = step {
                    for edge in [span.offset(), span.end() - 1] {
                        prop_assert_ne!(kinds[usize::try_from(edge).unwrap()], ExtentKind::Zero);
                    }
                }
                at = range.end();
            }
            prop_assert_eq!(at, size);
        }
    }
}
