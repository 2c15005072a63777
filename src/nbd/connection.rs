//! One connection in transmission: many requests in flight, answered in any order.
//!
//! ```text
//!  read/write/… ──► slot + outbox ──► writer ──► socket ──► server
//!       ▲                                                     │
//!       └──── oneshot ◄── slot filled ◄── reader ◄── socket ◄─┘
//! ```
//!
//! One task owns the socket and runs writer, reader and watchdog side by side. A request lives in
//! a slot from the moment it is queued until its reply is complete, together with the buffer that
//! is being filled and its place among the requests in flight; so a caller may drop its future at
//! any time and the connection stays in step. The buffer of a write lives in the outbox until it
//! is on the wire. The slot's index and generation are the cookie: a reply that names no request
//! on the wire ends the connection.
//!
//! When the connection dies (error, broken rule, stall), the reason is recorded first, then every
//! request in flight or waiting for a place fails with it. Nothing is retried here.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, oneshot};

use super::error::NbdError;
use super::negotiate::{Context, Negotiated};
use super::patience::{Patience, Wait};
use super::request::{ContextStatus, Coverage, Expected, Extents, InFlight, Outcome};
use super::wire::{HeaderStyle, Request, command, command_flag};
use super::{reader, writer};
use crate::block::{Buffer, ByteRange};

/// Longest a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// What has to move within the stall time-out while no request is answered to its end: at 120 s
/// half a KiB a second.
const PROGRESS_BYTES_MIN: u64 = 64 << 10;

/// A connection in transmission.
pub(super) struct Connection {
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
    contexts: Vec<Context>,
    /// Whether the server can be asked for one of several contexts.
    can_choose: bool,
}

/// A question about a range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Query {
    /// The range, of which a prefix is told.
    pub(super) range: ByteRange,
    /// The context that is needed; others may be told, too.
    pub(super) context: Option<u32>,
    /// How many extents.
    pub(super) extents: Extents,
}

/// What the callers and the connection's task share.
pub(super) struct Shared {
    pub(super) peer: Arc<str>,
    pub(super) style: HeaderStyle,
    state: Mutex<State>,
    /// Rung when the outbox or `closing` changes.
    pub(super) work: Notify,
    /// Bytes moved in either direction: the watchdog sees whether it stands still.
    pub(super) moved_bytes: AtomicU64,
    /// Requests that were answered to their end: the same.
    answered: AtomicU64,
    places: Arc<Semaphore>,
    patience: Arc<Patience>,
}

struct State {
    slots: Vec<Slot>,
    free: Vec<u16>,
    outbox: VecDeque<Outgoing>,
    closing: bool,
    dead: Option<NbdError>,
}

struct Slot {
    generation: u64,
    sent: bool,
    request: Option<InFlight>,
}

/// A request on its way to the wire.
pub(super) struct Outgoing {
    pub(super) header: Request,
    pub(super) payload: Option<(Arc<Buffer>, Range<usize>)>,
}

/// What the writer does next.
pub(super) enum Next {
    /// Requests were put into the batch.
    Batch,
    /// Nothing to do until the bell rings.
    Wait,
    /// All done and closing: say goodbye.
    Goodbye,
}

impl Connection {
    /// Starts the connection's task. All connections of a client share its patience.
    pub(super) fn start(negotiated: Negotiated, in_flight: u16, patience: Arc<Patience>) -> Self {
        let Negotiated { stream, peer, style, contexts, export, .. } = negotiated;
        let can_choose = style == HeaderStyle::Extended
            && export.has(super::wire::export::BLOCK_STATUS_PAYLOAD)
            && contexts.len() > 1;
        let places = Arc::new(Semaphore::new(usize::from(in_flight)));
        let slot = || Slot { generation: 0, sent: false, request: None };
        let shared = Arc::new(Shared {
            peer,
            style,
            state: Mutex::new(State {
                slots: (0..in_flight).map(|_| slot()).collect(),
                free: (0..in_flight).rev().collect(),
                outbox: VecDeque::new(),
                closing: false,
                dead: None,
            }),
            work: Notify::new(),
            moved_bytes: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            places: Arc::clone(&places),
            patience,
        });
        let (read_half, write_half) = stream.halves();
        let task = Arc::clone(&shared);
        tokio::spawn(async move {
            // Each branch records why it ended before it returns, so that no request can see a
            // dropped slot without a reason.
            tokio::select! {
                biased;
                () = reader::run(&task, read_half) => {}
                () = writer::run(&task, write_half) => {}
                () = watch(&task) => {}
            }
        });
        Self { shared, places, contexts, can_choose }
    }

