//! Jobs: what vmbackup does, each in one file. The only place where platform meets repository.
//!
//! ```text
//!  backup   lock VM ► open run ► open snapshot ► copy disks ► still valid? ► manifest ► keep checkpoint
//!                                     └── any failure ──────────────► abort snapshot ► abort run
//!  restore  open point ► copy disks to temporary names ► rename ► define the domain
//! ```
//!
//! Invariants kept here:
//! - *Commit order*: chunks durable → index durable → manifest (the commit point) → new checkpoint
//!   kept → old one dropped. A crash between any two costs garbage for gc or a full read next
//!   time, never a manifest that cannot be restored.
//! - *Two-sided transaction*: what opens reaches commit or abort on every path. A failure of the
//!   clean-up is told as a warning and never hides the failure that made it necessary.
//!
//! Jobs get all they need as values ([`Env`] and a [`Control`](crate::control::Control)); they
//! print nothing. Faces reach repository and platforms through this module only, which re-exports
//! the types they need for it.

pub mod backup;
pub mod check;
pub mod copy;
mod directories;
pub mod export;
pub mod forget;
pub mod gc;
pub mod guardian;
pub mod hash;
pub mod keys;
pub mod list;
pub mod lock;
mod lossy;
pub mod plan;
mod points;
pub mod recover;
pub mod restore;
pub mod select;
pub mod serve;
pub mod show;
#[cfg(test)]
mod simulation;
pub mod source;
pub mod verify;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;

use crate::clock::{Clock, Timestamp};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::journal::{Journals, Probe};
use crate::repo::store::directory::{ANSWER, DirectoryStore};
use crate::workers::Workers;

pub use crate::block::file::Existing;
pub use crate::platform::{BackupMode, Quiesce};
pub use crate::policy::retention::KeepRules;
pub use crate::repo::Repository;
pub use crate::repo::keys::{Credentials, Secret};

/// What jobs borrow from the face that starts them.
#[derive(Clone)]
pub struct Env {
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Threads for work that burns CPU.
    pub workers: Workers,
    /// The zone in which times without one are meant and periods are counted.
    pub zone: TimeZone,
    /// Locks and journals of this host.
    pub state_dir: PathBuf,
    /// Locks and sockets of running backups; empty after a boot.
    pub runtime_dir: PathBuf,
    /// The program that becomes a freeze guardian, see [`guardian`]; without one the guardian is a
    /// thread, which does not outlive this process.
    pub guardian: Option<PathBuf>,
    /// Copies of what a repository can give again.
    pub cache_dir: PathBuf,
    /// Longest wait for a call to a repository.
    pub repository_answer: Duration,
    /// Called at each step that a journal knows; only tests do anything in it.
    pub probe: Option<Probe>,
}

impl Env {
    /// Where it is written down what runs have to undo.
    fn journals(&self) -> Journals {
        Journals::new(self.state_dir.join("journal"), self.probe.clone())
    }

    /// Milliseconds since `start`; zero where the clock went back.
    fn elapsed_ms(&self, start: Timestamp) -> u64 {
        u64::try_from(self.clock.now().duration_since(start).as_millis()).unwrap_or(0)
    }
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Env").field("state_dir", &self.state_dir).finish_non_exhaustive()
    }
}

/// Longest wait for a call to a repository, if nobody says otherwise.
pub const REPOSITORY_ANSWER: Duration = ANSWER;

/// What a running job gets: its surroundings, and the handle that stops it and shows its progress.
pub type Surroundings<'a> = (&'a Env, &'a Control);

/// The repository that is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepositoryChoice {
    /// None was named: the one of this user, made on first use by a backup.
    Default(PathBuf),
    /// This one, which has to be there: a typo or an unmounted path must not become a repository.
    Named(PathBuf),
}

impl RepositoryChoice {
    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Default(path) | Self::Named(path) => path,
        }
    }
}

/// Opens the repository at `location`.
pub async fn open(location: &Path, credentials: &Credentials, env: &Env) -> Result<Repository> {
    let store = Arc::new(open_store(location, env).await?);
    Repository::open(store, credentials, env.workers.clone()).await
}

/// Opens the place of a repository that has to be there.
async fn open_store(location: &Path, env: &Env) -> Result<DirectoryStore> {
    DirectoryStore::open_with(location, env.repository_answer).await.map_err(|error| match error.kind() {
        Kind::NotFound => error.context(format!("no repository in {}", location.display())).hint(
            "check the path and that its disk is mounted, or make one with 'vmbackup repo init'",
        ),
        Kind::Usage => error.hint("a repository is a directory: name the one it is in with --repo"),
        Kind::Permission => error.hint(
            "run as the user the repository belongs to (root's are for root), or let this user read \
             and write all of it",
        ),
        _ => error,
    })
}

/// An invariant of ours that does not hold.
pub(crate) fn internal(
    what: &str,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    Error::new(Kind::Internal, what).source(error)
}
