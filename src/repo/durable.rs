//! When chunks are durable, for whoever may let go of them then.
//!
//! A chunk is durable when its pack is: finished, and so synced, in the store. The packs of a run's
//! chunks are counted in the order they are begun; they end in nearly that order, a few of them at a
//! time. What is told is how many are durable without a gap from the first on: one number, whatever
//! the size of the disk, and a chunk says which number it waits for.
//!
//! Durable is not yet a point: that is the commit. A run that fails in between leaves garbage, and
//! what was let go of is gone with it.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

/// When a chunk that was given to a run is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It is: in a pack that was there before, or nothing but zeroes.
    Now,
    /// Once so many packs are ([`super::Run::durable_packs`]).
    Packs(u64),
    /// With the run's commit. It is the same as another chunk, of which nobody knows the pack yet.
    Commit,
}

/// Counts the packs of a packer that are durable.
#[derive(Debug, Default)]
pub(super) struct DurablePacks {
    /// Without a gap from the first.
    count: watch::Sender<u64>,
    /// Durable behind a gap; as many as are open at once. Locked for set operations only.
    ahead: Mutex<BTreeSet<u64>>,
}

impl DurablePacks {
    /// Takes in that pack `number`, counted from zero, is durable.
    pub(super) fn add(&self, number: u64) {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        ahead.insert(number);
        self.count.send_if_modified(|count| {
            let before = *count;
            while ahead.remove(count) {
                *count += 1;
            }
            *count != before
        });
    }

    /// The count, as it grows.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.count.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_count_when_all_before_them_are_durable() {
        let packs = DurablePacks::default();
        let count = packs.watch();
        for (number, expected) in [(1, 0), (2, 0), (0, 3), (4, 3), (3, 5)] {
            packs.add(number);
            assert_eq!(*count.borrow(), expected, "after pack {number}");
        }
    }
}
