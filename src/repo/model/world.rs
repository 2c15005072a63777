//! The processes, what they do, and what must be true afterwards.

use std::collections::BTreeMap;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::wire::{Disturbance, Paused, Wire};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange};
use crate::content::LEAF_BYTES;
use crate::control::Control;
use crate::dice::Dice;
use crate::error::{Kind, Result};
use crate::repo::gc::tests::{Bed, draft, point};
use crate::repo::points::PointName;
use crate::repo::store::ObjectStore;
use crate::repo::{CollectOptions, Credentials, Lease, Repository, Run, StoredDisk};
use crate::vm::PointId;
use crate::workers::Workers;

/// Chunks of a disk.
const CHUNKS: usize = 4;

/// Different chunks there are; 0 is zeroes.
const CONTENTS: usize = 9;

const PROCESSES: usize = 4;

/// Actions of a life.
const ACTIONS: usize = 40;

/// Actions within actions within actions.
const DEPTH_MAX: usize = 2;

const MINUTE: Duration = Duration::from_secs(60);

type Contents = [u8; CHUNKS];

/// A process: its way to the store, and its view of the repository, as old as itself.
pub(super) struct Process {
    wire: Arc<Wire>,
    /// Whether anything it did was disturbed: what runs beside it may have failed unseen.
    hurt: bool,
    /// None while it does something.
    pauses: Option<mpsc::Receiver<Paused>>,
    repository: Arc<Repository>,
}

/// A backup under way.
pub(super) struct Backup {
    process: usize,
    run: Run,
    base: Option<(PointId, StoredDisk, Contents)>,
    written: Option<(StoredDisk, Contents)>,
    suspended: bool,
}

/// A reader of what was there when it began.
pub(super) struct Hold {
    process: usize,
    lease: Lease,
    points: Vec<PointId>,
    suspended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It was tried to store or forget it: whether it is there is seen at the next look, and final.
    Unsure,
    There,
    /// Never stored, or forgotten.
    Gone,
}

pub(super) struct Point {
    pub(super) stored: StoredDisk,
    pub(super) contents: Contents,
    pub(super) fate: Fate,
}

pub(super) struct World {
    pub(super) dice: Dice,
    trace: bool,
    pub(super) bed: Bed,
    pub(super) processes: BTreeMap<usize, Process>,
    pub(super) backups: Vec<Backup>,
    pub(super) holds: Vec<Hold>,
    pub(super) points: BTreeMap<PointId, Point>,
    next: u8,
    next_process: usize,
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

impl World {
    pub(super) async fn new(dice: Dice, trace: bool) -> Self {
        let bed = Bed { workers: Workers::inline().unwrap(), ..Bed::new().await };
        bed.pass(1000 * 24 * 60 * MINUTE);
        Self {
            dice,
            trace,
            bed,
            processes: BTreeMap::new(),
            backups: Vec::new(),
            holds: Vec::new(),
            points: BTreeMap::new(),
            next: 0,
            next_process: 0,
        }
    }

    pub(super) async fn live(&mut self) {
        for _ in 0..PROCESSES {
            self.start().await;
        }
        for _ in 0..ACTIONS {
            self.act(0).await;
            self.look().await;
        }
    }

    #[allow(clippy::print_stderr)]
    pub(super) fn note(&self, depth: usize, what: impl FnOnce() -> String) {
        if self.trace {
            let now = crate::clock::Clock::now(&*self.bed.clock);
            eprintln!("{now} {}{}", "  ".repeat(depth), what());
        }
    }

    fn act(&mut self, depth: usize) -> Boxed<'_, ()> {
        Box::pin(async move {
            self.bed.pass(Duration::from_secs(1));
            if self.processes.len() < PROCESSES && self.dice.once_in(2) {
                return self.start().await;
            }
            let idle = self.processes.iter().filter(|(_, p)| p.pauses.is_some());
            let idle: Vec<usize> = idle.map(|(id, _)| *id).collect();
            if idle.is_empty() {
                return;
            }
            let process = idle[self.dice.below(idle.len())];
            match self.dice.below(26) {
                0..=3 => self.begin(process, depth).await,
                4..=11 => self.go_on(&idle, depth).await,
                12..=14 => self.forget(process, depth).await,
                15..=18 => self.collect(process, depth).await,
                19 | 20 => self.hold(process, depth).await,
                21 | 22 => self.read(&idle).await,
                23 | 24 => self.wait(&idle, depth).await,
                _ => self.misfortune(process, depth),
            }
        })
    }

