//! Leases: who is at work in the repository, so that the collector waits for them.
//!
//! ```text
//!  runs/<kind>-<run id>/00000000     the run began
//!  runs/<kind>-<run id>/00000001 …   it was still alive (a new object each: nothing is rewritten)
//!  runs/<kind>-<run id>/end          it is over, one way or the other
//! ```
//!
//! Everything is judged by the store's time stamps. The collector takes a run for dead once its
//! newest object is older than [`LEASE`]. A run takes itself for dead much earlier, when two of its
//! renewals are more than [`LEASE_OF_WRITER`] apart: the difference pays for the time between the
//! stamp of an object and the moment others see it. A run that lost its lease never commits.
//!
//! `docs/repository-format.md` has the whole protocol of writers and collector with the reasons why
//! a committed point can never miss a chunk; `gc` is its other half.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::seal::{Keys, ObjectType, random};
use super::store::{Folder, ObjectName, ObjectStore, for_each, hex};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};

/// After this long without a renewal the collector takes a run for dead.
pub const LEASE: Duration = Duration::from_secs(30 * 60);

/// After this long without a renewal a run takes itself for dead.
pub const LEASE_OF_WRITER: Duration = Duration::from_secs(15 * 60);

/// How often a run renews its lease; a failed renewal is tried again after a tenth of it.
const RENEW_EVERY: Duration = Duration::from_secs(5 * 60);

/// What a run is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RunKind {
    /// It adds a point.
    Backup,
    /// It reads points for a long time (serves them).
    Read,
    /// It collects garbage: one at a time.
    Collect,
}

impl RunKind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Backup => "backup-",
            Self::Read => "read-",
            Self::Collect => "gc-",
        }
    }
}

/// A lease that is held. Renewed in the background until [`Lease::end`] or until it is dropped
/// (then it lapses by itself).
#[derive(Debug)]
pub struct Lease {
    held: Arc<Held>,
    renewing: JoinHandle<()>,
}

#[derive(Debug)]
struct Held {
    store: Arc<dyn ObjectStore>,
    keys: Arc<Keys>,
    /// `backup-<32 hex>`.
    run: String,
    started: Timestamp,
    // Held across the renewal it counts: two at once would tell a wrong gap.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    next: u32,
    renewed: Timestamp,
    lost: bool,
}

impl State {
    fn check(&self) -> Result<Timestamp> {
        if self.lost {
            let message = "this run did not get through to the repository for too long";
            return Err(Error::new(Kind::Timeout, message).hint("run it again"));
        }
        Ok(self.renewed)
    }
}

impl Lease {
    /// Begins a run: visible to the collector when this returns.
    pub async fn begin(
        store: &Arc<dyn ObjectStore>,
        keys: &Arc<Keys>,
        kind: RunKind,
    ) -> Result<Self> {
        let run = format!("{}{}", kind.prefix(), hex(&random::<16>()));
        let started = put(&**store, keys, &run, &sequence(0)).await?;
        let state = Mutex::new(State { next: 1, renewed: started, lost: false });
        let (store, keys) = (Arc::clone(store), Arc::clone(keys));
        let held = Arc::new(Held { store, keys, run, started, state });
        let renewing = tokio::spawn(renew_forever(Arc::clone(&held)));
        Ok(Self { held, renewing })
    }

    /// The run's name under `runs/`.
    pub fn run(&self) -> &str {
        &self.held.run
    }

    /// When the run began, by the store's clock.
    pub fn started(&self) -> Timestamp {
        self.held.started
    }

    /// Renews the lease; when it returns `Ok`, [`LEASE_OF_WRITER`] is left from the time it
    /// returns. Fails with [`Kind::Timeout`] once the lease was lost.
    pub async fn check(&self) -> Result<Timestamp> {
        self.held.renew().await
    }

    /// The same without a renewal, where there is no room for one: when it returns `Ok`, the run was
    /// heard of within [`LEASE_OF_WRITER`], so that much is left until [`LEASE`] is over.
    pub async fn look(&self) -> Result<()> {
        self.held.look().await
    }

