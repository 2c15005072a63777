//! The content tree: one hash for what a disk holds, whoever holds it.
//!
//! ```text
//!  root = H_root(size, top)                      32 bytes, `hash` prints it
//!           top
//!        /       \         node = H_node(left ‖ right);  ZERO if both are ZERO
//!      …           …
//!   leaf leaf leaf leaf    leaf = H_leaf(256 KiB of content); ZERO if all of it is zero
//! ```
//!
//! `H_x` is BLAKE3 in key-derivation mode with the context strings below, so that no leaf can pass
//! for a node or a root. The disk is cut into leaves of 256 KiB; the last one is padded with zeroes;
//! the tree is the smallest full binary tree over them (of at least 16), missing leaves being ZERO. ZERO is 32 zero
//! bytes at every level: a hole of any size costs nothing, and content hashes to it only by a
//! preimage of BLAKE3.
//!
//! The repository uses the same tree: the hash of a chunk of 2^k leaves is the node at level k, a
//! stored tree node lists the hashes eight levels below it. So the content root of a point follows
//! from its tree without reading the disk, an incremental recomputes only what changed, and every
//! chunk and node read back proves itself against the root.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use blake3::Hasher;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};

/// Content under one leaf.
pub const LEAF_BYTES: u64 = 256 * 1024;

/// Context strings of BLAKE3's key-derivation mode (part of the format, never change).
const LEAF_CONTEXT: &str = "vmbackup 2026-11-21 content leaf v1";
const NODE_CONTEXT: &str = "vmbackup 2026-11-21 content node v1";
const ROOT_CONTEXT: &str = "vmbackup 2026-11-21 content root v1";

static LEAF: LazyLock<Hasher> = LazyLock::new(|| Hasher::new_derive_key(LEAF_CONTEXT));
static NODE: LazyLock<Hasher> = LazyLock::new(|| Hasher::new_derive_key(NODE_CONTEXT));
static ROOT: LazyLock<Hasher> = LazyLock::new(|| Hasher::new_derive_key(ROOT_CONTEXT));

/// The hash of a leaf or of a whole subtree.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentHash(pub [u8; 32]);

impl ContentHash {
    /// A subtree of zeroes, at any level.
    pub const ZERO: Self = Self([0; 32]);

    /// Whether everything below is zero.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// The hash of up to one leaf of content; missing bytes count as zero.
    ///
    /// # Panics
    /// When `content` is longer than a leaf.
    pub fn of_leaf(content: &[u8]) -> Self {
        let len = content.len() as u64;
        assert!(len <= LEAF_BYTES, "a leaf is at most 256 KiB");
        if is_zero(content) {
            return Self::ZERO;
        }
        let mut hasher = LEAF.clone();
        hasher.update(content);
        if len < LEAF_BYTES {
            let padding = usize::try_from(LEAF_BYTES - len).expect("less than a leaf");
            hasher.update(&vec![0; padding]);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The hash over two neighbours of the same level.
    pub fn of_pair(left: &Self, right: &Self) -> Self {
        if left.is_zero() && right.is_zero() {
            return Self::ZERO;
        }
        let mut hasher = NODE.clone();
        hasher.update(&left.0).update(&right.0);
        Self(*hasher.finalize().as_bytes())
    }

    /// The hash over a subtree of `2^levels` children; missing children on the right are ZERO.
    ///
    /// # Panics
    /// When there are more children than that.
    pub fn of_children(children: &[Self], levels: u32) -> Self {
        assert!(children.len() <= 1 << levels, "{} children under {levels} levels", children.len());
        let mut row = children.to_vec();
        for _ in 0..levels {
            if row.len() % 2 == 1 {
                row.push(Self::ZERO);
            }
            row = row.chunks_exact(2).map(|pair| Self::of_pair(&pair[0], &pair[1])).collect();
        }
        row.first().copied().unwrap_or(Self::ZERO)
    }

    /// The hash of a chunk of `2^levels` leaves; missing bytes count as zero.
    pub fn of_chunk(content: &[u8], levels: u32) -> Self {
        let leaf = usize::try_from(LEAF_BYTES).expect("a leaf fits memory");
        let leaves: Vec<_> = content.chunks(leaf).map(Self::of_leaf).collect();
        Self::of_children(&leaves, levels)
    }
}

/// Levels of the smallest tree: 16 leaves or 4 MiB, the largest chunk a repository may have, so that
/// every chunk of every repository is a node of every disk's tree.
pub const LEVELS_MIN: u32 = 4;

/// Levels of pairs above the leaves of a disk of `size_bytes`: the smallest full tree over them of
/// at least [`LEVELS_MIN`].
pub fn levels(size_bytes: u64) -> u32 {
    let leaves = size_bytes.div_ceil(LEAF_BYTES).max(1);
    leaves.next_power_of_two().trailing_zeros().max(LEVELS_MIN)
}

/// The hash over a whole disk: its size and its content.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentRoot(pub [u8; 32]);

impl ContentRoot {
    /// The root of a disk of `size_bytes` whose tree of [`levels`]`(size_bytes)` levels has `top`.
    pub fn new(size_bytes: u64, top: &ContentHash) -> Self {
        let mut hasher = ROOT.clone();
        hasher.update(&size_bytes.to_le_bytes()).update(&top.0);
        Self(*hasher.finalize().as_bytes())
    }
}

/// Whether every byte is zero. Compares the slice with itself shifted by one: memcmp speed.
pub fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && *rest == bytes[..bytes.len() - 1],
    }
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

macro_rules! hex_text {
    ($type:ty, $what:literal) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }
        impl FromStr for $type {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                parse_hex(text).map(Self).ok_or_else(|| {
                    Error::new(Kind::Usage, format!("'{text}' is not {} (64 hex digits)", $what))
                })
            }
        }
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(|_| serde::de::Error::custom(concat!("not ", $what)))
            }
        }
    };
}

