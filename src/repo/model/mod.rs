//! Hosts, crashes and clocks against a simple model of what a repository must hold.
//!
//! ```text
//!  seed ─► actions of several processes: back up, forget, collect, hold and read, wait, suspend
//!            └─ any call to the store may fail, lose its answer, find the store full, be the last
//!               one of its process (kill -9), or be held up while other processes do things
//!  after each: what the model says is there restores byte for byte, what is forgotten stays so
//!  at the end: the collector has nothing left to wait for, and an empty repository holds nothing
//! ```
//!
//! One seed decides everything, down to ids and salts, and all of it runs on one thread. Views of
//! the repository are kept for as long as a process lives, so caches are as stale as can be.
//!
//! Deliberately not simulated: damage ([`super::damaged`] has its own tests), a process that is
//! killed after it was suspended for longer than a lease between its last renewal and the look at
//! the clock that follows its manifest (`docs/repository-format.md` names this moment).

mod oracle;
mod wire;
mod world;

use world::World;

use crate::dice::{Dice, simulate};

/// Seeds of an ordinary run: a few seconds.
const SEEDS: u64 = 60;

/// Seeds of a soak.
const SEEDS_OF_SOAK: u64 = 5000;

/// Replays one seed, with every action on stderr.
const SEED_VARIABLE: &str = "VMBACKUP_MODEL_SEED";

fn play(seed: u64, trace: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let life = async {
        let mut world = World::new(Dice::new(seed), trace).await;
        world.live().await;
        world.end().await;
    };
    simulate(seed, || runtime.block_on(life));
}

/// Plays seeds; the first that fails says how to play it again.
fn play_all(seeds: std::ops::Range<u64>) {
    if let Ok(seed) = std::env::var(SEED_VARIABLE) {
        return play(seed.parse().unwrap(), true);
    }
    for seed in seeds {
        let played = std::panic::catch_unwind(|| play(seed, false));
        assert!(
            played.is_ok(),
            "seed {seed} fails; replay it with: {SEED_VARIABLE}={seed} cargo test -p vmbackup --lib \
             repo::model::every_committed -- --nocapture"
        );
    }
}

#[test]
fn every_committed_point_restores_and_every_forgotten_one_is_freed() {
    play_all(0..SEEDS);
}

#[test]
#[ignore = "soak: thousands of seeds"]
fn the_same_for_thousands_of_seeds() {
    play_all(SEEDS..SEEDS + SEEDS_OF_SOAK);
}
