//! The tree of a stored disk: the content tree, eight levels at a time.
//!
//! ```text
//!  height H   top node            ≤ 256 children, each 8 binary levels down
//!   …
//!  height 1   nodes               256 chunks each (64 MiB of disk at 256 KiB)
//!  height 0   chunks              nodes of the content tree at level `chunk_levels`
//! ```
//!
//! A node's hash is its place in the content tree (`content`), so a node proves itself against the
//! hash it is asked by, and equal subtrees are stored once, whatever disk they belong to. A subtree
//! of zeroes is never stored. There is always a top node (unless all is zero): a disk of one chunk
//! has height 1.

pub mod builder;
pub mod seams;

pub use builder::{Child, Ready, TreeBuilder};
pub use seams::Seams;

use crate::content::{self, ContentHash, ContentRoot, LEAF_BYTES};

/// Children of a node.
pub const FANOUT: usize = 256;

/// Binary levels of the content tree between a node and its children.
pub const FANOUT_LEVELS: u32 = 8;

/// Length of the bitmap a stored node begins with.
const BITMAP_BYTES: usize = FANOUT / 8;

/// How many chunks and nodes a disk has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    size_bytes: u64,
    chunk_levels: u32,
    /// Nodes at each height; `[0]` counts chunks, the last is 1.
    counts: Vec<u64>,
}

impl Shape {
    /// The shape of a disk of `size_bytes` in chunks of `2^chunk_levels` leaves.
    pub fn new(size_bytes: u64, chunk_levels: u32) -> Self {
        assert!(chunk_levels <= content::LEVELS_MIN, "chunks of 2^{chunk_levels} leaves");
        let mut counts = vec![size_bytes.div_ceil(LEAF_BYTES << chunk_levels).max(1)];
        loop {
            let next = counts[counts.len() - 1].div_ceil(FANOUT as u64);
            counts.push(next);
            if next == 1 {
                return Self { size_bytes, chunk_levels, counts };
            }
        }
    }

    /// Virtual size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of a chunk.
    pub fn chunk_bytes(&self) -> u64 {
        LEAF_BYTES << self.chunk_levels
    }

    /// Binary levels of a chunk.
    pub fn chunk_levels(&self) -> u32 {
        self.chunk_levels
    }

    /// How many chunks (at least one, also for an empty disk).
    pub fn chunks(&self) -> u64 {
        self.counts[0]
    }

    /// Height of the top node, at least 1; below 8 for every disk below 2^63 bytes.
    pub fn height(&self) -> u8 {
        u8::try_from(self.counts.len() - 1).expect("a tree of fan-out 256 has few heights")
    }

    /// How many children node `index` of `height` has.
    pub fn children_of(&self, height: u8, index: u64) -> usize {
        let below = self.counts[usize::from(height) - 1];
        let children = below.saturating_sub(index * FANOUT as u64).min(FANOUT as u64);
        usize::try_from(children).expect("at most 256")
    }

    /// How many nodes are at `height`.
    pub fn nodes_at(&self, height: u8) -> u64 {
        self.counts[usize::from(height)]
    }

    /// Chunks below one node of `height`.
    pub fn chunks_below(height: u8) -> u64 {
        1_u64.checked_shl(FANOUT_LEVELS * u32::from(height)).unwrap_or(u64::MAX)
    }

    /// The disk's content root, given the children of its top node.
    pub fn root(&self, top_children: &[ContentHash]) -> ContentRoot {
        let child_level = self.chunk_levels + FANOUT_LEVELS * (u32::from(self.height()) - 1);
        let levels = content::levels(self.size_bytes) - child_level;
        ContentRoot::new(self.size_bytes, &ContentHash::of_children(top_children, levels))
    }

    /// The root of a disk of this shape that is all zero.
    pub fn zero_root(&self) -> ContentRoot {
        ContentRoot::new(self.size_bytes, &ContentHash::ZERO)
    }
}

/// A tree node: the hashes of its children, ZERO for zero subtrees and past the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    children: Vec<ContentHash>,
}

