//! The world of a seed: a VM, two repositories, a clock, and the processes that come and go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;

use super::tally::Tally;
use super::wire::{Kept, Wire};
use super::{Bench, Trace};
use crate::clock::{Clock, Timestamp};
use crate::control::Control;
use crate::dice::Dice;
use crate::error::{Error, Result};
use crate::job::{Env, Repository, Surroundings};
use crate::platform::simulated::guest::{Change, Guest};
use crate::platform::simulated::life::{At, Biography, Due, Fault, Happening, Life, Place};
use crate::platform::simulated::time::{Time, WorldClock};
use crate::platform::simulated::{Shared, Simulated};
use crate::repo::config::ChunkSize;
use crate::repo::keys::{Credentials, InitOptions, Kdf};
use crate::repo::store::ObjectStore;
use crate::repo::store::directory::ANSWER;
use crate::repo::store::memory::MemoryStore;
use crate::vm::PointId;

/// Repositories of the VM.
pub(super) const DEPOTS: usize = 2;

/// Calls of a backup, about.
const CALLS: usize = 160;

/// Actions of a seed.
const ACTIONS: Range = (4, 6);

/// At least so many, and below so many more.
type Range = (usize, usize);

/// Seconds; past the budget of a freeze, the life of a lease, and all patience.
const DELAYS: [u64; 5] = [1, 30, 10 * 60, 20 * 60, 3 * 3600];

const MINUTE: Duration = Duration::from_secs(60);

/// Whether a point is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It was tried to store or forget it: the next look tells, for good.
    Unsure,
    There,
    /// Never stored, or forgotten.
    Gone,
}

/// A repository.
pub(super) struct Depot {
    pub(super) kept: Kept,
    /// As it is in requests and names.
    pub(super) id: String,
    pub(super) points: BTreeMap<PointId, Fate>,
    /// Whether the store broke its promises.
    pub(super) is_damaged: bool,
    /// Whether nothing stands between the next backup and an incremental of every disk.
    pub(super) is_ready: bool,
}

/// A process, as the job in it sees it.
pub(super) struct Process {
    pub(super) env: Env,
    life: Arc<Life>,
    time: Arc<Time>,
    guest: Shared,
    stores: Vec<Arc<dyn ObjectStore>>,
}

impl Process {
    pub(super) async fn open(&self, depot: usize) -> Result<Repository> {
        let store = Arc::clone(&self.stores[depot]);
        Repository::open(store, &Credentials::None, self.env.workers.clone()).await
    }

    pub(super) async fn platform(&self) -> Result<Simulated> {
        Simulated::connect(&self.guest, &self.life, &self.time, self.env.journals()).await
    }

    pub(super) fn surroundings(&self) -> Surroundings<'_> {
        (&self.env, &self.life.control)
    }

    pub(super) fn control(&self) -> &Control {
        &self.life.control
    }
}

/// How a process ended.
pub(super) struct Ended<T> {
    /// None when it was killed.
    pub(super) result: Option<Result<T>>,
    pub(super) life: Biography,
}

impl<T> Ended<T> {
    pub(super) fn error(&self) -> Option<&Error> {
        self.result.as_ref().and_then(|result| result.as_ref().err())
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.result, Some(Ok(_)))
    }

    pub(super) fn met(&self, fault: Fault) -> bool {
        self.life.met.iter().any(|(_, met)| *met == fault)
    }

    pub(super) fn was_disturbed(&self) -> bool {
        !self.life.met.is_empty()
    }

    /// Whether a fault came at one of these places.
    pub(super) fn met_at(&self, places: &[Place]) -> bool {
        self.life.met.iter().any(|(place, _)| places.contains(place))
    }
}

pub(super) struct World<'a> {
    pub(super) dice: Dice,
    pub(super) bench: &'a Bench,
    pub(super) time: Arc<Time>,
    pub(super) guest: Shared,
    pub(super) depots: Vec<Depot>,
    pub(super) tally: Tally,
    trace: Trace,
    /// Calls of earlier processes: where faults can come.
    seen: BTreeMap<Place, usize>,
    /// Whether stores may break their promises.
    lying: bool,
    /// Whether the process that runs replays call by call.
    pub(super) is_exact: bool,
}

