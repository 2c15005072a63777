//! The guest agent, over the host's end of its virtio-serial channel.
//!
//! The channel has no ids, no greeting and no framing of its own beyond lines, and the guest at
//! its other end may have restarted, hang, or be hostile. So before every command that follows an
//! unknown state the client synchronises: it sends `0xFF` (which resets the agent's parser) and
//! `guest-sync-delimited` with a fresh number, and drops everything up to the answer that begins
//! with `0xFF` and carries the number (qga/qapi-schema.json, guest-sync-delimited).
//!
//! ```text
//!  connect ──► unsynchronised ──handshake──► synchronised ──command, answer──► synchronised
//!                    ▲                            │
//!                    └── time-out or dropped ─────┘   (a late answer is dropped by the handshake)
//! ```
//!
//! A freeze that ran into its deadline may still happen: [`Agent::thaw`] is owed whatever
//! [`Agent::freeze`] returned. The agent works one command at a time, so the thaw comes after it.

use std::time::Duration;

use qapi::{Command, qga};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use crate::address::Address;
use crate::error::{Error, ErrorClass, Result};
use crate::lines::{LineError, LineReader};

/// Longest line taken from a guest; answers to the commands used here have some hundred bytes.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Resets the agent's parser, and marks its answer to the handshake.
const DELIMITER: u8 = 0xff;

/// Deadlines of an agent connection.
#[derive(Clone, Copy, Debug)]
pub struct AgentOptions {
    /// For connecting, and for each handshake: beyond it no agent runs in the guest, or another
    /// client holds the channel.
    pub handshake: Duration,
    /// For the answer to a command that has no deadline of its own.
    pub command: Duration,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self { handshake: Duration::from_secs(3), command: Duration::from_secs(5) }
    }
}

/// Whether guest file systems are frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeStatus {
    /// None is.
    Thawed,
    /// Some are; the agent then refuses most other commands.
    Frozen,
}

/// A file system mounted in the guest (qga/qapi-schema.json, GuestFilesystemInfo).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct FileSystem {
    /// The device's name in the guest (`vda1`).
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Its type (`ext4`).
    #[serde(rename = "type")]
    pub kind: String,
}

/// `guest-get-fsinfo`, of which only what [`FileSystem`] holds is read: the disks below change
/// from version to version.
#[derive(Debug, Serialize)]
struct GetFsInfo {}

impl Command for GetFsInfo {
    type Ok = Vec<FileSystem>;

    const NAME: &'static str = "guest-get-fsinfo";
    const ALLOW_OOB: bool = false;
}

/// A connection to a guest agent.
pub struct Agent {
    peer: String,
    options: AgentOptions,
    lines: LineReader,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Whether no answer is outstanding. False while a command is on its way, so that a dropped
    /// future leaves it false.
    synchronised: bool,
    /// The number of the next handshake.
    next_sync: u32,
}

impl Agent {
    /// Connects and synchronises. [`Error::Occupied`] when nobody answers. Cancel-safe.
    pub async fn connect(address: &Address, options: AgentOptions) -> Result<Self> {
        let stream = address.connect(options.handshake).await?;
        let mut agent = Self {
            peer: address.to_string(),
            options,
            lines: LineReader::new(stream.reader, LINE_BYTES_MAX),
            writer: stream.writer,
            synchronised: false,
            next_sync: 1,
        };
        agent.synchronise(Instant::now() + options.handshake).await?;
        Ok(agent)
    }

    /// Freezes all file systems of the guest and says how many.
    ///
    /// On any error, a time-out above all, they may be frozen nevertheless: call
    /// [`Agent::thaw`]. Dropping the future means the same.
    pub async fn freeze(&mut self, deadline: Duration) -> Result<i64> {
        self.run(qga::guest_fsfreeze_freeze {}, deadline).await
    }

    /// Thaws all file systems of the guest and says how many were frozen: fewer than
    /// [`Agent::freeze`] reported means that the guest thawed by itself before.
    ///
    /// May be repeated. After an error the guest may still be frozen.
    pub async fn thaw(&mut self, deadline: Duration) -> Result<i64> {
        self.run(qga::guest_fsfreeze_thaw {}, deadline).await
    }

    /// Whether file systems are frozen. Cancel-safe.
    pub async fn freeze_status(&mut self) -> Result<FreezeStatus> {
        let deadline = self.options.command;
        Ok(match self.run(qga::guest_fsfreeze_status {}, deadline).await? {
            qga::GuestFsfreezeStatus::thawed => FreezeStatus::Thawed,
            qga::GuestFsfreezeStatus::frozen => FreezeStatus::Frozen,
        })
    }