    /// Whether it is known to be lost. A store that does not answer is no sign of it.
    pub async fn is_lost(&self) -> bool {
        self.held.state.lock().await.lost
    }

    /// Ends the run: the collector need not wait for it any more.
    pub async fn end(self) -> Result<()> {
        self.renewing.abort();
        put(&*self.held.store, &self.held.keys, &self.held.run, END).await?;
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}

/// The name of a run's last object.
const END: &str = "end";

fn sequence(n: u32) -> String {
    format!("{n:08x}")
}

async fn put(store: &dyn ObjectStore, keys: &Keys, run: &str, last: &str) -> Result<Timestamp> {
    let name = ObjectName::new(Folder::Runs, &format!("{run}/{last}"));
    let object = keys.seal_object(ObjectType::Run, &name, b"{}");
    Ok(store.put(&name, object).await?.stored)
}

async fn renew_forever(held: Arc<Held>) {
    loop {
        tokio::time::sleep(RENEW_EVERY).await;
        while let Err(error) = held.renew().await {
            tracing::warn!(run = held.run, error = %error, "cannot renew the lease of this run");
            if held.state.lock().await.lost {
                return;
            }
            tokio::time::sleep(RENEW_EVERY / 10).await;
        }
    }
}

impl Held {
    async fn renew(&self) -> Result<Timestamp> {
        let mut state = self.state.lock().await;
        if !state.lost {
            let number = state.next;
            // Used up even if the answer gets lost.
            state.next += 1;
            let stored = put(&*self.store, &self.keys, &self.run, &sequence(number)).await?;
            state.lost = stored.duration_since(state.renewed).unsigned_abs() > LEASE_OF_WRITER;
            state.renewed = stored;
        }
        state.check()
    }

    async fn look(&self) -> Result<()> {
        let mut state = self.state.lock().await;
        if !state.lost {
            let now = self.store.now().await?;
            state.lost = now.duration_since(state.renewed).unsigned_abs() > LEASE_OF_WRITER;
        }
        state.check().map(drop)
    }
}

/// A run as the store tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunRecord {
    /// Its name under `runs/`.
    pub run: String,
    /// What it is for.
    pub kind: RunKind,
    /// When it began.
    pub started: Timestamp,
    /// When it was last heard of.
    pub renewed: Timestamp,
    /// Whether it said that it is over.
    pub ended: bool,
    /// Its objects.
    pub objects: Vec<ObjectName>,
}

/// Every run the store knows of, and the time at which it was asked.
#[derive(Debug)]
pub struct Survey {
    /// The store's clock before the runs were listed: whoever renews later is not dead by it.
    pub now: Timestamp,
    /// The runs.
    pub runs: Vec<RunRecord>,
}

impl Survey {
    /// Asks the store.
    pub async fn take(store: &dyn ObjectStore) -> Result<Self> {
        let now = store.now().await?;
        let mut runs: BTreeMap<String, RunRecord> = BTreeMap::new();
        for_each(store, Folder::Runs.prefix(), |object| {
            let rest = object.name.as_str().strip_prefix(Folder::Runs.prefix());
            let Some((run, last)) = rest.and_then(|rest| rest.split_once('/')) else { return };
            // What is not a collector is waited for, also kinds of newer versions.
            let kind = match run.strip_prefix(RunKind::Collect.prefix()) {
                Some(_) => RunKind::Collect,
                None if run.starts_with(RunKind::Read.prefix()) => RunKind::Read,
                None => RunKind::Backup,
            };
            let record = runs.entry(run.to_owned()).or_insert_with(|| RunRecord {
                run: run.to_owned(),
                kind,
                started: object.stored,
                renewed: object.stored,
                ended: false,
                objects: Vec::new(),
            });
            record.started = record.started.min(object.stored);
            record.renewed = record.renewed.max(object.stored);
            record.ended |= last == END;
            record.objects.push(object.name);
        })
        .await?;
        Ok(Self { now, runs: runs.into_values().collect() })
    }

