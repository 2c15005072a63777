//! Which nodes of its base a disk will need, known before it is written.
//!
//! A node is made of the base's where some of the chunks below it are kept and others are not: where
//! there is a seam between the two. The lowest node over both sides of each seam stands for all such
//! nodes: the others are on the way down to one of them.

use std::collections::BTreeSet;

use super::{FANOUT_LEVELS, Shape};
use crate::block::ByteRange;

/// The seams of a disk.
#[derive(Debug)]
pub struct Seams {
    shape: Shape,
    /// Chunk behind the last that is kept.
    kept_until: u64,
    nodes: BTreeSet<(u8, u64)>,
}

impl Seams {
    /// A disk of which nothing is kept.
    pub fn new(shape: Shape) -> Self {
        Self { shape, kept_until: 0, nodes: BTreeSet::new() }
    }

    /// The chunks of `range` are kept, too; ranges come in the order of the disk.
    pub fn keep(&mut self, range: ByteRange) {
        let chunk = self.shape.chunk_bytes();
        let (start, end) = (range.offset() / chunk, range.end().div_ceil(chunk));
        if start > self.kept_until {
            self.seam(self.kept_until);
            self.seam(start);
        }
        self.kept_until = end;
    }

    /// The lowest nodes over both sides of each seam, as `(height, index)`.
    pub fn into_nodes(mut self) -> BTreeSet<(u8, u64)> {
        self.seam(self.kept_until);
        self.nodes
    }

    /// Between the chunk before `chunk` and that one.
    fn seam(&mut self, chunk: u64) {
        if chunk == 0 || chunk >= self.shape.chunks() {
            return;
        }
        let (mut height, mut before, mut behind) = (0, chunk - 1, chunk);
        while before != behind {
            (height, before, behind) =
                (height + 1, before >> FANOUT_LEVELS, behind >> FANOUT_LEVELS);
        }
        self.nodes.insert((height, behind));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Child, TreeBuilder};
    use super::*;
    use crate::content::{ContentHash, LEAF_BYTES};

    proptest! {
        #[test]
        fn they_tell_the_nodes_that_a_tree_makes_of_its_base(
            runs in prop::collection::vec((any::<bool>(), prop_oneof![1_u64..4, 1_u64..40_000]), 1..12),
            short in 0..LEAF_BYTES,
        ) {
            let chunks: u64 = runs.iter().map(|(_, len)| len).sum();
            let shape = Shape::new(chunks * LEAF_BYTES - short, 0);
            let (mut seams, tree) = (Seams::new(shape.clone()), TreeBuilder::new(shape.clone()));
            let (mut at, mut made) = (0, BTreeSet::new());
            for (kept, len) in runs {
                let end = ((at + len) * LEAF_BYTES).min(shape.size_bytes());
                let child = if kept { Child::Keep } else { Child::Is(ContentHash::ZERO) };
                if kept {
                    seams.keep(ByteRange::between(at * LEAF_BYTES, end));
                }
                for (mut height, mut index) in tree.subtrees(at, at + len) {
                    let mut child = child;
                    while let Some(ready) = tree.give(height, index, child) {
                        (height, index) = (ready.height, ready.index);
                        let keeps = |child: &Child| *child == Child::Keep;
                        let all = ready.children.iter().all(keeps);
                        child = if all { Child::Keep } else { Child::Is(ContentHash::ZERO) };
                        if !all && ready.children.iter().any(keeps) {
                            made.insert((height, index));
                        }
                    }
                }
                at += len;
            }
            let told = seams.into_nodes();
            // A node whose children are all new may be mixed only further down.
            let on_the_way = |(height, index): (u8, u64)| {
                told.iter().any(|(below, at)| {
                    *below <= height && at >> (FANOUT_LEVELS * u32::from(height - below)) == index
                })
            };
            prop_assert!(made.iter().all(|node| on_the_way(*node)), "{made:?} {told:?}");
            // None is told for nothing.
            let needed = |(height, index): (u8, u64)| {
                made.iter().any(|(above, at)| {
                    *above == height && *at == index
                        || *above < height && at >> (FANOUT_LEVELS * u32::from(height - above)) == index
                })
            };
            prop_assert!(told.iter().all(|node| needed(*node)), "{made:?} {told:?}");
        }
    }
}
