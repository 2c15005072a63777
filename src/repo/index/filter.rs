//! A Bloom filter over blob ids: says for nearly every new chunk, without any read, that it is new.

use crate::repo::seal::BlobId;

/// Bits per id: with [`PROBES`] about 1 % of absent ids pass.
const BITS_PER_ID: u64 = 10;

/// Probes per id.
const PROBES: u64 = 7;

/// A set of ids that may answer yes wrongly, never no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    words: Vec<u64>,
}

impl Filter {
    /// An empty filter for `ids` ids.
    pub fn for_count(ids: u64) -> Self {
        let words = (ids * BITS_PER_ID).div_ceil(64).max(1);
        Self { words: vec![0; usize::try_from(words).expect("a filter fits memory")] }
    }

    /// Adds `id`.
    pub fn insert(&mut self, id: &BlobId) {
        for bit in probes(id, self.bits()) {
            let (word, bit) = place(bit);
            self.words[word] |= bit;
        }
    }

    /// Whether `id` may be in the set.
    pub fn may_contain(&self, id: &BlobId) -> bool {
        probes(id, self.bits()).all(|bit| {
            let (word, bit) = place(bit);
            self.words[word] & bit != 0
        })
    }

    fn bits(&self) -> u64 {
        self.words.len() as u64 * 64
    }

    /// Stored form: the words, little-endian.
    pub fn encode(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Reads the stored form; `None` when it is not one.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        let words: Vec<_> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        (rest.is_empty() && !words.is_empty()).then_some(Self { words })
    }

    /// Memory it takes.
    pub fn bytes(&self) -> usize {
        self.words.len() * 8
    }
}

/// The bits of `id` in a filter of so many. Ids are keyed hashes, so two of their words serve for
/// double hashing as they are.
pub(super) fn probes(id: &BlobId, bits: u64) -> impl Iterator<Item = u64> + use<> {
    let word = |at: usize| u64::from_le_bytes(id.0[at..at + 8].try_into().expect("8 bytes"));
    let (first, step) = (word(8), word(16) | 1);
    (0..PROBES).map(move |n| first.wrapping_add(n.wrapping_mul(step)) % bits)
}

/// Number and mask of a bit's word.
fn place(bit: u64) -> (usize, u64) {
    (usize::try_from(bit / 64).expect("a filter fits memory"), 1 << (bit % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> BlobId {
        BlobId(*blake3::hash(&n.to_le_bytes()).as_bytes())
    }

    #[test]
    fn a_filter_never_denies_what_it_holds_and_seldom_admits_what_it_does_not() {
        let mut filter = Filter::for_count(10_000);
        (0..10_000).for_each(|n| filter.insert(&id(n)));
        let filter = Filter::decode(&filter.encode()).unwrap();
        assert!((0..10_000).all(|n| filter.may_contain(&id(n))));
        let wrong = (10_000..110_000).filter(|n| filter.may_contain(&id(*n))).count();
        assert!(wrong < 2_000, "{wrong} of 100000 absent ids pass");
    }
}