impl<'a> World<'a> {
    pub(super) fn new(mut dice: Dice, bench: &'a Bench, trace: Trace) -> Self {
        let start: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let time = Time::new(start);
        let guest = Shared::new(Guest::new(Dice::new(dice.any())));
        let lying = dice.once_in(8);
        // Of other worlds.
        let _ = std::fs::remove_dir_all(bench.directory.path().join("state"));
        let mut world = Self {
            dice,
            bench,
            time,
            guest,
            depots: Vec::new(),
            tally: Tally::default(),
            trace,
            seen: BTreeMap::new(),
            lying,
            is_exact: true,
        };
        for _ in 0..DEPOTS {
            let depot = world.new_depot(start);
            world.depots.push(depot);
        }
        world
    }

    fn new_depot(&self, now: Timestamp) -> Depot {
        let clock = Arc::new(WorldClock { time: Arc::clone(&self.time), wrong_by_ms: 0 });
        let store = Arc::new(MemoryStore::new(clock as Arc<dyn Clock>));
        let options = InitOptions { chunk: ChunkSize::DEFAULT, kdf: Kdf::FOR_TESTS, now };
        let init = Repository::init(
            Arc::clone(&store) as Arc<dyn ObjectStore>,
            &Credentials::None,
            options,
            self.bench.workers.clone(),
        );
        let id = runtime(true).block_on(init).unwrap().id();
        let kept = Kept::new(store);
        Depot { kept, id, points: BTreeMap::new(), is_damaged: false, is_ready: false }
    }

    pub(super) fn live(&mut self) {
        for _ in 0..ACTIONS.0 + self.dice.below(ACTIONS.1) {
            for _ in 0..self.dice.below(3) {
                self.guest.lock().write();
            }
            match self.dice.below(20) {
                0..=9 => self.back_up(),
                10 => self.restore(),
                11 | 12 => self.forget(),
                13 => self.collect(),
                14 if self.dice.once_in(2) => self.check(),
                14 => self.recover_vm(),
                15 => self.wait(),
                _ => self.change_vm(),
            }
        }
    }

    fn wait(&mut self) {
        let minutes = self.dice.one_of(&[1, 20, 50, 300]);
        self.note(|| format!("{minutes} minutes pass"));
        self.time.pass(MINUTE * minutes);
    }

    fn change_vm(&mut self) {
        let change = match self.dice.below(4) {
            0 => Change::WrittenUnseen,
            _ => self.dice.one_of(&Change::ALL),
        };
        let changed = self.guest.lock().change(change);
        self.note(|| format!("the VM: {change:?}: {changed}"));
        if changed {
            self.tally.count(format!("vm: {change:?}"));
            self.depots.iter_mut().for_each(|depot| depot.is_ready = false);
        }
    }

    #[allow(clippy::print_stderr)]
    pub(super) fn note(&mut self, what: impl FnOnce() -> String) {
        let what = what();
        if self.trace == Trace::On {
            let now = Timestamp::from_millisecond(self.time.now_ms()).unwrap();
            eprintln!("{now} {what}");
        }
        if self.is_exact {
            self.tally.note(&what);
        }
    }

    /// What goes wrong in the next process, if anything.
    pub(super) fn trouble(&mut self) -> Vec<Due> {
        let count = self.dice.one_of(&[0, 0, 1, 1, 1, 2]);
        (0..count).map(|_| self.due()).collect()
    }

    fn due(&mut self) -> Due {
        let Self { dice, seen, .. } = self;
        if seen.is_empty() || dice.once_in(2) {
            let at = At::Call(dice.below(CALLS));
            return Due { at, fault: self.fault() };
        }
        // Each place as often as any other: a manifest is written once, and chunks are read often.
        let place = dice.below(seen.len());
        let (place, calls) = seen.iter().nth(place).expect("one of these");
        let at = At::Place(place, dice.below(*calls));
        let read = ["guest: extents", "guest: read", "guest: open export"];
        if read.contains(place) && dice.once_in(2) {
            let ends = [Happening::JobEndsUnseen, Happening::JobEnds, Happening::ScratchFills];
            return Due { at, fault: Fault::Elsewhere(dice.one_of(&ends)) };
        }
        Due { at, fault: self.fault() }
    }

