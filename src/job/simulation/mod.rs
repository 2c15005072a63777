//! The real jobs over a simulated VM, store and clock, with faults at every await point.
//!
//! ```text
//!  seed ─► program: back up, restore, forget, collect, check, wait; the VM writes, restarts, changes
//!            └─ each in a process of its own, in which any call to VM or store may fail, lose its
//!               answer, take hours, be interrupted, find QEMU dead, or be the last one (kill -9)
//!  after each: what was acknowledged is there; who ended by himself left nothing open
//!  at the end: every committed point restores bit-identical to a copy taken at its instant; the VM is
//!              not frozen, nothing of ours is left on it; a backup into each repository succeeds
//! ```
//!
//! A process is a runtime of one thread with a paused clock: killing it drops all of it at once, and a
//! wait of hours takes no time. *Replay is exact*: ids, salts, what the VM does and when faults come
//! follow from the seed, and `a_seed_replays_call_by_call` plays seeds twice. Only restores write real
//! files, from threads: the order of their calls to the store, and so the place of a fault in them, may
//! differ; nothing that follows depends on it.
//!
//! A store that breaks its promises (objects torn or lost after they were called durable) is played
//! in one seed of eight: there, damage may keep a point from restoring, and must be told, never
//! restored as something else.
//!
//! Counted and asserted at the end: each sort of fault at each await point, and every way a disk may
//! be read. Several hosts at a time on one repository are `repo::model`'s.

mod last;
mod late;
mod oracle;
mod steps;
mod tally;
mod wire;
mod world;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::dice::{Dice, simulate};
use crate::workers::Workers;
use tally::Tally;
use world::World;

/// Seeds of an ordinary run, at most two minutes on two cores.
const SEEDS: u64 = 10_000;

/// Seeds of a soak.
const SEEDS_OF_SOAK: u64 = 200_000;

/// Plays so many seeds instead, and tells what they did.
const COUNT_VARIABLE: &str = "VMBACKUP_SIMULATION_SEEDS";

/// Replays one seed, with every action on stderr.
const SEED_VARIABLE: &str = "VMBACKUP_SIMULATION_SEED";

/// What seeds played by one thread share.
struct Bench {
    directory: tempfile::TempDir,
    workers: Workers,
}

impl Bench {
    fn new() -> Self {
        // In memory: journals and locks are synced, and a few MiB of restored disks come and go.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Self { directory: directory.unwrap(), workers: Workers::inline().unwrap() }
    }
}

/// Whether every action is told on stderr.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trace {
    Off,
    On,
}

fn play(seed: u64, bench: &Bench, trace: Trace) -> Tally {
    simulate(seed, || {
        let mut world = World::new(Dice::new(seed), bench, trace);
        world.live();
        world.end();
        world.tally
    })
}

/// Plays seeds on all cores; the first that fails says how to play it again. What they added up to.
fn play_all(seeds: Range<u64>) -> Option<Tally> {
    if let Ok(seed) = std::env::var(SEED_VARIABLE) {
        play(seed.parse().unwrap(), &Bench::new(), Trace::On);
        return None;
    }
    let (next, failed) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let all = Mutex::new(Tally::default());
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let bench = Bench::new();
                let mut sum = Tally::default();
                while !failed.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        play(seed, &bench, Trace::Off)
                    }));
                    let Ok(tally) = played else {
                        failed.store(true, Ordering::Relaxed);
                        panic!(
                            "seed {seed} fails; replay it with: {SEED_VARIABLE}={seed} cargo test \
                             -p vmbackup --lib job::simulation::ten_thousand -- --nocapture"
                        );
                    };
                    sum.add(tally);
                }
                all.lock().unwrap_or_else(PoisonError::into_inner).add(sum);
            });
        }
    });
    Some(all.into_inner().unwrap_or_else(PoisonError::into_inner))
}

#[test]
#[allow(clippy::print_stderr)]
fn ten_thousand_seeds_never_make_a_wrong_point_nor_leave_anything_behind() {
    if let Ok(count) = std::env::var(COUNT_VARIABLE) {
        eprintln!("{:#?}", play_all(0..count.parse().unwrap()));
        return;
    }
    if let Some(tally) = play_all(0..SEEDS) {
        tally.assert_all_was_played();
    }
}

#[test]
#[ignore = "soak: hundreds of thousands of seeds"]
fn the_same_for_hundreds_of_thousands_of_seeds() {
    play_all(SEEDS..SEEDS + SEEDS_OF_SOAK);
}

#[test]
fn a_seed_replays_call_by_call() {
    let bench = Bench::new();
    for seed in 0..25 {
        let digest = || play(seed, &bench, Trace::Off).digest();
        assert_eq!(digest(), digest(), "seed {seed}");
    }
}