impl Node {
    /// A node over up to 256 `children`.
    pub fn new(children: Vec<ContentHash>) -> Self {
        assert!(children.len() <= FANOUT, "a node has at most {FANOUT} children");
        Self { children }
    }

    /// The children that exist.
    pub fn children(&self) -> &[ContentHash] {
        &self.children
    }

    /// Child `index`; ZERO past the end.
    pub fn child(&self, index: usize) -> ContentHash {
        self.children.get(index).copied().unwrap_or(ContentHash::ZERO)
    }

    /// The node's own hash.
    pub fn hash(&self) -> ContentHash {
        ContentHash::of_children(&self.children, FANOUT_LEVELS)
    }

    /// Stored form: a bitmap of the children that are not ZERO (bit `i` is bit `i % 8` of byte
    /// `i / 8`), then their hashes in order.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; BITMAP_BYTES];
        for (index, child) in self.children.iter().enumerate().filter(|(_, c)| !c.is_zero()) {
            out[index / 8] |= 1 << (index % 8);
            out.extend_from_slice(&child.0);
        }
        out
    }

    /// Reads the stored form; `None` when it is not one. Whoever asked compares [`Node::hash`].
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (bitmap, hashes) = bytes.split_at_checked(BITMAP_BYTES)?;
        let (hashes, rest) = hashes.as_chunks::<32>();
        if !rest.is_empty() {
            return None;
        }
        let mut hashes = hashes.iter();
        let mut children = Vec::with_capacity(FANOUT);
        for index in 0..FANOUT {
            let stored = bitmap[index / 8] >> (index % 8) & 1 == 1;
            children.push(if stored { ContentHash(*hashes.next()?) } else { ContentHash::ZERO });
        }
        hashes.next().is_none().then_some(Self { children })
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shapes_have_a_top_node_and_no_more() {
        for (size, heights) in
            [(0, 1), (1, 1), (64 << 20, 1), ((64 << 20) + 1, 2), (16 << 30, 2), (1 << 42, 3)]
        {
            let shape = Shape::new(size, 0);
            assert_eq!(shape.height(), heights, "{size}");
            assert_eq!(shape.nodes_at(heights), 1);
        }
        assert_eq!(Shape::new((64 << 20) + 1, 0).children_of(1, 1), 1);
    }

    proptest! {
        #[test]
        fn a_node_survives_storage_and_garbage_is_refused(
            hashes in proptest::collection::vec(prop_oneof![Just([0_u8; 32]), any::<[u8; 32]>()], 0..=FANOUT),
            cut in any::<prop::sample::Index>(),
        ) {
            let node = Node::new(hashes.into_iter().map(ContentHash).collect());
            let stored = node.encode();
            let read = Node::decode(&stored).unwrap();
            prop_assert_eq!(read.hash(), node.hash());
            prop_assert!(Node::decode(&stored[..cut.index(stored.len())]).is_none());
        }

        #[test]
        fn the_root_of_a_shape_is_that_of_its_leaves(leaves in 1_u64..600, chunk_levels in 0_u32..=4) {
            let kinds: Vec<_> =
                (0_u64..7).map(|n| ContentHash::of_leaf(&n.to_le_bytes())).collect();
            let hashes: Vec<_> = (0..leaves).map(|n| kinds[n as usize % 7]).collect();
            let size = leaves * LEAF_BYTES;
            let top = ContentHash::of_children(&hashes, content::levels(size));
            let shape = Shape::new(size, chunk_levels);
            let mut row: Vec<_> = hashes
                .chunks(1 << chunk_levels)
                .map(|c| ContentHash::of_children(c, chunk_levels))
                .collect();
            for _ in 1..shape.height() {
                row = row.chunks(FANOUT).map(|c| ContentHash::of_children(c, FANOUT_LEVELS)).collect();
            }
            prop_assert_eq!(shape.root(&row), ContentRoot::new(size, &top));
        }
    }
}
