//! A session in transmission: requests in, replies out, many in progress, in any order.
//!
//! ```text
//!  socket ─► reader: header ─► place, payload ─► task: execute ─► replies ─► writer ─► socket
//!               │ stop: refuse with ESHUTDOWN                       ▲
//!               └── wrong request: refusal ─────────────────────────┘
//! ```
//!
//! Bounded: a request takes its place (one of [`Limits::requests`]) and its memory
//! ([`super::memory`]) before its payload is read and keeps them until its reply is written. A
//! client that does not read its replies therefore stops being read, and after [`Limits::stall`] is
//! cut off; so is one that reads or writes a byte now and then ([`super::pace`]). A request that
//! was read is answered, whatever becomes of it: a task that panics answers with EIO.
//!
//! When the client leaves or the server stops, what is in progress is finished and answered, as far
//! as that takes no longer than [`Limits::drain`]. A task that takes longer (storage that hangs) is
//! left to itself; the client's place among all clients stays taken until the last of them is done,
//! because until then its memory is.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::contexts::Context;
use super::end::{End, violation};
use super::execute::{Outcome, execute};
use super::exports::Export;
use super::limits::{Limits, PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_SKIPPED_MAX, STOP_GRACE};
use super::memory::{Allowance, Held};
use super::negotiate::Ready;
use super::pace::Pace;
use super::places::Place;
use super::reply::Reply;
use super::request::{Action, Agreed, Refusal, payload_bytes, refuse};
use crate::block::Buffer;
use crate::nbd::stream::{ReadHalf, WriteHalf};
use crate::nbd::wire::{HeaderStyle, Request, command, errno};

/// Requests are small and often come many at a time.
const READ_BUFFER_BYTES: usize = 16 << 10;

/// Replies written with one system call.
const BATCH_MAX: usize = 16;

/// Longest payload of a BLOCK_STATUS that is looked at.
const STATUS_PAYLOAD_BYTES_MAX: u64 = 4096;

/// Serves requests until the client leaves, breaks a rule, or the server stops.
pub(super) async fn serve(
    ready: Ready,
    memory: Allowance,
    limits: &Limits,
    stop: &CancellationToken,
) -> End {
    let Ready { stream, export, style, contexts, place } = ready;
    let (read_half, write_half) = stream.halves();
    let requests = usize::from(limits.requests.max(1));
    let (replies, to_write) = mpsc::channel(requests);
    // What waits to be written counts as well.
    let place = Arc::new(place);
    let _place = Arc::clone(&place);
    let reader = Reader {
        half: BufReader::with_capacity(READ_BUFFER_BYTES, read_half),
        stall: limits.stall,
        stop,
        stop_at: None,
        shared: Arc::new(Shared { export, style, contexts, memory, replies, place }),
        places: Arc::new(Semaphore::new(requests)),
    };
    let mut writing = std::pin::pin!(write(to_write, write_half, limits.stall));
    // The reader owns the way to the writer; when it and the last task are gone, the writer ends.
    let serving = async {
        tokio::select! {
            end = reader.run() => match timeout(limits.drain, writing).await {
                Ok(Err(lost)) if !matches!(end, End::Violation(_)) => lost,
                Ok(_) => end,
                Err(_) => End::Stalled(limits.drain.as_secs(), "requests after the client left"),
            },
            result = &mut writing => result.err().unwrap_or(End::Left),
        }
    };
    // Whatever is waited for then (memory that others hold, storage, a payload that drips, a client
    // that fetches no replies): all of it together gets this long.
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_GRACE + limits.drain).await;
    };
    tokio::select! {
        biased;
        end = serving => end,
        () = overdue => {
            End::Stalled(limits.drain.as_secs(), "what was in progress when the server stopped")
        }
    }
}

/// What the tasks of a session share.
struct Shared {
    export: Arc<Export>,
    style: HeaderStyle,
    contexts: Vec<Context>,
    memory: Allowance,
    replies: mpsc::Sender<Reply>,
    /// The client's among all clients.
    place: Arc<Place>,
}

impl Shared {
    fn agreed(&self) -> Agreed<'_> {
        Agreed { export: &self.export, style: self.style, contexts: &self.contexts }
    }
}

/// A request that was read and not answered yet.
struct Open {
    request: Request,
    /// Until it is answered. Goes before the place that `shared` keeps.
    held: Option<Held>,
    shared: Arc<Shared>,
}

impl Open {
    fn answer(mut self, outcome: Result<Outcome, Refusal>) {
        self.send(outcome);
    }

    fn send(&mut self, outcome: Result<Outcome, Refusal>) {
        let Some(held) = self.held.take() else { return };
        let reply = Reply::new(&self.request, self.shared.style, outcome, held);
        // Never full: each reply has a place, and there are as many of both. Closed when the
        // connection broke: then nobody waits for the answer.
        let _ = self.shared.replies.try_send(reply);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.send(Err(refuse(errno::EIO, "the request was lost inside the server")));
    }
}

/// The reading side.
struct Reader<'a> {
    half: BufReader<ReadHalf>,
    stall: Duration,
    stop: &'a CancellationToken,
    /// Set once the server stops: until then requests are refused.
    stop_at: Option<Instant>,
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
}

