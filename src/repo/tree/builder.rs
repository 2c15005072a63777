//! Collects what is known of a disk's chunks into tree nodes, bottom up, with bounded memory.
//!
//! Each chunk is given exactly once, alone or as part of an aligned range. A node that has all its
//! children is handed out as [`Ready`] and forgotten here: whoever got it stores it and gives its
//! hash to the node above. Only nodes in the middle of being filled are in memory, so a pass in
//! order over a disk of any size holds a few, and a kept or zero range of any length is one entry
//! at the highest node that it covers.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::{FANOUT, Shape};
use crate::content::ContentHash;

/// What is known of a subtree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Child {
    /// As in the base.
    Keep,
    /// This hash; its blob, if it is not ZERO, is stored or on its way.
    Is(ContentHash),
}

/// A node whose children are all known.
#[derive(Debug)]
pub struct Ready {
    /// Its height, at least 1.
    pub height: u8,
    /// Its index among the nodes of that height.
    pub index: u64,
    /// Its children.
    pub children: Vec<Child>,
}

/// The tree of a disk being written.
#[derive(Debug)]
pub struct TreeBuilder {
    shape: Shape,
    // Locked for a few map operations, never across an await.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<(u8, u64), OpenNode>,
    top: Option<Child>,
}

#[derive(Debug)]
struct OpenNode {
    children: Vec<Option<Child>>,
    given: usize,
}

impl TreeBuilder {
    /// A tree of which nothing is known.
    pub fn new(shape: Shape) -> Self {
        Self { shape, state: Mutex::default() }
    }

    /// The disk's shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Gives the subtree `index` of `height` (0: a chunk); the node above, if that completed it.
    ///
    /// # Panics
    /// When it was given before: each chunk has exactly one content.
    pub fn give(&self, height: u8, index: u64, child: Child) -> Option<Ready> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if height == self.shape.height() {
            assert!(state.top.replace(child).is_none(), "the top node was given twice");
            return None;
        }
        let (above, parent) = (height + 1, index / FANOUT as u64);
        let expected = self.shape.children_of(above, parent);
        let node = state
            .open
            .entry((above, parent))
            .or_insert_with(|| OpenNode { children: vec![None; expected], given: 0 });
        let slot = usize::try_from(index % FANOUT as u64).expect("below 256");
        assert!(slot < expected, "subtree {index} of height {height} is past the disk's end");
        let before = node.children[slot].replace(child);
        assert!(before.is_none(), "subtree {index} of height {height} was given twice");
        node.given += 1;
        if node.given < expected {
            return None;
        }
        let node = state.open.remove(&(above, parent)).expect("it was just filled");
        let children = node.children.into_iter().map(|c| c.expect("all were given")).collect();
        Some(Ready { height: above, index: parent, children })
    }

    /// Cuts the chunks `start..end` into the largest aligned subtrees, as `(height, index)`. The
    /// disk's end counts as aligned. The top itself is never one of them, so that the root can be
    /// computed from its children.
    pub fn subtrees(&self, start: u64, end: u64) -> impl Iterator<Item = (u8, u64)> {
        let (chunks, height_max) = (self.shape.chunks(), self.shape.height() - 1);
        let mut at = start;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let fits = |height: u8| {
                let below = Shape::chunks_below(height);
                at.is_multiple_of(below) && (at + below <= end || end == chunks)
            };
            let height = (0..=height_max).rev().find(|h| fits(*h)).expect("a chunk always fits");
            let subtree = (height, at / Shape::chunks_below(height));
            at += Shape::chunks_below(height);
            Some(subtree)
        })
    }

    /// The top, once everything was given; else how many nodes still miss children.
    pub fn finish(&self) -> Result<Child, usize> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.top.ok_or(state.open.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::LEAF_BYTES;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn subtrees_partition_the_chunks(chunks in 1_u64..200_000, a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>()) {
            let tree = TreeBuilder::new(Shape::new(chunks * LEAF_BYTES, 0));
            let (a, b) = (a.index(usize::try_from(chunks).unwrap()) as u64, b.index(usize::try_from(chunks).unwrap()) as u64 + 1);
            let (start, end) = (a.min(b), a.max(b));
            let mut at = start;
            for (height, index) in tree.subtrees(start, end) {
                let below = Shape::chunks_below(height);
                prop_assert_eq!(index * below, at);
                at = ((index + 1) * below).min(chunks);
            }
            prop_assert_eq!(at, end);
        }
    }

    #[test]
    fn a_huge_kept_disk_is_a_handful_of_subtrees() {
        let tree = TreeBuilder::new(Shape::new(1 << 50, 0));
        assert!(tree.subtrees(0, tree.shape().chunks()).count() <= FANOUT);
    }

    #[test]
    #[should_panic(expected = "given twice")]
    fn a_chunk_has_one_content() {
        let tree = TreeBuilder::new(Shape::new(10 * LEAF_BYTES, 0));
        tree.give(0, 3, Child::Keep);
        tree.give(0, 3, Child::Keep);
    }
}