hex_text!(ContentHash, "a content hash");
hex_text!(ContentRoot, "a content root");

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;

    #[test]
    fn zero_content_of_any_size_hashes_to_zero() {
        assert!(ContentHash::of_leaf(&[0; 1000]).is_zero());
        assert!(ContentHash::of_chunk(&vec![0; 1 << 20], 2).is_zero());
        assert!(ContentHash::of_children(&[], 8).is_zero());
    }

    #[test]
    fn trailing_zeroes_do_not_change_a_leaf_but_the_size_changes_the_root() {
        let short = ContentHash::of_leaf(b"disk");
        let mut padded = vec![0; LEAF_BYTES as usize];
        padded[..4].copy_from_slice(b"disk");
        assert_eq!(short, ContentHash::of_leaf(&padded));
        assert_ne!(ContentRoot::new(4, &short), ContentRoot::new(LEAF_BYTES, &short));
    }

    #[test]
    fn chunk_hashes_are_nodes_of_the_leaf_tree() {
        let content: Vec<u8> = (0..(1_u32 << 20)).map(|n| (n / 1000) as u8).collect();
        let leaves: Vec<_> =
            content.chunks(LEAF_BYTES as usize).map(ContentHash::of_leaf).collect();
        let chunks: Vec<_> = content.chunks(1 << 19).map(|c| ContentHash::of_chunk(c, 1)).collect();
        assert_eq!(ContentHash::of_children(&leaves, 2), ContentHash::of_children(&chunks, 1));
    }

    #[test]
    fn levels_follow_the_number_of_leaves() {
        for (size, expected) in
            [(0, 4), (1, 4), (16 * LEAF_BYTES, 4), (16 * LEAF_BYTES + 1, 5), (1 << 40, 22)]
        {
            assert_eq!(levels(size), expected, "{size}");
        }
    }

    /// Golden value, computed with `b3sum --derive-key` over "vmbackup" and its zero padding.
    #[test]
    fn the_leaf_hash_is_the_documented_one() {
        let leaf = ContentHash::of_leaf(b"vmbackup");
        assert_eq!(
            leaf.to_string(),
            "70f60f6818dbe19b15571a485acb4c97d636ab234a8b66b9fba34d1cc225fcc8"
        );
        assert_eq!(leaf.to_string().parse::<ContentHash>().unwrap(), leaf);
    }
}