    /// The meta contexts of this connection.
    pub(super) fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    /// How requests look.
    pub(super) fn style(&self) -> HeaderStyle {
        self.shared.style
    }

    /// Free places for requests: where the next one goes.
    pub(super) fn free_places(&self) -> usize {
        self.places.available_permits()
    }

    /// Fills `at` of the buffer from `offset` on. Cancel-safe, as all requests.
    pub(super) async fn read(
        &self,
        (offset, flags): (u64, u16),
        buffer: Buffer,
        at: Range<usize>,
    ) -> Result<Buffer, NbdError> {
        let range = ByteRange::new(offset, at.len() as u64);
        let expected = Expected::Read { buffer, at, covered: Coverage::default() };
        match self.request(header(command::READ, flags, range), expected, None).await? {
            Outcome::Read(buffer) => Ok(buffer),
            Outcome::Done | Outcome::Status(_) => unreachable!("a read ends with its buffer"),
        }
    }

    /// Writes `at` of the buffer to `offset`; the buffer is let go once it is on the wire. The server
    /// may have written if this is dropped.
    pub(super) async fn write(
        &self,
        (offset, flags): (u64, u16),
        buffer: Arc<Buffer>,
        at: Range<usize>,
    ) -> Result<(), NbdError> {
        let range = ByteRange::new(offset, at.len() as u64);
        let extended = self.shared.style == HeaderStyle::Extended;
        let flags = if extended { flags | command_flag::PAYLOAD_LEN } else { flags };
        let payload = Some((buffer, at));
        self.request(header(command::WRITE, flags, range), Expected::Plain, payload)
            .await
            .map(|_| ())
    }

    /// A command without payload in either direction.
    pub(super) async fn plain(
        &self,
        command: u16,
        flags: u16,
        range: ByteRange,
    ) -> Result<(), NbdError> {
        self.request(header(command, flags, range), Expected::Plain, None).await.map(|_| ())
    }

    /// What the contexts tell.
    pub(super) async fn status(&self, query: Query) -> Result<Vec<ContextStatus>, NbdError> {
        let Query { range, context, extents } = query;
        let chosen = context.filter(|_| self.can_choose);
        let ids = match chosen {
            Some(id) => vec![id],
            None => self.contexts.iter().map(|context| context.id).collect(),
        };
        let flags = match extents {
            Extents::Any => 0,
            Extents::One => command_flag::REQ_ONE,
        };
        let header = header(command::BLOCK_STATUS, flags, range);
        let expected = Expected::Status { ids, told: Vec::new(), extents };
        let payload = chosen.map(|id| status_payload(range, id));
        match self.request(header, expected, payload).await? {
            Outcome::Status(told) => Ok(told),
            Outcome::Done | Outcome::Read(_) => unreachable!("a query ends with its status"),
        }
    }

    /// Queues a request (its cookie is set here) and waits for its reply. The header has the length
    /// that is asked about, which is that of the payload too, except in a query.
    async fn request(
        &self,
        mut header: Request,
        expected: Expected,
        payload: Option<(Arc<Buffer>, Range<usize>)>,
    ) -> Result<Outcome, NbdError> {
        let place = Arc::clone(&self.places).acquire_owned().await;
        let place = place.map_err(|_| self.shared.reason())?;
        let (done, outcome) = oneshot::channel();
        let Request { command, offset, len, .. } = header;
        if let Some((_, at)) = payload.as_ref().filter(|_| command == command::BLOCK_STATUS) {
            header.flags |= command_flag::PAYLOAD_LEN;
            header.len = at.len() as u64;
        }
        let request = InFlight {
            command,
            offset,
            len,
            expected,
            error: None,
            chunks: 0,
            done,
            _place: place,
            _slow: self.shared.patience.count(command, header.flags),
        };
        self.shared.enqueue(request, Outgoing { header, payload })?;
        outcome.await.map_err(|_| self.shared.reason())?
    }