    fn fault(&mut self) -> Fault {
        let dice = &mut self.dice;
        let kinds = if self.lying { 19 } else { 16 };
        match dice.below(kinds) {
            0..=2 => Fault::Fail,
            3..=5 => Fault::LoseAnswer,
            6 | 7 => Fault::DieBefore,
            8 | 9 => Fault::DieAfter,
            10 | 11 => Fault::Delay(Duration::from_secs(dice.one_of(&DELAYS))),
            12 => Fault::Cancel,
            13 | 14 => Fault::Elsewhere(Happening::QemuDies),
            15 => Fault::Elsewhere(Happening::JobEndsUnseen),
            16 => Fault::Elsewhere(Happening::TornWrite),
            _ => Fault::Elsewhere(Happening::LostObject),
        }
    }

    /// Runs `work` in a process of its own, that has to do with one repository.
    pub(super) fn run<T>(
        &mut self,
        (depot, due): (usize, Vec<Due>),
        work: impl AsyncFnOnce(&Process) -> Result<T>,
    ) -> Ended<T> {
        let (guest, kept) = (self.guest.clone(), self.depots[depot].kept.clone());
        let elsewhere = move |happening| {
            guest.lock().meet(happening);
            kept.meet(happening);
        };
        let life = Life::new(due, Box::new(elsewhere));
        let process = self.process(&life);
        let (runtime, time) = (runtime(self.is_exact), Arc::clone(&self.time));
        let is_exact = self.is_exact;
        let result = runtime.block_on(async {
            if is_exact {
                time.begin();
            }
            let result = tokio::select! {
                biased;
                () = life.death() => None,
                done = work(&process) => Some(done),
            };
            time.end();
            result
        });
        // Tasks of its own die with it.
        drop((runtime, process));
        let ended = Ended { result, life: life.biography() };
        self.bury(depot, &ended.life);
        ended
    }

    fn process(&mut self, life: &Arc<Life>) -> Process {
        let store = |depot: &Depot| {
            let wire = Wire { kept: depot.kept.clone(), life: Arc::clone(life) };
            Arc::new(wire) as Arc<dyn ObjectStore>
        };
        let hours = self.dice.one_of(&[0, 0, -3, 5]);
        let clock = WorldClock { time: Arc::clone(&self.time), wrong_by_ms: hours * 3_600_000 };
        let root = self.bench.directory.path();
        let env = Env {
            clock: Arc::new(clock),
            workers: self.bench.workers.clone(),
            zone: TimeZone::UTC,
            state_dir: root.join(if self.is_exact { "state" } else { "restores" }),
            runtime_dir: root.join("run"),
            guardian: None,
            cache_dir: root.join("cache"),
            repository_answer: ANSWER,
            probe: None,
        };
        Process {
            env,
            life: Arc::clone(life),
            time: Arc::clone(&self.time),
            guest: self.guest.clone(),
            stores: self.depots.iter().map(store).collect(),
        }
    }

    fn bury(&mut self, depot: usize, life: &Biography) {
        self.tally.bury(life);
        if self.is_exact {
            for (place, calls) in &life.calls {
                let seen = self.seen.entry(place).or_default();
                *seen = (*seen).max(*calls);
            }
            self.tally.note(&format!("{:?}", life.calls));
        }
        for (place, fault) in &life.met {
            use Happening::{LostObject, TornIndex, TornWrite};
            if let Fault::Elsewhere(TornWrite | LostObject | TornIndex) = fault {
                self.depots[depot].is_damaged = true;
                self.tally.count("store: broke its promise");
            }
            self.note(|| format!("  {fault:?} at '{place}'"));
        }
        if life.is_dead {
            self.guest.lock().lose_process();
        }
        if self.is_exact && !life.met.is_empty() {
            // What is left of it may cost the next backup its base.
            self.depots.iter_mut().for_each(|depot| depot.is_ready = false);
        }
    }
}

/// A clock that is paused would run away while threads work.
fn runtime(is_paused: bool) -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(is_paused).build().unwrap()
}
