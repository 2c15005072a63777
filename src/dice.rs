//! Numbers that follow from a seed: what decides in a simulation, and what it takes for random.
//!
//! Tests only. The second half stands in for the system's generator on the thread of a simulation,
//! so that ids and salts follow from the seed as well.

use std::cell::RefCell;

thread_local! {
    /// What ids and salts come from while a simulation runs on this thread.
    static SIMULATED: RefCell<Option<blake3::OutputReader>> = const { RefCell::new(None) };
}

/// Fills `bytes` from the seed of the simulation on this thread, if there is one.
pub(crate) fn fill_from_seed(bytes: &mut [u8]) -> bool {
    SIMULATED.with_borrow_mut(|source| source.as_mut().map(|source| source.fill(bytes)).is_some())
}

/// Whether a simulation runs on this thread: then nothing may run on another.
pub(crate) fn is_simulated() -> bool {
    SIMULATED.with_borrow(Option::is_some)
}

/// Does `work` with the system's generator replaced by one that follows from `seed`.
pub(crate) fn simulate<T>(seed: u64, work: impl FnOnce() -> T) -> T {
    SIMULATED.with_borrow_mut(|source| *source = Some(Dice::new(!seed).0));
    let done = work();
    SIMULATED.with_borrow_mut(|source| *source = None);
    done
}

/// Numbers that follow from a seed.
#[derive(Debug)]
pub(crate) struct Dice(blake3::OutputReader);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    /// Any number.
    pub(crate) fn any(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// One of `0..below`.
    pub(crate) fn below(&mut self, below: usize) -> usize {
        usize::try_from(self.any() % below as u64).expect("below a usize")
    }

    /// True once in `n` times.
    pub(crate) fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `choices`.
    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}
