//! A connection to a monitor: one task owns the socket, handles send it requests.
//!
//! ```text
//!  Monitor (clones) ── Request{id, line, reply} ──► owner task ──► socket
//!        ▲                                           │   ▲
//!        └──── oneshot per command ◄── by id ────────┤   │ lines
//!  Subscription ◄──── broadcast, bounded ◄───────────┘   socket
//!
//!  connect ─► greeting (deadline: Occupied) ─► qmp_capabilities ─► ready ─► closed (reason kept)
//! ```
//!
//! Invariants: ids are never used twice in a connection, so a reply to a command whose caller has
//! gone away finds nobody and is dropped, and no other command can get it. Bounded are the queue
//! of requests, the unanswered commands, the events kept and the length of a line. The first error
//! closes the connection, and everybody who waits or comes later is told it as the cause.
//! When the last handle is dropped, the task ends and the socket is closed; nothing in QEMU
//! changes by that.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use qapi::Command;
use serde_json::{Value, json};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::address::Address;
use crate::error::{Error, Result};
use crate::events::{EVENTS_KEPT, Event, Subscription};
use crate::lines::{LineError, LineReader};
use crate::wire::{Greeting, Incoming};

/// Longest line accepted. QEMU's own limit for what it parses is 64 MiB of tokens
/// (MAX_TOKEN_SIZE, qobject/json-streamer.c); query-qmp-schema answers with some 240 KB.
const LINE_BYTES_MAX: usize = 64 << 20;
/// Requests that may wait for the owner task.
const REQUESTS_QUEUED: usize = 32;
/// Commands that may be unanswered at once, abandoned ones included.
const UNANSWERED_MAX: usize = 1024;

/// Deadlines of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// For connecting and for the greeting: beyond it another client holds the monitor.
    pub greeting: Duration,
    /// For the answer to a command, unless given with the command.
    pub command: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { greeting: Duration::from_secs(5), command: Duration::from_secs(30) }
    }
}

/// A handle to a monitor connection. Clones share the connection.
#[derive(Clone)]
pub struct Monitor {
    requests: mpsc::Sender<Request>,
    events: broadcast::WeakSender<Arc<Event>>,
    shared: Arc<Shared>,
}

struct Shared {
    peer: String,
    greeting: Greeting,
    oob: bool,
    timeout: Duration,
    next_id: AtomicU64,
    closing: Arc<Closing>,
}

/// A command on its way to the owner task.
struct Request {
    id: u64,
    command: String,
    line: Vec<u8>,
    reply: oneshot::Sender<Result<Value>>,
}

/// Why a connection ended; set once, by the owner task.
pub(crate) struct Closing {
    peer: String,
    reason: Mutex<Option<Arc<Error>>>,
}

impl Closing {
    fn set(&self, reason: Error) {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(reason));
    }

    /// The error for whoever waits on, or uses, a closed connection.
    pub(crate) fn error(&self) -> Error {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // "It was closed" needs no cause that says the same.
        let source = reason.filter(|error| !matches!(**error, Error::Closed { .. }));
        Error::Closed { peer: self.peer.clone(), source }
    }
}

impl Monitor {
    /// Connects, waits for the greeting and negotiates capabilities (`oob` where offered).
    ///
    /// [`Error::Occupied`] when the socket accepts but no greeting comes: a monitor serves one
    /// client. Cancel-safe: a dropped attempt closes the socket.
    pub async fn connect(address: &Address, options: Options) -> Result<Self> {
        let peer = address.to_string();
        let stream = address.connect(options.greeting).await?;
        let mut lines = LineReader::new(stream.reader, LINE_BYTES_MAX);
        let greeted = tokio::time::timeout(options.greeting, greeting(&mut lines, &peer)).await;
        let greeting = match greeted {
            Err(_) => return Err(Error::Occupied { peer, waited: options.greeting }),
            Ok(greeting) => greeting?,
        };
        let oob = greeting.capabilities.iter().any(|name| name == "oob");
        let closing = Arc::new(Closing { peer: peer.clone(), reason: Mutex::new(None) });
        let (requests, queue) = mpsc::channel(REQUESTS_QUEUED);
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let monitor = Self {
            requests,
            events: events.downgrade(),
            shared: Arc::new(Shared {
                peer: peer.clone(),
                greeting,
                oob,
                timeout: options.command,
                next_id: AtomicU64::new(1),
                closing: Arc::clone(&closing),
            }),
        };
        let owner = Owner {
            lines,
            writer: stream.writer,
            outgoing: Vec::new(),
            queue,
            unanswered: HashMap::new(),
            events,
            closing,
        };
        tokio::spawn(owner.run());
        let enable = if oob { json!({ "enable": ["oob"] }) } else { json!({}) };
        monitor.execute_raw("qmp_capabilities", enable).await?;
        Ok(monitor)
    }

