//! A process's way to the store, and what goes wrong on it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use crate::clock::Timestamp;
use crate::repo::store::memory::MemoryStore;
use crate::repo::store::{
    ObjectInfo, ObjectName, ObjectStore, ObjectWriter, ReadRange, StoreError, StoreResult,
};

/// What happens to one call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Disturbance {
    /// It fails.
    Fail,
    /// The store is full, if the call writes; from then on for a while.
    Full,
    /// It takes effect, and fails.
    LoseAnswer,
    /// The process is killed before it.
    DieBefore,
    /// The process is killed after it.
    DieAfter,
    /// Others do things before it.
    Pause,
}

/// A process that waits for its next call to go on; others act meanwhile.
pub(super) type Paused = oneshot::Sender<()>;

#[derive(Debug)]
pub(super) struct Wire {
    store: Arc<MemoryStore>,
    link: Arc<Link>,
}

/// What all calls of a process go through.
#[derive(Debug)]
struct Link {
    state: Mutex<State>,
    paused: mpsc::Sender<Paused>,
}

#[derive(Debug, Default)]
struct State {
    calls: usize,
    due: BTreeMap<usize, Disturbance>,
    full: bool,
    dead: bool,
    met: bool,
}

enum Answer {
    Comes,
    GetsLost,
}

impl Wire {
    pub(super) fn new(store: Arc<MemoryStore>) -> (Arc<Self>, mpsc::Receiver<Paused>) {
        let (paused, held_up) = mpsc::channel(64);
        let link = Arc::new(Link { state: Mutex::default(), paused });
        (Arc::new(Self { store, link }), held_up)
    }

    /// Disturbs the call that comes after `calls` others.
    pub(super) fn disturb(&self, calls: usize, disturbance: Disturbance) {
        let mut state = self.link.state();
        let at = state.calls + calls + 1;
        state.due.insert(at, disturbance);
    }

    /// Ends all disturbance; whether there was any since the last time.
    pub(super) fn settle(&self) -> bool {
        let mut state = self.link.state();
        state.due.clear();
        state.full = false;
        std::mem::take(&mut state.met)
    }

    pub(super) fn is_dead(&self) -> bool {
        self.link.state().dead
    }

    pub(super) fn kill(&self) {
        self.link.state().dead = true;
    }
}

impl Link {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self, writes: bool) -> StoreResult<Option<Disturbance>> {
        let mut state = self.state();
        state.calls += 1;
        let calls = state.calls;
        let due = state.due.remove(&calls);
        state.met |= due.is_some();
        match due {
            Some(Disturbance::Full) => state.full = true,
            Some(Disturbance::DieBefore | Disturbance::DieAfter) => state.dead = true,
            _ if state.dead => return Err(broken("the process is dead")),
            _ => {}
        }
        if writes && state.full {
            let full = io::Error::from(io::ErrorKind::StorageFull);
            return Err(StoreError::io("a write", full));
        }
        Ok(due)
    }

    async fn call<T>(
        &self,
        writes: bool,
        effect: impl Future<Output = StoreResult<T>>,
    ) -> StoreResult<T> {
        let answer = match self.next(writes)? {
            None | Some(Disturbance::Full) => Answer::Comes,
            Some(Disturbance::Fail) => return Err(broken("a fault was injected")),
            Some(Disturbance::DieBefore) => return Err(broken("the process dies")),
            Some(Disturbance::LoseAnswer | Disturbance::DieAfter) => Answer::GetsLost,
            Some(Disturbance::Pause) => {
                let (go, wait) = oneshot::channel();
                // Nobody listens: the world is at its end, or waits for something else.
                if self.paused.send(go).await.is_ok() {
                    let _ = wait.await;
                }
                if self.state().dead {
                    return Err(broken("the process was killed meanwhile"));
                }
                Answer::Comes
            }
        };
        let done = effect.await?;
        match answer {
            Answer::Comes => Ok(done),
            Answer::GetsLost => Err(broken("the answer got lost")),
        }
    }
}

fn broken(what: &'static str) -> StoreError {
    StoreError::io("a call", io::Error::other(what))
}

#[async_trait]
impl ObjectStore for Wire {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    async fn create(&self, name: &ObjectName) -> StoreResult<Box<dyn ObjectWriter>> {
        let writer = self.link.call(true, self.store.create(name)).await?;
        Ok(Box::new(Writer { writer, link: Arc::clone(&self.link) }))
    }

    async fn read(&self, name: &ObjectName, range: ReadRange) -> StoreResult<Vec<u8>> {
        self.link.call(false, self.store.read(name, range)).await
    }

    async fn stat(&self, name: &ObjectName) -> StoreResult<ObjectInfo> {
        self.link.call(false, self.store.stat(name)).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectName>,
        max: usize,
    ) -> StoreResult<Vec<ObjectInfo>> {
        self.link.call(false, self.store.list(prefix, after, max)).await
    }

    async fn delete(&self, name: &ObjectName) -> StoreResult<()> {
        self.link.call(false, self.store.delete(name)).await
    }

    async fn now(&self) -> StoreResult<Timestamp> {
        self.link.call(false, self.store.now()).await
    }
}

struct Writer {
    writer: Box<dyn ObjectWriter>,
    link: Arc<Link>,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: &[u8]) -> StoreResult<()> {
        self.link.call(true, self.writer.write(bytes)).await
    }

    async fn finish(self: Box<Self>) -> StoreResult<ObjectInfo> {
        self.link.call(true, self.writer.finish()).await
    }

    async fn abort(self: Box<Self>) -> StoreResult<()> {
        self.link.call(false, self.writer.abort()).await
    }
}