    async fn start(&mut self) {
        let (wire, pauses) = Wire::new(Arc::clone(&self.bed.store));
        let store = Arc::clone(&wire) as Arc<dyn ObjectStore>;
        let workers = self.bed.workers.clone();
        let repository = Repository::open(store, &Credentials::None, workers).await.unwrap();
        let process =
            Process { wire, hurt: false, pauses: Some(pauses), repository: Arc::new(repository) };
        self.processes.insert(self.next_process, process);
        self.next_process += 1;
    }

    /// Does `work` of a process; others act when it is held up. Whether it was disturbed, too.
    async fn attend<T>(
        &mut self,
        (process, depth): (usize, usize),
        work: impl Future<Output = T>,
    ) -> (T, bool) {
        let doing = self.processes.get_mut(&process).expect("it is there");
        let mut pauses = doing.pauses.take().expect("it is idle");
        let wire = Arc::clone(&doing.wire);
        if self.dice.once_in(3) {
            let calls =
                if self.dice.once_in(2) { self.dice.below(12) } else { self.dice.below(80) };
            let kind = match self.dice.below(12) {
                1 => Disturbance::Full,
                2 => Disturbance::LoseAnswer,
                3 => Disturbance::DieBefore,
                4 => Disturbance::DieAfter,
                5.. if depth < DEPTH_MAX => Disturbance::Pause,
                _ => Disturbance::Fail,
            };
            self.note(depth, || format!("process {process}: {kind:?} at call {calls}"));
            wire.disturb(calls, kind);
        }
        let mut work = pin!(work);
        let done = loop {
            let go = tokio::select! {
                biased;
                go = pauses.recv() => go,
                done = &mut work => break done,
            };
            for _ in 0..=self.dice.below(4) {
                self.act(depth + 1).await;
            }
            // It may have given the call up.
            let _ = go.expect("the wire is there").send(());
        };
        let doing = self.processes.get_mut(&process).expect("it is there");
        doing.hurt |= wire.settle();
        let disturbed = doing.hurt;
        // Calls that nobody waits for any more must not wait for us.
        while let Ok(go) = pauses.try_recv() {
            let _ = go.send(());
        }
        if wire.is_dead() {
            self.bury(process);
        } else {
            self.processes.get_mut(&process).expect("it is there").pauses = Some(pauses);
        }
        (done, disturbed)
    }

    fn bury(&mut self, process: usize) {
        self.processes.remove(&process);
        self.backups.retain(|backup| backup.process != process);
        self.holds.retain(|hold| hold.process != process);
    }

    fn repository(&self, process: usize) -> Arc<Repository> {
        Arc::clone(&self.processes[&process].repository)
    }

    async fn begin(&mut self, process: usize, depth: usize) {
        let repository = self.repository(process);
        let work = async move {
            let run = repository.begin_run().await?;
            let names = repository.point_names(None).await?;
            Ok((run, names))
        };
        let (begun, disturbed) = self.attend((process, depth), work).await;
        self.note(depth, || format!("process {process} begins: {}", outcome(&begun)));
        let Some((run, names)) = expect(begun, disturbed, &[]) else { return };
        if !self.processes.contains_key(&process) {
            return;
        }
        let base = match names.last() {
            Some(PointName { point, .. }) if !self.dice.once_in(3) => {
                let Point { stored, contents, .. } = &self.points[point];
                Some((*point, stored.clone(), *contents))
            }
            _ => None,
        };
        self.backups.push(Backup { process, run, base, written: None, suspended: false });
    }

    /// A backup writes, commits, or is given up.
    async fn go_on(&mut self, idle: &[usize], depth: usize) {
        let ready = (0..self.backups.len()).filter(|at| idle.contains(&self.backups[*at].process));
        let ready: Vec<usize> = ready.collect();
        if ready.is_empty() {
            return;
        }
        let backup = self.backups.remove(ready[self.dice.below(ready.len())]);
        if self.dice.once_in(12) {
            let Backup { process, run, .. } = backup;
            let (done, disturbed) = self.attend((process, depth), run.end()).await;
            expect(done, disturbed, &[]);
        } else if backup.written.is_none() {
            self.write(backup, depth).await;
        } else {
            self.commit(backup, depth).await;
        }
    }