    /// Says goodbye once everything in flight is answered. Requests made afterwards fail.
    fn close(&self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_one();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// Held for a few moves at a time and never across an await: a std mutex is right.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enqueue(&self, request: InFlight, mut outgoing: Outgoing) -> Result<(), NbdError> {
        let mut state = self.lock();
        if let Some(reason) = &state.dead {
            return Err(reason.clone());
        }
        let index = state.free.pop().expect("a place in flight is a free slot");
        let slot = &mut state.slots[usize::from(index)];
        slot.generation += 1;
        slot.sent = false;
        slot.request = Some(request);
        outgoing.header.cookie = slot.generation << 16 | u64::from(index);
        state.outbox.push_back(outgoing);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Moves queued requests into `batch`, up to `requests_max` of them; from here on the server
    /// may answer them.
    pub(super) fn next_batch(&self, batch: &mut Vec<Outgoing>, requests_max: usize) -> Next {
        let mut state = self.lock();
        let count = state.outbox.len().min(requests_max);
        let State { slots, outbox, .. } = &mut *state;
        for outgoing in outbox.drain(..count) {
            let (index, _) = slot_of(outgoing.header.cookie);
            slots[index].sent = true;
            batch.push(outgoing);
        }
        if count > 0 {
            Next::Batch
        } else if state.closing && state.free.len() == state.slots.len() {
            Next::Goodbye
        } else {
            Next::Wait
        }
    }

    /// Takes a request that is on the wire out of its slot; the reader puts it back or frees it.
    pub(super) fn take(&self, cookie: u64) -> Option<InFlight> {
        let (index, generation) = slot_of(cookie);
        let mut state = self.lock();
        let slot = state.slots.get_mut(index)?;
        if slot.generation != generation || !slot.sent {
            return None;
        }
        slot.request.take()
    }

    /// Puts back a request whose reply is not complete.
    pub(super) fn put_back(&self, cookie: u64, request: InFlight) {
        let (index, _) = slot_of(cookie);
        self.lock().slots[index].request = Some(request);
    }

    /// The reply is complete: the slot is free.
    pub(super) fn free(&self, cookie: u64) {
        let (index, _) = slot_of(cookie);
        let index = u16::try_from(index).expect("the slot exists");
        self.answered.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        state.slots[usize::from(index)].sent = false;
        state.free.push(index);
        if state.closing {
            self.work.notify_one();
        }
    }

    /// Whether requests are in flight.
    fn is_busy(&self) -> bool {
        let state = self.lock();
        state.free.len() < state.slots.len()
    }

    /// Ends the connection for everybody. The first reason counts.
    pub(super) fn kill(&self, reason: NbdError) {
        let mut state = self.lock();
        let reason = state.dead.get_or_insert(reason).clone();
        let requests: Vec<_> = state.slots.iter_mut().filter_map(|s| s.request.take()).collect();
        let queued = std::mem::take(&mut state.outbox);
        drop(state);
        tracing::debug!(peer = &*self.peer, %reason, failed = requests.len(), "connection ended");
        self.places.close();
        for request in requests {
            let _ = request.done.send(Err(reason.clone()));
        }
        drop(queued);
    }

    fn reason(&self) -> NbdError {
        let closed = || NbdError::Closed { peer: Arc::clone(&self.peer) };
        self.lock().dead.clone().unwrap_or_else(closed)
    }
}

fn header(command: u16, flags: u16, range: ByteRange) -> Request {
    Request { flags, command, cookie: 0, offset: range.offset(), len: range.len() }
}

/// The payload that chooses one context: how much is asked about, and which (proto.md,
/// NBD_FLAG_BLOCK_STATUS_PAYLOAD).
fn status_payload(range: ByteRange, context: u32) -> (Arc<Buffer>, Range<usize>) {
    let mut bytes = range.len().to_be_bytes().to_vec();
    bytes.extend_from_slice(&context.to_be_bytes());
    let whole = 0..bytes.len();
    (Arc::new(Buffer::unbudgeted(bytes)), whole)
}

/// Index and generation of the slot a cookie names.
fn slot_of(cookie: u64) -> (usize, u64) {
    (usize::try_from(cookie & 0xffff).expect("16 bits"), cookie >> 16)
}

/// Ends the connection when requests wait and for too long ([`Patience`]) none was answered and less
/// than [`PROGRESS_BYTES_MIN`] moved: a server that drips bytes is no better than one that is silent.
/// And, when it was closed, ends the task even if the server never answers what was abandoned.
async fn watch(shared: &Shared) {
    let mut mark = (0, 0);
    let mut wait = Wait::new(&shared.patience);
    loop {
        wait.tick().await;
        let answered = shared.answered.load(Ordering::Relaxed);
        let moved_bytes = shared.moved_bytes.load(Ordering::Relaxed);
        let progress = answered != mark.0 || moved_bytes - mark.1 >= PROGRESS_BYTES_MIN;
        if progress || !shared.is_busy() {
            mark = (answered, moved_bytes);
            wait.progress();
        } else if let Some(after) = wait.silence() {
            let peer = Arc::clone(&shared.peer);
            return shared.kill(NbdError::Stalled { peer, after });
        }
    }
}

/// Runs the last words of a connection, bounded.
pub(super) async fn goodbye(shared: &Shared, words: impl Future<Output = ()>) {
    // Whether the server heard it does not matter: everything is answered.
    let _ = tokio::time::timeout(GOODBYE, words).await;
    shared.kill(NbdError::Closed { peer: Arc::clone(&shared.peer) });
}