    /// What the monitor said of itself.
    pub fn greeting(&self) -> &Greeting {
        &self.shared.greeting
    }

    /// The address this is connected to, as text.
    pub fn peer(&self) -> &str {
        &self.shared.peer
    }

    /// Events from now on.
    pub fn subscribe(&self) -> Subscription {
        let receiver = match self.events.upgrade() {
            Some(sender) => sender.subscribe(),
            // The connection is closed: a channel without sender says so at the first `recv`.
            None => broadcast::channel(1).1,
        };
        Subscription::new(receiver, Arc::clone(&self.shared.closing))
    }

    /// Runs a command of a known type.
    ///
    /// Cancel-safe in that no other command is affected; whether QEMU carries out a command whose
    /// caller went away is open.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Ok> {
        let arguments = serde_json::to_value(&command).expect("arguments of a command are JSON");
        let value = self.execute_raw(C::NAME, arguments).await?;
        serde_json::from_value(value)
            .map_err(|source| Error::Reply { command: C::NAME.to_owned(), source })
    }

    /// Runs any command. Cancel-safe as [`Monitor::execute`].
    pub async fn execute_raw(&self, command: &str, arguments: Value) -> Result<Value> {
        self.execute_within(command, arguments, self.shared.timeout).await
    }

    /// Runs any command with its own time-out. Cancel-safe as [`Monitor::execute`].
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value> {
        self.send("execute", command, arguments, timeout).await
    }

    /// Runs a command out of band, before those that are queued; only for the few commands that
    /// allow it (`query-yank`, `yank`, `migrate-pause`, `migrate-recover` in QEMU 10.0), where the
    /// monitor offers it. Cancel-safe as [`Monitor::execute`].
    pub async fn execute_oob(&self, command: &str, arguments: Value) -> Result<Value> {
        let verb = if self.shared.oob { "exec-oob" } else { "execute" };
        self.send(verb, command, arguments, self.shared.timeout).await
    }

    async fn send(
        &self,
        verb: &str,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        tracing::trace!(peer = %self.shared.peer, command, id, "send");
        let message = json!({ verb: command, "arguments": arguments, "id": id });
        let mut line = message.to_string().into_bytes();
        line.push(b'\n');
        let (reply, answer) = oneshot::channel();
        let request = Request { id, command: command.to_owned(), line, reply };
        let exchange = async {
            if self.requests.send(request).await.is_err() {
                return Err(self.shared.closing.error());
            }
            answer.await.unwrap_or_else(|_| Err(self.shared.closing.error()))
        };
        tokio::time::timeout(timeout, exchange)
            .await
            .unwrap_or_else(|_| Err(Error::Timeout { command: command.to_owned(), after: timeout }))
    }
}

fn protocol(peer: &str, rule: &'static str) -> Error {
    Error::Protocol { peer: peer.to_owned(), rule, source: None }
}

/// The greeting. Events come before it where a client left just now: to QEMU its session goes on until
/// the next one is greeted (seen with 10.0, where a job ended meanwhile).
async fn greeting(lines: &mut LineReader, peer: &str) -> Result<Greeting> {
    for _ in 0..EVENTS_KEPT {
        match next_message(lines, peer).await? {
            Incoming::Greeting(greeting) => return Ok(greeting),
            Incoming::Event(_) => {}
            _ => break,
        }
    }
    Err(protocol(peer, "a monitor greets first"))
}