    async fn write(&mut self, mut backup: Backup, depth: usize) {
        let mut contents = backup.base.as_ref().map_or([0; CHUNKS], |base| base.2);
        for content in &mut contents {
            if backup.base.is_none() || self.dice.once_in(3) {
                *content = u8::try_from(self.dice.below(CONTENTS)).expect("a few");
            }
        }
        let base = backup.base.as_ref().map(|base| (base.1.clone(), base.2));
        let work = write(&backup.run, contents, base);
        let (process, base) = (backup.process, backup.base.as_ref().map(|base| base.0));
        let (written, disturbed) = self.attend((process, depth), work).await;
        self.note(depth, || {
            format!("process {process} writes {contents:?} on {base:?}: {}", outcome(&written))
        });
        // What it keeps from may be gone once it has lost its lease.
        let lost = written.is_err() && backup.run.renew().await.is_err();
        let Some(stored) = expect(written, disturbed || lost, &[]) else { return };
        if self.processes.contains_key(&process) {
            backup.written = Some((stored, contents));
            self.backups.push(backup);
        }
    }

    async fn commit(&mut self, backup: Backup, depth: usize) {
        let Backup { process, run, base, written, .. } = backup;
        let (stored, contents) = written.expect("it was written");
        self.next += 1;
        let id = point(self.next);
        let base = base.map(|base| base.0);
        let fate = Fate::Unsure;
        self.points.insert(id, Point { stored: stored.clone(), contents, fate });
        let draft = draft(&stored, base);
        let work = async move { run.commit(id, draft).await };
        let (committed, disturbed) = self.attend((process, depth), work).await;
        self.note(depth, || {
            format!("process {process} commits {}: {}", self.next, outcome(&committed))
        });
        let point = self.points.get_mut(&id).expect("it was put there");
        // Forgotten in the meantime already, or looked for and not found.
        let early = point.fate == Fate::Gone;
        if expect(committed, disturbed, &[Kind::Timeout, Kind::NoBase]).is_some() && !early {
            point.fate = Fate::There;
        }
    }

    async fn forget(&mut self, process: usize, depth: usize) {
        let there = self.points.iter().filter(|(_, point)| point.fate == Fate::There);
        let there: Vec<PointId> = there.map(|(id, _)| *id).collect();
        if there.is_empty() {
            return;
        }
        let id = there[self.dice.below(there.len())];
        self.points.get_mut(&id).expect("it is there").fate = Fate::Unsure;
        let repository = self.repository(process);
        let work = async move { repository.forget(id).await };
        let (forgotten, disturbed) = self.attend((process, depth), work).await;
        self.note(depth, || format!("process {process} forgets {id}: {}", outcome(&forgotten)));
        if expect(forgotten, disturbed, &[]).is_some() {
            self.points.get_mut(&id).expect("it is there").fate = Fate::Gone;
        }
    }

    async fn collect(&mut self, process: usize, depth: usize) {
        let repack_dead_percent = [1, 20, 40, 100][self.dice.below(4)];
        let repository = self.repository(process);
        let options = CollectOptions { repack_dead_percent, ..CollectOptions::default() };
        let work = async move { repository.collect(options, &Control::new()).await };
        let (collected, disturbed) = self.attend((process, depth), work).await;
        self.note(depth, || format!("process {process} collects: {collected:?}"));
        expect(collected, disturbed, &[Kind::Busy]);
    }

    async fn hold(&mut self, process: usize, depth: usize) {
        let repository = self.repository(process);
        let work = async move {
            let lease = repository.hold().await?;
            Ok((lease, repository.point_names(None).await?))
        };
        let (held, disturbed) = self.attend((process, depth), work).await;
        let Some((lease, names)) = expect(held, disturbed, &[]) else { return };
        if self.processes.contains_key(&process) {
            let points = names.into_iter().map(|name| name.point).collect();
            self.note(depth, || format!("process {process} holds {points:?}"));
            self.holds.push(Hold { process, lease, points, suspended: false });
        }
    }

