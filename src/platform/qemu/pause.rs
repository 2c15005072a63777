//! A pause of the guest, for the instant of several disks that no transaction can give.
//!
//! ```text
//!  guardian ──► running? ──► marker node ──► stop ──► (the instant) ──► cont ──► marker gone
//!                                 │ run killed, or QEMU does not answer ▲
//!                                 └── guardian, next run, `recover` ────┘  if the marker is there
//! ```
//!
//! QEMU does not tell who stopped a guest. The marker does: a node without content that is there
//! exactly as long as our pause may last. Whoever finds it lets the guest go on and removes it;
//! without it nobody touches a paused guest, which is somebody else's.
//!
//! The run makes and ends the pause itself, over the monitor that only one client can have; the
//! guardian ([`crate::freeze`]) gets the monitor when the run is gone.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use qmp::block::is_missing;
use qmp::{Address, Monitor};
use serde_json::json;
use tokio::time::Instant;

use super::error::failed;
use super::graph::Graph;
use crate::error::{Error, Kind, Result, with_causes};
use crate::freeze::{self, FileSystem, Freezable, Guardian, Subject};

/// How long the guardian waits for word. What it acts on is the end of the run: before that it does
/// not get the monitor. The pause itself takes milliseconds, and as long as images take to be
/// flushed.
const BUDGET: Duration = Duration::from_secs(3600);
/// Longest wait of the guardian for the monitor, and for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a guest that does not go on is tried to be let go on: what comes next may be its agent,
/// which does not answer for half a minute as long as it is paused.
const PERSIST: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const AGAIN: Duration = Duration::from_millis(200);
/// What QEMU calls a guest that `stop` has stopped (qapi/run-state.json).
const PAUSED: &str = "paused";

/// A guest that may be paused now: somebody guards it.
pub(super) struct Pause {
    monitor: Monitor,
    marker: String,
    guard: freeze::Frozen,
}

impl Pause {
    /// Sets the guardian up. Nothing is paused yet.
    pub(super) async fn prepare(
        monitor: &Monitor,
        socket: &Path,
        marker: &str,
        program: Option<&Path>,
    ) -> Result<Self> {
        let socket = std::path::absolute(socket)
            .map_err(|e| Error::io(format!("cannot resolve {}", socket.display()), e))?;
        let (monitor, marker) = (monitor.clone(), marker.to_owned());
        let subject = Subject::Paused { monitor: socket.clone(), marker: marker.clone() };
        let own = Box::new(PausedGuest::new(socket, marker.clone()));
        let nobody =
            |reason| Error::new(Kind::Internal, format!("nobody guards the pause: {reason}"));
        let guardian = Guardian::start(program, subject, own).await.map_err(nobody)?;
        let guard = guardian.freeze(BUDGET).await.map_err(|failed| nobody(failed.reason))?;
        Ok(Self { monitor, marker, guard })
    }

    /// Stops the guest, if it runs.
    pub(super) async fn stop(&mut self) -> Result<()> {
        let status = self.monitor.query_status().await;
        if !status.map_err(failed("cannot ask for the state"))?.running {
            return Ok(());
        }
        let node = json!({ "driver": "null-co", "node-name": self.marker, "size": 0 });
        let added = self.monitor.blockdev_add(node).await;
        added.map_err(failed("cannot mark the pause of the guest"))?;
        self.monitor.stop().await.map_err(failed("cannot pause the guest"))
    }

    /// Lets it go on, if it was stopped here.
    pub(super) async fn end(self) -> Result<()> {
        go_on_after_all(&self.monitor, &self.marker).await?;
        self.guard.release().await;
        Ok(())
    }
}

/// Lets a guest go on that the run of this marker has paused; whether there was one.
pub(super) async fn go_on(monitor: &Monitor, marker: &str) -> Result<bool> {
    if !is_marked(monitor, marker).await? {
        return Ok(false);
    }
    let status = monitor.query_status().await.map_err(failed("cannot ask for the state"))?;
    if status.status == PAUSED {
        monitor.cont().await.map_err(failed("cannot let the guest go on"))?;
    }
    match monitor.blockdev_del(marker).await {
        Err(error) if !is_missing(&error) => Err(failed("cannot unmark the pause")(error)),
        _ => Ok(true),
    }
}

/// The same, tried twice and then for some seconds: some of what stands in the way does so once (an
/// image that QEMU could not activate; the next attempt may meet another).
pub(super) async fn go_on_after_all(monitor: &Monitor, marker: &str) -> Result<bool> {
    let until = Instant::now() + PERSIST;
    let mut is_first = true;
    loop {
        match go_on(monitor, marker).await {
            Err(error) if error.kind() == Kind::Connection => return Err(error),
            Err(error) if is_first || Instant::now() < until => {
                tracing::warn!(%error, "the guest does not go on; tried once more");
                is_first = false;
                tokio::time::sleep(AGAIN).await;
            }
            result => return result,
        }
    }
}

/// The same, tried until it goes on or QEMU has ended, however long that takes. Cancel-safe.
pub(super) async fn until_it_goes_on(monitor: &Monitor, marker: &str) {
    while let Err(error) = go_on(monitor, marker).await {
        if error.kind() == Kind::Connection {
            return;
        }
        tracing::warn!(%error, "the guest does not go on; tried again");
        tokio::time::sleep(AGAIN).await;
    }
}

async fn is_marked(monitor: &Monitor, marker: &str) -> Result<bool> {
    let failed = match monitor.query_named_block_nodes().await {
        Ok(nodes) => return Ok(nodes.iter().any(|node| node.name() == marker)),
        Err(error) => failed("cannot ask for nodes")(error),
    };
    // A broken image of somebody else is no reason to leave a guest paused.
    match Graph::ask(monitor).await {
        Ok(Some(graph)) => Ok(graph.has(marker)),
        _ => Err(failed),
    }
}

/// The pause as its guardian sees it: there is nothing to make, only to end.
pub struct PausedGuest {
    socket: PathBuf,
    marker: String,
}

impl PausedGuest {
    /// The guest of the monitor at `socket`, whose pause `marker` tells.
    pub fn new(socket: PathBuf, marker: String) -> Self {
        Self { socket, marker }
    }
}

#[async_trait]
impl Freezable for PausedGuest {
    async fn prepare(&mut self) -> Result<(), String> {
        Ok(())
    }

    async fn file_systems(&mut self) -> Option<Vec<FileSystem>> {
        None
    }

    async fn freeze(&mut self, _budget: Duration) -> Result<u32, String> {
        Ok(1)
    }

    async fn thaw(&mut self) -> Result<u32, String> {
        let options = qmp::Options { greeting: ANSWER, command: ANSWER };
        let monitor = Monitor::connect(&Address::Unix(self.socket.clone()), options).await;
        let monitor = monitor.map_err(|error| with_causes(&error))?;
        let went_on = go_on(&monitor, &self.marker).await.map_err(|error| with_causes(&error))?;
        Ok(u32::from(went_on))
    }

    async fn is_gone(&mut self) -> bool {
        is_gone(&self.socket).await
    }
}

/// Whether nobody listens on a socket of QEMU, which takes it along: it has ended.
pub(super) async fn is_gone(socket: &Path) -> bool {
    let connected = tokio::net::UnixStream::connect(socket).await;
    let gone = [ErrorKind::NotFound, ErrorKind::ConnectionRefused];
    connected.is_err_and(|error| gone.contains(&error.kind()))
}
