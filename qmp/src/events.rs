//! Events, as a bounded subscription.
//!
//! Each subscription sees every event that arrives after it was made, in order. Nobody waits for
//! a slow one: past [`EVENTS_KEPT`] unread events it loses the oldest and is told how many
//! ([`Received::Lagged`]), so that it can ask for the state instead of trusting a gap.

use std::sync::Arc;

use serde_json::Value;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::connection::Closing;
use crate::error::{Error, Result};

/// Events a subscription may leave unread before it loses the oldest. A guest can cause bursts
/// (I/O errors, resets); QEMU limits the rate of most of those itself.
pub(crate) const EVENTS_KEPT: usize = 1024;

/// Something QEMU announced.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name (`BLOCK_JOB_COMPLETED`), known to this crate or not.
    pub name: String,
    /// Its data as it came; an empty object if there was none.
    pub data: Value,
    /// Seconds and microseconds of the host's clock, unless that failed.
    pub timestamp: Option<(i64, i64)>,
}

impl Event {
    /// A string member of the data (`id`, `device`, `status`).
    pub fn text(&self, member: &str) -> Option<&str> {
        self.data.get(member).and_then(Value::as_str)
    }
}

/// What a subscription yields.
#[derive(Clone, Debug, PartialEq)]
pub enum Received {
    /// The next event.
    Event(Arc<Event>),
    /// This many events were lost because they were not read in time.
    Lagged(u64),
}

/// Events from the moment it was made.
pub struct Subscription {
    receiver: broadcast::Receiver<Arc<Event>>,
    closing: Arc<Closing>,
}

impl Subscription {
    pub(crate) fn new(receiver: broadcast::Receiver<Arc<Event>>, closing: Arc<Closing>) -> Self {
        Self { receiver, closing }
    }

    /// The next event; an error once the connection is gone and all events are read.
    /// Cancel-safe.
    pub async fn recv(&mut self) -> Result<Received> {
        match self.receiver.recv().await {
            Ok(event) => Ok(Received::Event(event)),
            Err(RecvError::Lagged(lost)) => Ok(Received::Lagged(lost)),
            Err(RecvError::Closed) => Err(self.closing.error()),
        }
    }

    /// The next event if one has arrived, without waiting; `None` if not.
    pub fn try_recv(&mut self) -> Result<Option<Received>, Error> {
        use broadcast::error::TryRecvError;
        match self.receiver.try_recv() {
            Ok(event) => Ok(Some(Received::Event(event))),
            Err(TryRecvError::Lagged(lost)) => Ok(Some(Received::Lagged(lost))),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Closed) => Err(self.closing.error()),
        }
    }
}