    /// A reader reads what was there when it began, forgotten since or not.
    async fn read(&mut self, idle: &[usize]) {
        let mut holds = std::mem::take(&mut self.holds);
        for at in (0..holds.len()).rev() {
            if !idle.contains(&holds[at].process) || self.dice.once_in(3) {
                continue;
            }
            let hold = &holds[at];
            if hold.lease.check().await.is_err() {
                holds.remove(at);
                continue;
            }
            let repository = self.repository(hold.process);
            for id in &hold.points {
                let Point { stored, contents, .. } = &self.points[id];
                self.note(0, || format!("process {} reads {id}", hold.process));
                assert_holds(&repository, stored, *contents).await;
            }
        }
        self.holds = holds;
    }

    /// Time passes: who is not suspended renews its lease.
    async fn wait(&mut self, idle: &[usize], depth: usize) {
        let minutes = [1, 5, 14, 20, 50, 90][self.dice.below(6)];
        self.note(depth, || format!("{minutes} minutes pass"));
        for _ in 0..minutes {
            self.bed.pass(MINUTE);
            if self.dice.once_in(4) {
                continue;
            }
            for backup in &self.backups {
                if idle.contains(&backup.process) && !backup.suspended {
                    // It finds out by itself that it lost its lease.
                    let _ = backup.run.renew().await;
                }
            }
            for hold in &self.holds {
                if idle.contains(&hold.process) && !hold.suspended {
                    let _ = hold.lease.check().await;
                }
            }
        }
    }

    fn misfortune(&mut self, process: usize, depth: usize) {
        match self.dice.below(4) {
            0 => {
                self.note(depth, || format!("process {process} is killed"));
                self.processes[&process].wire.kill();
                self.bury(process);
            }
            1 => {
                self.note(depth, || format!("process {process} is suspended"));
                let of = |id: usize| id == process;
                self.backups.iter_mut().filter(|b| of(b.process)).for_each(|b| b.suspended = true);
                self.holds.iter_mut().filter(|h| of(h.process)).for_each(|h| h.suspended = true);
            }
            // At the deepest the clock would step during a renewal.
            n if depth == 0 => {
                let by = MINUTE * u32::try_from(1 + self.dice.below(300)).expect("hours");
                self.note(depth, || {
                    format!("the clock steps {} by {by:?}", ["", "", "back", "on"][n])
                });
                if n == 2 {
                    self.bed.clock.step_back(by);
                } else {
                    self.bed.pass(by);
                }
            }
            _ => {}
        }
    }
}

fn outcome<T>(result: &Result<T>) -> String {
    result.as_ref().map_or_else(|error| format!("{error:?}"), |_| "done".to_owned())
}

/// What came of something that may fail only if it was disturbed, or in one of these ways.
fn expect<T>(result: Result<T>, disturbed: bool, kinds: &[Kind]) -> Option<T> {
    match result {
        Ok(done) => Some(done),
        Err(error) => {
            assert!(disturbed || kinds.contains(&error.kind()), "{error:?}");
            None
        }
    }
}

/// Incompressible in part, so that the space it takes is seen.
fn chunk(content: u8) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(LEAF_BYTES).unwrap()];
    if content > 0 {
        blake3::Hasher::new().update(&[content]).finalize_xof().fill(&mut bytes[..10_000]);
    }
    bytes
}

async fn write(
    run: &Run,
    contents: Contents,
    base: Option<(StoredDisk, Contents)>,
) -> Result<StoredDisk> {
    let writer = run.disk_writer(CHUNKS as u64 * LEAF_BYTES, base.as_ref().map(|base| &base.0));
    for (at, content) in contents.iter().enumerate() {
        let range = ByteRange::new(at as u64 * LEAF_BYTES, LEAF_BYTES);
        if base.as_ref().is_some_and(|base| base.1[at] == *content) {
            writer.keep(range).await?;
        } else {
            writer.write(range.offset(), Buffer::unbudgeted(chunk(*content))).await?;
        }
    }
    Ok(writer.finish().await?.0)
}

pub(super) async fn assert_holds(repository: &Repository, stored: &StoredDisk, contents: Contents) {
    let reader = repository.open_disk(stored).await.unwrap();
    let len = CHUNKS * usize::try_from(LEAF_BYTES).unwrap();
    let read = reader.read(0, Buffer::unbudgeted(vec![0xee; len])).await.unwrap();
    assert!(read[..] == contents.map(chunk).concat()[..], "{contents:?}");
}
