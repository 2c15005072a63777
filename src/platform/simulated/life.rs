//! The life of a simulated process: every await point that leads out of it passes here, and may be
//! its last.
//!
//! A process that dies never comes back from the call it dies in, nor from any other; whoever runs it
//! waits for [`Life::death`] and drops all of it with its runtime. What it asked for outside stays.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::control::Control;

/// An await point, as tallies call it.
pub(crate) type Place = &'static str;

/// What happens at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// It fails and has no effect.
    Fail,
    /// It takes effect, and fails.
    LoseAnswer,
    /// The process is killed before it.
    DieBefore,
    /// The process is killed after it.
    DieAfter,
    /// It takes so long.
    Delay(Duration),
    /// The job is asked to stop.
    Cancel,
    /// Something happens elsewhere at this moment.
    Elsewhere(Happening),
}

/// What happens while a process runs, whatever it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Happening {
    /// QEMU dies; the VM is started again at once.
    QemuDies,
    /// The snapshot's job ends, and what is read from then on is live data.
    JobEndsUnseen,
    /// The snapshot's job ends, and reads fail.
    JobEnds,
    /// Scratch is full: the same as the last, with the guest's write done.
    ScratchFills,
    /// The store lets an object be seen that is torn, and the process dies.
    TornWrite,
    /// The store loses what it called durable lately.
    LostObject,
    /// Every segment of the store's index is torn.
    TornIndex,
}

impl Fault {
    /// What tallies call it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::LoseAnswer => "lose-answer",
            Self::DieBefore => "die-before",
            Self::DieAfter => "die-after",
            Self::Delay(_) => "delay",
            Self::Cancel => "cancel",
            Self::Elsewhere(Happening::QemuDies) => "qemu-dies",
            Self::Elsewhere(Happening::JobEndsUnseen) => "job-ends-unseen",
            Self::Elsewhere(Happening::JobEnds) => "job-ends",
            Self::Elsewhere(Happening::ScratchFills) => "scratch-fills",
            Self::Elsewhere(Happening::TornWrite) => "torn-write",
            Self::Elsewhere(Happening::LostObject) => "lost-object",
            Self::Elsewhere(Happening::TornIndex) => "torn-index",
        }
    }
}

/// A fault and where it comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Due {
    pub(crate) at: At,
    pub(crate) fault: Fault,
}

/// Which call a fault comes at; the first is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// That of all.
    Call(usize),
    /// That at this place.
    Place(Place, usize),
}

/// What happened to a process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Biography {
    pub(crate) is_dead: bool,
    /// Calls by place.
    pub(crate) calls: BTreeMap<Place, usize>,
    pub(crate) met: Vec<(Place, Fault)>,
}

type Elsewhere = Box<dyn Fn(Happening) + Send + Sync>;

/// A process.
pub(crate) struct Life {
    state: Mutex<State>,
    died: Notify,
    pub(crate) control: Control,
    elsewhere: Elsewhere,
}

#[derive(Debug, Default)]
struct State {
    due: Vec<Due>,
    count: usize,
    biography: Biography,
}

impl Life {
    pub(crate) fn new(due: Vec<Due>, elsewhere: Elsewhere) -> Arc<Self> {
        let state = Mutex::new(State { due, ..State::default() });
        Arc::new(Self { state, died: Notify::new(), control: Control::new(), elsewhere })
    }

    /// Resolves when it dies.
    pub(crate) async fn death(&self) {
        self.died.notified().await;
    }

    /// All of it, once it is over.
    pub(crate) fn biography(&self) -> Biography {
        self.state().biography.clone()
    }

    /// Leaves the process for `effect`.
    pub(crate) async fn call<T, E>(
        &self,
        place: Place,
        effect: impl Future<Output = Result<T, E>>,
        broken: impl Fn(&'static str) -> E,
    ) -> Result<T, E> {
        let is_dead = self.state().biography.is_dead;
        if is_dead {
            return std::future::pending().await;
        }
        match self.next(place) {
            None => effect.await,
            Some(Fault::Fail) => Err(broken("a fault was injected")),
            Some(Fault::LoseAnswer) => {
                effect.await?;
                Err(broken("the answer got lost"))
            }
            Some(Fault::DieBefore) => self.die().await,
            Some(Fault::DieAfter) => {
                let _ = effect.await;
                self.die().await
            }
            Some(Fault::Delay(by)) => {
                tokio::time::sleep(by).await;
                effect.await
            }
            Some(Fault::Cancel) => {
                self.control.cancel();
                effect.await
            }
            Some(Fault::Elsewhere(Happening::TornWrite)) => {
                let _ = effect.await;
                (self.elsewhere)(Happening::TornWrite);
                self.die().await
            }
            Some(Fault::Elsewhere(happening)) => {
                (self.elsewhere)(happening);
                effect.await
            }
        }
    }

    fn next(&self, place: Place) -> Option<Fault> {
        let mut state = self.state();
        let State { due, count, biography } = &mut *state;
        let here = biography.calls.entry(place).or_default();
        let (of_all, of_place) = (At::Call(*count), At::Place(place, *here));
        *count += 1;
        *here += 1;
        let found = due.iter().position(|due| due.at == of_all || due.at == of_place)?;
        let fault = due.remove(found).fault;
        biography.met.push((place, fault));
        Some(fault)
    }

    async fn die<T>(&self) -> T {
        self.state().biography.is_dead = true;
        self.died.notify_one();
        std::future::pending().await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Held for plain changes only, which leave it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
