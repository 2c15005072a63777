//! The watch over a running backup: it gives the backup up before the guest suffers.
//!
//! A job that cannot write its scratch file fails the *guest's* write and goes on itself: nothing
//! is announced, reads of the instant go on, and the virtual disk's default `werror=enospc` stops
//! the guest (seen on QEMU 10.0). So the free space of scratch is looked at until the last job has
//! ended, and the jobs are ended while there is room. A guest that writes faster than that stands
//! still until they have ended, and then runs on (`teardown`).
//!
//! ```text
//!  watching ──► room is short, or cannot be told ──► give up ([`Things::give_up`]) ──► lost
//!                                     more is begun ──────► ▲
//! ```
//!
//! It begins before the jobs do, and so before the guest is thawed: a thaw may take a minute. What is
//! begun after that it is shown ([`Watch::see`]), and ends as well.
//!
//! Deliberately without write thresholds: on a raw scratch file they tell how far up the disk the
//! guest wrote, not how much is used (`bdrv_write_threshold_check_write` compares offsets).

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use qmp::Monitor;
use tokio::sync::watch;

use super::teardown::{AGAIN, Scratch, Things};
use crate::error::{Error, Kind, Result, with_causes};
use crate::platform::space::{self, ANSWER, POLL};

/// Looks after the scratch of a run until dropped.
pub(super) struct Watch {
    /// Why the backup was given up.
    given_up: Arc<Mutex<Option<Error>>>,
    things: watch::Sender<Things>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Watches the room in `directory`, where the scratch of `things` is.
    pub(super) fn start(directory: PathBuf, things: &Things, monitor: Monitor) -> Self {
        let (things, mut seen) = watch::channel(things.clone());
        let given_up = Arc::new(Mutex::new(None));
        let told = Arc::clone(&given_up);
        let task = tokio::spawn(async move {
            let why = until_short(directory).await;
            let scratch = match why.kind() {
                Kind::NoSpace => Scratch::Answers,
                _ => Scratch::Unknown,
            };
            // Before the end: whoever reads sees errors at once then, and asks why.
            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
            loop {
                let now = seen.borrow_and_update().clone();
                if let Err(error) = now.give_up(&monitor, scratch).await {
                    tracing::error!(?error, "the backup is given up and its jobs do not end");
                    tokio::time::sleep(AGAIN).await;
                } else if seen.changed().await.is_err() {
                    return;
                }
            }
        });
        Self { given_up, things, task }
    }

    /// Shows it what there is now: it ends that, too, if the backup was given up.
    pub(super) fn see(&self, things: &Things) {
        self.things.send_replace(things.clone());
    }

    /// An error if the backup was given up.
    pub(super) fn check(&self) -> Result<()> {
        let given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        given_up.as_ref().map_or(Ok(()), |why| Err(why.again()))
    }
}

/// Why a backup is to be given up.
async fn until_short(directory: PathBuf) -> Error {
    let mut tick = tokio::time::interval(POLL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match space::check_aside(&directory, ANSWER).await {
            Ok(()) => {}
            Err(error) if error.kind() == Kind::NoSpace => return error,
            Err(error) => {
                let hint = error.hint_text().unwrap_or("look at that directory").to_owned();
                return Error::new(Kind::SnapshotLost, with_causes(&error)).hint(hint);
            }
        }
    }
}