/// The next message that is not an empty line. Cancel-safe.
async fn next_message(lines: &mut LineReader, peer: &str) -> Result<Incoming> {
    loop {
        match lines.next().await {
            Ok(line) if line.is_empty() => {}
            Ok(line) => {
                return Incoming::parse(&line).map_err(|malformed| Error::Protocol {
                    peer: peer.to_owned(),
                    rule: malformed.rule,
                    source: malformed.source,
                });
            }
            Err(LineError::Ended { partial: false }) => {
                return Err(Error::Closed { peer: peer.to_owned(), source: None });
            }
            Err(LineError::Ended { partial: true }) => {
                return Err(protocol(peer, "a connection does not end within a line"));
            }
            Err(LineError::TooLong) => return Err(protocol(peer, "a line is at most 64 MiB")),
            Err(LineError::Io(source)) => return Err(Error::Io { peer: peer.to_owned(), source }),
        }
    }
}

/// The task that owns the socket.
struct Owner {
    lines: LineReader,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// What of the current request is not written yet; requests are taken one by one, so that a
    /// peer that does not read stops the queue and never fills memory.
    outgoing: Vec<u8>,
    queue: mpsc::Receiver<Request>,
    unanswered: HashMap<u64, (String, oneshot::Sender<Result<Value>>)>,
    events: broadcast::Sender<Arc<Event>>,
    closing: Arc<Closing>,
}

impl Owner {
    async fn run(mut self) {
        let ended = loop {
            // Each branch is cancel-safe: `next` keeps what it read, `write` takes all or nothing
            // of what it reports, `recv` loses no request.
            let step = tokio::select! {
                message = next_message(&mut self.lines, &self.closing.peer) => {
                    message.and_then(|message| self.dispatch(message))
                }
                written = self.writer.write(&self.outgoing), if !self.outgoing.is_empty() => {
                    self.wrote(written)
                }
                request = self.queue.recv(), if self.outgoing.is_empty() => match request {
                    Some(request) => {
                        self.accept(request);
                        Ok(())
                    }
                    None => break None,
                },
            };
            if let Err(error) = step {
                break Some(error);
            }
        };
        let Some(error) = ended else { return };
        tracing::debug!(peer = %self.closing.peer, %error, "monitor connection ends");
        self.closing.set(error);
        // Dropping the senders wakes everybody who waits; each asks `closing` why.
    }

    fn wrote(&mut self, written: std::io::Result<usize>) -> Result<()> {
        let peer = &self.closing.peer;
        match written {
            Ok(0) => {
                let source = std::io::ErrorKind::WriteZero.into();
                Err(Error::Io { peer: peer.clone(), source })
            }
            Ok(bytes) => {
                self.outgoing.drain(..bytes);
                Ok(())
            }
            Err(source) => Err(Error::Io { peer: peer.clone(), source }),
        }
    }

    fn accept(&mut self, request: Request) {
        if request.reply.is_closed() {
            return; // Dropped or timed out before it was sent: never send it.
        }
        if self.unanswered.len() >= UNANSWERED_MAX {
            let error = Error::Overloaded {
                peer: self.closing.peer.clone(),
                command: request.command,
                limit: UNANSWERED_MAX,
            };
            // The caller may be gone by now; then nobody needs to know.
            let _ = request.reply.send(Err(error));
            return;
        }
        self.outgoing = request.line;
        self.unanswered.insert(request.id, (request.command, request.reply));
    }

    fn dispatch(&mut self, message: Incoming) -> Result<()> {
        let (id, result) = match message {
            Incoming::Event(event) => {
                tracing::trace!(peer = %self.closing.peer, event = event.name, "event");
                // No subscriber: nobody wants it.
                let _ = self.events.send(Arc::new(event));
                return Ok(());
            }
            Incoming::Greeting(_) => {
                return Err(protocol(&self.closing.peer, "a monitor greets once"));
            }
            Incoming::Return { id, value } => (id, Ok(value)),
            Incoming::Failure { id, class, message } => (id, Err((class, message))),
        };
        let Some((command, reply)) = self.unanswered.remove(&id) else {
            return Err(protocol(&self.closing.peer, "a reply belongs to a command"));
        };
        let result = result.map_err(|(class, message)| Error::Refused { command, class, message });
        if reply.send(result).is_err() {
            tracing::debug!(peer = %self.closing.peer, id, "reply to an abandoned command");
        }
        Ok(())
    }
}
