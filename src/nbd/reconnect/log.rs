//! What was written to a target and may be lost with its server: everything since the last flush.
//!
//! The log holds the bytes themselves, so it is bounded; whoever fills it flushes the target in time.
//! Of what is durable it keeps two samples: a server that comes back without them keeps nothing
//! (nbdkit's memory disk, say), whatever it answers to a flush.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ZeroMode};
use crate::content::is_zero;
use crate::error::{Error, Kind, Result};
use crate::nbd::client::Client;

/// What a change counts that has no bytes of its own.
const CHANGE_BYTES: usize = 4096;

/// Changes that are repeated at once: what a server works on for one connection.
const AT_ONCE: usize = 16;

/// A change of the target that can be made any number of times.
#[derive(Clone)]
pub(super) enum Change {
    /// These bytes at this offset.
    Write(u64, Arc<Buffer>),
    /// Zeroes.
    Zero(ByteRange, ZeroMode),
}

impl Change {
    /// Makes it.
    pub(super) async fn apply(&self, client: &Client) -> Result<()> {
        match self {
            Self::Write(offset, bytes) => client.write_shared(*offset, bytes).await,
            Self::Zero(range, mode) => client.zero(*range, *mode).await,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Write(_, bytes) => bytes.len().max(CHANGE_BYTES),
            Self::Zero(..) => CHANGE_BYTES,
        }
    }

    /// Whether it can be told from a disk that was never written.
    fn shows(&self) -> bool {
        matches!(self, Self::Write(_, bytes) if !is_zero(bytes))
    }
}

/// Changes that were answered, in the order of their answers.
pub(super) struct Log {
    changes: VecDeque<Change>,
    bytes: usize,
    /// Whether every change that is not durable is in here.
    complete: bool,
    /// The first and the last change known to be durable, of those that show.
    durable: [Option<Change>; 2],
}

impl Log {
    pub(super) fn new() -> Self {
        Self { changes: VecDeque::new(), bytes: 0, complete: true, durable: [None, None] }
    }

    pub(super) fn push(&mut self, change: Change) {
        self.bytes += change.bytes();
        self.changes.push_back(change);
    }

    /// Memory it takes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn count(&self) -> usize {
        self.changes.len()
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// The first `count` changes are durable.
    pub(super) fn made_durable(&mut self, count: usize) {
        for change in self.changes.drain(..count) {
            self.bytes -= change.bytes();
            if change.shows() {
                let [first, last] = &mut self.durable;
                first.get_or_insert_with(|| change.clone());
                *last = Some(change);
            }
        }
    }

    /// Gives up: the target cannot make anything durable, and there is no room for all of it.
    pub(super) fn give_up(&mut self) {
        self.complete = false;
        self.changes.clear();
        self.bytes = 0;
    }

    /// Brings a target that came back to where it was when it was lost.
    pub(super) async fn repeat(&self, client: &Arc<Client>) -> Result<()> {
        for sample in self.durable.iter().flatten() {
            prove(sample, client).await?;
        }
        let mut running = JoinSet::new();
        for change in &self.changes {
            if running.len() == AT_ONCE {
                next(&mut running).await?;
            }
            let (client, change) = (Arc::clone(client), change.clone());
            running.spawn(async move { change.apply(&client).await });
        }
        while !running.is_empty() {
            next(&mut running).await?;
        }
        Ok(())
    }
}

/// Waits for one of the changes that are being made.
async fn next(running: &mut JoinSet<Result<()>>) -> Result<()> {
    match running.join_next().await {
        Some(Ok(done)) => done,
        Some(Err(error)) => Err(Error::new(Kind::Internal, "a repeated write died").source(error)),
        None => Ok(()),
    }
}

/// Fails if the target does not hold what it had made durable.
async fn prove(sample: &Change, client: &Client) -> Result<()> {
    let Change::Write(offset, bytes) = sample else { return Ok(()) };
    let found = client.read(*offset, Buffer::unbudgeted(vec![0; bytes.len()])).await?;
    if *found == ***bytes {
        return Ok(());
    }
    let message =
        format!("{} was lost and came back without what it had made durable", client.peer());
    Err(Error::new(Kind::Mismatch, message).hint("copy it from the start"))
}