impl Reader<'_> {
    async fn run(mut self) -> End {
        loop {
            match self.next().await {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// Reads one request and starts it.
    async fn next(&mut self) -> Result<(), End> {
        self.wait().await?;
        let style = self.shared.style;
        let mut header = [0; 32];
        let header = &mut header[..Request::header_bytes(style)];
        self.read_exact(header, "a request").await?;
        let request = Request::decode(style, header)
            .map_err(|magic| violation(format!("{magic:#010x} is not the magic of a request")))?;
        if request.command == command::DISC {
            return Err(End::Left);
        }
        let payload = payload_bytes(&request, style);
        if payload > PAYLOAD_BYTES_SKIPPED_MAX {
            return Err(violation(format!("a payload of {payload} bytes")));
        }
        self.shared.place.mark_used();
        let place = Arc::clone(&self.places).acquire_owned().await.expect("never closed");
        let held = Some(Held::new(place));
        let open = Open { request, held, shared: Arc::clone(&self.shared) };
        self.start(open, payload).await
    }

    /// Waits for the first byte of a request, or until the server has stopped long enough.
    async fn wait(&mut self) -> Result<(), End> {
        loop {
            let stop_at = self.stop_at;
            let stopped = async {
                match stop_at {
                    None => self.stop.cancelled().await,
                    Some(at) => tokio::time::sleep_until(at).await,
                }
            };
            tokio::select! {
                biased;
                () = stopped => match self.stop_at {
                    None => self.stop_at = Some(Instant::now() + STOP_GRACE),
                    Some(_) => return Err(End::Stopped),
                },
                () = self.shared.place.cut() => return Err(End::Unused),
                bytes = self.half.fill_buf() => {
                    return if bytes?.is_empty() { Err(End::Left) } else { Ok(()) };
                }
            }
        }
    }

    /// Reads the payload and hands the request to a task, or refuses it.
    async fn start(&mut self, mut open: Open, payload: u64) -> Result<(), End> {
        let Request { command, .. } = open.request;
        let status = command == command::BLOCK_STATUS && payload <= STATUS_PAYLOAD_BYTES_MAX;
        let mut of_status = None;
        if status && payload > 0 {
            let mut bytes = vec![0; usize::try_from(payload).expect("at most 4096")];
            self.read_exact(&mut bytes, "a payload").await?;
            of_status = Some(bytes);
        }
        let action = match self.stop_at {
            Some(_) => Err(refuse(errno::ESHUTDOWN, "the server stops")),
            None => self.shared.agreed().check(&open.request, of_status.as_deref()),
        };
        let action = match action {
            Ok(action) => action,
            Err(refusal) => {
                if of_status.is_none() {
                    self.skip(payload).await?;
                }
                open.answer(Err(refusal));
                return Ok(());
            }
        };
        let held = open.held.as_mut().expect("it is not answered yet");
        let memory = &self.shared.memory;
        let memory_bytes = action.memory_bytes();
        if memory_bytes > 0 {
            held.cap = Some(memory.share(memory_bytes).await);
        }
        let buffer = match &action {
            Action::Status(..) => {
                held.memory = Some(memory.hold(memory_bytes).await);
                None
            }
            Action::Read(range, _) => Some(self.buffer(range.len()).await),
            Action::Write(range, _) => {
                let mut buffer = self.buffer(range.len()).await;
                self.read_exact(&mut buffer, "a payload").await?;
                Some(buffer)
            }
            _ => None,
        };
        tokio::spawn(async move {
            let Shared { export, memory, .. } = &*open.shared;
            let outcome = execute(export, action, buffer, memory).await;
            open.answer(outcome);
        });
        Ok(())
    }

    async fn buffer(&mut self, len: u64) -> Buffer {
        assert!(len <= PAYLOAD_BYTES_MAX, "a request's length was checked");
        self.shared.memory.take(usize::try_from(len).expect("at most 32 MiB")).await
    }

    /// Reads a payload that nobody wants.
    async fn skip(&mut self, mut rest: u64) -> Result<(), End> {
        let mut piece = [0; 8192];
        let mut pace = Pace::new("a payload", self.stall, rest);
        while rest > 0 {
            let take = usize::try_from(rest).unwrap_or(usize::MAX).min(piece.len());
            rest -= self.read(&mut piece[..take], &mut pace).await? as u64;
        }
        Ok(())
    }

    /// Fills `bytes`.
    async fn read_exact(&mut self, bytes: &mut [u8], what: &'static str) -> Result<(), End> {
        let mut pace = Pace::new(what, self.stall, bytes.len() as u64);
        let mut done = 0;
        while done < bytes.len() {
            done += self.read(&mut bytes[done..], &mut pace).await?;
        }
        Ok(())
    }

    /// Reads a byte at least.
    async fn read(&mut self, bytes: &mut [u8], pace: &mut Pace) -> Result<usize, End> {
        match pace.step(self.half.read(bytes)).await? {
            0 => Err(End::Lost(std::io::ErrorKind::UnexpectedEof.into())),
            read => Ok(read),
        }
    }
}

/// The writing side: ends when there can be no more replies and all are written.
async fn write(
    mut replies: mpsc::Receiver<Reply>,
    mut half: WriteHalf,
    stall: Duration,
) -> Result<(), End> {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    while replies.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let mut slices = Vec::with_capacity(4 * BATCH_MAX);
        for reply in &batch {
            reply.slices(&mut slices);
        }
        let mut rest = &mut slices[..];
        let batch_bytes = rest.iter().map(|slice| slice.len() as u64).sum();
        let mut pace = Pace::new("a reply", stall, batch_bytes);
        while !rest.is_empty() {
            let written = pace.step(half.write_vectored(rest)).await?;
            if written == 0 {
                return Err(End::Lost(std::io::ErrorKind::WriteZero.into()));
            }
            IoSlice::advance_slices(&mut rest, written);
        }
        pace.step(async { half.flush().await.map(|()| 0) }).await?;
        batch.clear();
    }
    // The client may have hung up first: everything it asked for is answered.
    let _ = timeout(stall, half.shutdown()).await;
    Ok(())
}
