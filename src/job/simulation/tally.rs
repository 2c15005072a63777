//! What seeds did, added up: a simulation that tests nothing must fail.

use std::collections::BTreeMap;

use crate::platform::simulated::life::{Biography, Place};

/// How often each must have happened in all seeds together.
const FLOORS: [(&str, u64); 17] = [
    ("recovery: done", 20_000),
    ("backup: committed", 15_000),
    ("backup: failed", 5_000),
    ("backup: killed", 1_500),
    ("backup: killed after its commit", 100),
    ("disk: incremental", 6_000),
    ("disk: audit found a lie", 80),
    ("disk: full, resized", 200),
    ("disk: full, image-replaced", 50),
    ("disk: full, bitmap-missing", 200),
    ("disk: full, bitmap-inconsistent", 200),
    ("disk: full, bitmap-not-recording", 40),
    ("restore: done", 300),
    ("restore: failed", 5),
    ("forget: done", 500),
    ("gc: done", 800),
    ("store: broke its promise", 100),
];

/// Calls that only some backups make, or some that were killed.
const CALLS: [(Place, u64); 2] = [("guest: pause", 2_000), ("guest: resume what was left", 50)];

/// Calls from which on a place must have seen every sort of fault.
const CALLS_MIN: u64 = 50_000;

/// Faults that can come at every place.
const EVERYWHERE: [&str; 5] = ["fail", "lose-answer", "die-before", "die-after", "delay"];

/// Counters, and a digest of everything that happened.
#[derive(Default)]
pub(super) struct Tally {
    counts: BTreeMap<String, u64>,
    calls: BTreeMap<Place, u64>,
    faults: BTreeMap<(Place, &'static str), u64>,
    digest: blake3::Hasher,
}

impl Tally {
    pub(super) fn count(&mut self, what: impl Into<String>) {
        *self.counts.entry(what.into()).or_default() += 1;
    }

    /// A process is over.
    pub(super) fn bury(&mut self, biography: &Biography) {
        for (place, calls) in &biography.calls {
            *self.calls.entry(place).or_default() += *calls as u64;
        }
        for (place, fault) in &biography.met {
            *self.faults.entry((place, fault.word())).or_default() += 1;
        }
    }

    pub(super) fn note(&mut self, what: &str) {
        self.digest.update(what.as_bytes());
    }

    pub(super) fn digest(&self) -> blake3::Hash {
        self.digest.finalize()
    }

    pub(super) fn add(&mut self, other: Self) {
        for (what, count) in other.counts {
            *self.counts.entry(what).or_default() += count;
        }
        for (place, count) in other.calls {
            *self.calls.entry(place).or_default() += count;
        }
        for (fault, count) in other.faults {
            *self.faults.entry(fault).or_default() += count;
        }
    }

    /// Every floor is reached, and no await point was spared.
    pub(super) fn assert_all_was_played(&self) {
        let count = |what: &str| self.counts.get(what).copied().unwrap_or(0);
        let short = FLOORS.iter().filter(|(what, floor)| count(what) < *floor);
        let short: Vec<_> = short.map(|(what, floor)| (what, count(what), floor)).collect();
        assert!(short.is_empty(), "too few (found, wanted): {short:?}\n{self:?}");
        let calls = |place: Place| self.calls.get(place).copied().unwrap_or(0);
        let rare: Vec<_> = CALLS.iter().filter(|(place, floor)| calls(place) < *floor).collect();
        assert!(rare.is_empty(), "too few calls: {rare:?}\n{self:?}");
        let often = self.calls.iter().filter(|(_, calls)| **calls >= CALLS_MIN);
        let pairs = often.flat_map(|(place, _)| EVERYWHERE.map(|word| (*place, word)));
        let spared: Vec<_> = pairs.filter(|pair| !self.faults.contains_key(pair)).collect();
        assert!(spared.is_empty(), "await points without a fault: {spared:?}\n{self:?}");
    }
}

impl std::fmt::Debug for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tally")
            .field("counts", &self.counts)
            .field("calls", &self.calls)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}