    /// The file systems mounted in the guest that a freeze looks at. Cancel-safe.
    pub async fn file_systems(&mut self) -> Result<Vec<FileSystem>> {
        self.run(GetFsInfo {}, self.options.command).await
    }

    /// Runs any command within `deadline`, handshake included. A dropped future leaves the
    /// connection usable; whether the guest carries the command out is open.
    pub async fn run<C: Command>(&mut self, command: C, deadline: Duration) -> Result<C::Ok> {
        let until = Instant::now() + deadline;
        if !self.synchronised {
            self.synchronise(until).await.map_err(|error| match error {
                Error::Occupied { .. } => timed_out(C::NAME, deadline),
                other => other,
            })?;
        }
        let arguments = serde_json::to_value(&command).expect("arguments of a command are JSON");
        self.synchronised = false;
        let exchange = async {
            self.send(&[], C::NAME, &arguments).await?;
            self.next_line().await
        };
        let line =
            timeout_at(until, exchange).await.map_err(|_| timed_out(C::NAME, deadline))??;
        let value = self.answer(C::NAME, &line)?;
        self.synchronised = true;
        value.and_then(|value| {
            serde_json::from_value(value)
                .map_err(|source| Error::Reply { command: C::NAME.to_owned(), source })
        })
    }

    /// Brings both ends to a known state, dropping stale answers.
    async fn synchronise(&mut self, until: Instant) -> Result<()> {
        let number = self.next_sync;
        self.next_sync = self.next_sync.wrapping_add(1);
        let started = Instant::now();
        let exchange = async {
            self.send(&[DELIMITER], "guest-sync-delimited", &json!({ "id": number })).await?;
            loop {
                let line = self.next_line().await?;
                // Whatever came before the delimiter is the rest of an older answer.
                let Some(at) = line.iter().rposition(|byte| *byte == DELIMITER) else { continue };
                let answer = serde_json::from_slice::<Value>(&line[at + 1..]);
                if answer.is_ok_and(|answer| answer["return"] == json!(number)) {
                    return Ok(());
                }
            }
        };
        match timeout_at(until, exchange).await {
            Ok(result) => result?,
            Err(_) => {
                return Err(Error::Occupied { peer: self.peer.clone(), waited: started.elapsed() });
            }
        }
        self.synchronised = true;
        Ok(())
    }

    async fn send(&mut self, prefix: &[u8], command: &str, arguments: &Value) -> Result<()> {
        let mut bytes = prefix.to_vec();
        let message = json!({ "execute": command, "arguments": arguments });
        bytes.extend_from_slice(message.to_string().as_bytes());
        bytes.push(b'\n');
        let written = self.writer.write_all(&bytes).await;
        written.map_err(|source| Error::Io { peer: self.peer.clone(), source })
    }

    async fn next_line(&mut self) -> Result<Vec<u8>> {
        self.lines.next().await.map_err(|error| match error {
            LineError::Ended { .. } => Error::Closed { peer: self.peer.clone(), source: None },
            LineError::TooLong => self.protocol("an answer is at most 1 MiB", None),
            LineError::Io(source) => Error::Io { peer: self.peer.clone(), source },
        })
    }

    /// The outer error means that the channel is out of step, the inner one that the agent refused.
    fn answer(&self, command: &str, line: &[u8]) -> Result<Result<Value>> {
        let mut answer: Value = serde_json::from_slice(line)
            .map_err(|error| self.protocol("an answer is one JSON text", Some(error)))?;
        if let Some(value) = answer.get_mut("return") {
            return Ok(Ok(value.take()));
        }
        let text = |key| answer.pointer(&format!("/error/{key}")).and_then(Value::as_str);
        let (Some(class), Some(message)) = (text("class"), text("desc")) else {
            return Err(self.protocol("an answer is a return or an error", None));
        };
        Ok(Err(Error::Refused {
            command: command.to_owned(),
            class: ErrorClass::from_wire(class),
            message: message.to_owned(),
        }))
    }

    fn protocol(&self, rule: &'static str, source: Option<serde_json::Error>) -> Error {
        Error::Protocol { peer: self.peer.clone(), rule, source }
    }
}

fn timed_out(command: &str, after: Duration) -> Error {
    Error::Timeout { command: command.to_owned(), after }
}
