//! Asks the source what it holds, window by window, ahead of the reads.
//!
//! Runs as a task of its own, so that extent queries overlap with reading; two windows of answers
//! wait at most, so memory follows the window and not the disk.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::block::{BlockSource, ByteRange, ExtentMap};
use crate::error::{Error, Kind, Result};
use crate::units::GIB;

/// How much of the disk one query asks about. The worst case of 64 KiB clusters, every other one
/// used, is 16 Ki extents.
const WINDOW_BYTES: u64 = GIB;

/// Answers waiting to be planned.
const AHEAD: usize = 2;

/// The extents of a range, in order.
#[derive(Debug)]
pub(super) struct Walk {
    answers: mpsc::Receiver<Result<ExtentMap>>,
    /// Ends the task when the walk is dropped.
    task: JoinSet<()>,
}

impl Walk {
    /// Begins to ask about `range`; `name` is the source's in errors.
    pub(super) fn start(source: Arc<dyn BlockSource>, range: ByteRange, name: String) -> Self {
        let (send, answers) = mpsc::channel(AHEAD);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut at = range.offset();
            while at < range.end() {
                let end = at.saturating_add(WINDOW_BYTES).min(range.end());
                let window = ByteRange::between(at, end);
                let answer = source.extents(window).await.and_then(|map| checked(map, window));
                let answer = answer.map_err(|e| {
                    e.context(format!("cannot find out what {name} holds in {window}"))
                });
                let failed = answer.is_err();
                at = answer.as_ref().map_or(at, ExtentMap::end);
                // A closed channel: the copy has ended.
                if send.send(answer).await.is_err() || failed {
                    return;
                }
            }
        });
        Self { answers, task }
    }

    /// The next part; `None` at the end of the range. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Result<ExtentMap>> {
        let answer = self.answers.recv().await;
        if answer.is_none() {
            // So that nobody holds the source any more when the copy returns.
            let _ = self.task.join_next().await;
        }
        answer
    }
}

/// The contract of [`BlockSource::extents`], checked: a source that breaks it would make a copy
/// that leaves bytes out.
fn checked(map: ExtentMap, window: ByteRange) -> Result<ExtentMap> {
    if map.is_empty() || map.start() != window.offset() || map.end() > window.end() {
        let message = format!("asked about {window}, the source told about {}", map.range());
        return Err(Error::new(Kind::Internal, message));
    }
    Ok(map)
}