    /// The runs that are neither over nor dead.
    pub fn live(&self) -> impl Iterator<Item = &RunRecord> {
        self.runs.iter().filter(|run| self.is_live(run))
    }

    /// The others: their objects may go.
    pub fn over(&self) -> impl Iterator<Item = &RunRecord> {
        self.runs.iter().filter(|run| !self.is_live(run))
    }

    fn is_live(&self, run: &RunRecord) -> bool {
        let silent = self.now.duration_since(run.renewed);
        let lapsed = silent.is_positive() && silent.unsigned_abs() > LEASE;
        !run.ended && !lapsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::repo::seal::MasterKey;
    use crate::repo::store::memory::MemoryStore;

    struct Bed {
        clock: Arc<ManualClock>,
        store: Arc<dyn ObjectStore>,
        keys: Arc<Keys>,
    }

    fn bed() -> Bed {
        let clock = Arc::new(ManualClock::new(Timestamp::UNIX_EPOCH));
        let store = Arc::new(MemoryStore::new(Arc::clone(&clock) as Arc<_>));
        Bed { clock, store, keys: Arc::new(Keys::new(&MasterKey::from_bytes([1; 32]))) }
    }

    async fn live(bed: &Bed) -> usize {
        Survey::take(&*bed.store).await.unwrap().live().count()
    }

    #[tokio::test]
    async fn a_run_lives_from_begin_to_end() {
        let bed = bed();
        let lease = Lease::begin(&bed.store, &bed.keys, RunKind::Backup).await.unwrap();
        assert_eq!(live(&bed).await, 1);
        lease.end().await.unwrap();
        assert_eq!(live(&bed).await, 0);
    }

    #[tokio::test]
    async fn a_killed_run_dies_once_its_lease_is_over() {
        let bed = bed();
        drop(Lease::begin(&bed.store, &bed.keys, RunKind::Collect).await.unwrap());
        bed.clock.advance(LEASE);
        assert_eq!(live(&bed).await, 1);
        bed.clock.advance(Duration::from_secs(1));
        assert_eq!(live(&bed).await, 0);
    }

    #[tokio::test]
    async fn a_run_that_was_silent_too_long_loses_its_lease_for_good() {
        let bed = bed();
        let lease = Lease::begin(&bed.store, &bed.keys, RunKind::Backup).await.unwrap();
        bed.clock.advance(LEASE_OF_WRITER);
        lease.check().await.unwrap();
        bed.clock.advance(LEASE_OF_WRITER + Duration::from_secs(1));
        assert_eq!(lease.check().await.unwrap_err().kind(), Kind::Timeout);
        assert_eq!(lease.check().await.unwrap_err().kind(), Kind::Timeout);
    }

    #[tokio::test]
    async fn a_look_tells_without_a_renewal_whether_the_lease_still_counts() {
        let bed = bed();
        let lease = Lease::begin(&bed.store, &bed.keys, RunKind::Collect).await.unwrap();
        bed.clock.advance(LEASE_OF_WRITER);
        lease.look().await.unwrap();
        let objects = bed.store.list(Folder::Runs.prefix(), None, 10).await.unwrap();
        assert_eq!(objects.len(), 1, "nothing was written");
        bed.clock.advance(Duration::from_secs(1));
        assert_eq!(lease.look().await.unwrap_err().kind(), Kind::Timeout);
        assert_eq!(lease.check().await.unwrap_err().kind(), Kind::Timeout);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_renewed_in_the_background_and_survives_failed_renewals() {
        let bed = bed();
        let lease = Lease::begin(&bed.store, &bed.keys, RunKind::Backup).await.unwrap();
        for _ in 0..10 {
            bed.clock.advance(RENEW_EVERY);
            tokio::time::sleep(RENEW_EVERY + Duration::from_secs(1)).await;
        }
        assert_eq!(live(&bed).await, 1);
        lease.check().await.unwrap();
    }
}
