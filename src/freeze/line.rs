//! The line between a run and its guardian: one JSON text per line, over a socket pair.
//!
//! Both ends are ours and of one build; what does not parse means that the other end is no
//! guardian, and ends the line like its closing does.

use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::Subject;

/// Longest message; the longest there are carry a reason of some hundred bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Longest wait for the other end to take a message; the kernel's buffer takes them all.
const SEND: Duration = Duration::from_secs(5);

/// What a guardian is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Order {
    /// Whom to guard. First, and only to a process.
    Watch(Subject),
    /// Freeze, and thaw after this time at the latest.
    Freeze {
        /// The budget.
        budget_ms: u64,
    },
    /// Thaw.
    Thaw,
    /// Whoever asked has ended it by itself: nothing is to be done.
    Release,
}

/// What a guardian says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Report {
    /// Connected: a freeze may be asked for.
    Ready,
    /// There is no way to the agent.
    Unready(String),
    /// Frozen: so many file systems, and what of the guest is not.
    Frozen {
        /// How many.
        count: u32,
        /// Why that is not all, if it is not.
        partial: Option<String>,
    },
    /// Not frozen as far as known; a thaw follows.
    NotFrozen(String),
    /// Thawed, for certain. The last message.
    Thawed(Ended),
    /// Not thawed yet; the guardian goes on trying.
    Stuck(String),
}

/// How a freeze ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ended {
    /// How many file systems the thaw found frozen.
    pub(super) count: u32,
    /// From asking for the freeze to the end of the thaw.
    pub(super) frozen_ms: u64,
    /// The budget ended before anybody said "thaw".
    pub(super) expired: bool,
}

/// One end of the line.
pub struct Line {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    /// What came of a message whose end has not; kept when a wait is given up.
    partial: Vec<u8>,
}

impl Line {
    /// Takes over one end of a socket pair. Needs a tokio runtime.
    pub fn new(stream: StdStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (reader, writer) = UnixStream::from_std(stream)?.into_split();
        Ok(Self { reader: BufReader::new(reader), writer, partial: Vec::new() })
    }

    /// The first order to a process: whom to guard. `None` if this is no line of ours.
    pub async fn subject(&mut self) -> Option<Subject> {
        match self.receive().await? {
            Order::Watch(subject) => Some(subject),
            _ => None,
        }
    }

    /// Sends a message; false when the other end is gone.
    pub(super) async fn send(&mut self, message: &impl Serialize) -> bool {
        let mut bytes = serde_json::to_vec(message).expect("messages are plain data");
        bytes.push(b'\n');
        let sent = tokio::time::timeout(SEND, self.writer.write_all(&bytes)).await;
        matches!(sent, Ok(Ok(())))
    }

    /// The next message; `None` when the other end is gone. Cancel-safe.
    pub(super) async fn receive<T: DeserializeOwned>(&mut self) -> Option<T> {
        let room = MESSAGE_BYTES_MAX.saturating_sub(self.partial.len());
        let mut reader = (&mut self.reader).take(u64::try_from(room).unwrap_or(0));
        // What was read before the wait is given up stays in `partial`.
        let read = reader.read_until(b'\n', &mut self.partial).await;
        let line = std::mem::take(&mut self.partial);
        if read.is_err() || line.last() != Some(&b'\n') {
            return None;
        }
        serde_json::from_slice(&line)
            .map_err(|error| tracing::debug!(%error, "not a message of a guardian"))
            .ok()
    }
}
