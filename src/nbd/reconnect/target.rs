//! A target that is written to its end: what may have been lost is written again.
//!
//! ```text
//!  change ─► answered ─► log ──(full, or at the end)──► flush ─► forgotten
//!                         └── lost: open again ─► samples still there? ─► all of the log again
//! ```
//!
//! Invariants:
//! - *Nothing is counted as written but in the round it was answered in*: an answer of a server that
//!   was lost meanwhile counts for nothing, the change is made again.
//! - *Order does not matter*: each byte is given one content only, so a request of a lost connection
//!   that its server still executes later changes nothing. Hence a target that is to come back is
//!   never cleared in advance.
//! - *Bounded*: the log holds [`LOG_BYTES`] and what is in flight. A target that cannot flush is
//!   followed so far and no further.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::log::{Change, Log};
use super::{OnLost, Retries, Way, is_lost};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use crate::error::{Error, Kind, Result};
use crate::nbd::client::{Client, ClientOptions};
use crate::nbd::uri::NbdUri;
use crate::nbd::wire::export;

/// Bytes that wait for a flush: few flushes, and no more memory than a copy has in flight.
const LOG_BYTES: usize = 64 << 20;

/// An export being written that is opened again when it is lost.
pub struct ReconnectingTarget {
    way: Way,
    first: First,
    state: Mutex<State>,
    /// Held while the target is flushed: who finds the log full waits here.
    flushing: Mutex<()>,
}

/// What does not change when the export comes back.
struct First {
    geometry: Geometry,
    starts_zero: bool,
    can_zero: bool,
    can_flush: bool,
}

struct State {
    client: Arc<Client>,
    /// Attempts to open it again, successful or not.
    round: u64,
    log: Log,
}

impl ReconnectingTarget {
    /// Opens the export for writing; this first time is not repeated.
    pub async fn open(
        uri: NbdUri,
        options: ClientOptions,
        retries: Retries,
        on_lost: OnLost,
    ) -> Result<Self> {
        let way = Way { uri, options, retries, on_lost };
        let client = way.open().await?;
        let first = First {
            geometry: BlockSink::geometry(&*client),
            starts_zero: client.starts_zero(),
            can_zero: client.can_zero(),
            can_flush: client.export().has(export::SEND_FLUSH),
        };
        let state = Mutex::new(State { client, round: 0, log: Log::new() });
        Ok(Self { way, first, state, flushing: Mutex::new(()) })
    }

    /// Whether what is written can be made durable.
    pub fn can_flush(&self) -> bool {
        self.first.can_flush
    }

    async fn current(&self) -> (Arc<Client>, u64) {
        let state = self.state.lock().await;
        (Arc::clone(&state.client), state.round)
    }

    /// Makes a change until it is answered and in the log.
    async fn change(&self, change: Change) -> Result<()> {
        let mut attempt = 0;
        loop {
            let (client, round) = self.current().await;
            match change.apply(&client).await {
                Ok(()) => {
                    let mut state = self.state.lock().await;
                    if state.round == round {
                        state.log.push(change);
                        break;
                    }
                }
                Err(error) => self.lost(round, &mut attempt, error).await?,
            }
        }
        self.make_room().await
    }

    /// Asks until there is an answer.
    async fn ask<T>(&self, request: impl AsyncFn(Arc<Client>) -> Result<T>) -> Result<T> {
        let mut attempt = 0;
        loop {
            let (client, round) = self.current().await;
            match request(client).await {
                Err(error) => self.lost(round, &mut attempt, error).await?,
                answered => return answered,
            }
        }
    }

    /// Flushes the target when the log is full.
    async fn make_room(&self) -> Result<()> {
        if self.state.lock().await.log.bytes() < LOG_BYTES {
            return Ok(());
        }
        let _turn = self.flushing.lock().await;
        let mut state = self.state.lock().await;
        if state.log.bytes() < LOG_BYTES {
            return Ok(());
        }
        if !self.first.can_flush {
            state.log.give_up();
            return Ok(());
        }
        drop(state);
        self.flush_log().await
    }

    /// Makes durable what is in the log now; the caller holds `flushing`.
    async fn flush_log(&self) -> Result<()> {
        let mut attempt = 0;
        loop {
            let (client, round, count) = {
                let state = self.state.lock().await;
                (Arc::clone(&state.client), state.round, state.log.count())
            };
            match client.flush().await {
                Ok(()) => {
                    let mut state = self.state.lock().await;
                    if state.round == round {
                        state.log.made_durable(count);
                        return Ok(());
                    }
                }
                Err(error) => self.lost(round, &mut attempt, error).await?,
            }
        }
    }

    /// After the failure of a request: the target is back, or this is the end.
    async fn lost(&self, round: u64, attempt: &mut u32, error: Error) -> Result<()> {
        let error = self.way.may_repeat(*attempt, error)?;
        self.open_again(round, *attempt, error).await?;
        *attempt += 1;
        Ok(())
    }

    /// Opens the export again and brings it to where it was, unless another did since `round`.
    async fn open_again(&self, round: u64, attempt: u32, why: Error) -> Result<()> {
        let mut state = self.state.lock().await;
        if state.round != round {
            return Ok(());
        }
        if !state.log.is_complete() {
            let message = "what was written may be lost with the connection: the server has no \
                           flush";
            return Err(why.context(message).hint("copy it from the start"));
        }
        let found = self.way.again(&state.client, attempt, &why).await?;
        state.round += 1;
        let Some(client) = found else { return Ok(()) };
        match state.log.repeat(&client).await {
            Ok(()) => {
                state.client = client;
                Ok(())
            }
            // Lost once more: the next request finds out.
            Err(error) if is_lost(&error) => {
                tracing::debug!(uri = %self.way.uri, %error, "the export went away again");
                Ok(())
            }
            Err(error) => Err(error.context("cannot write again what may have been lost")),
        }
    }
}

#[async_trait]
impl BlockSink for ReconnectingTarget {
    fn geometry(&self) -> Geometry {
        self.first.geometry
    }

    fn starts_zero(&self) -> bool {
        self.first.starts_zero
    }

    fn can_zero(&self) -> bool {
        self.first.can_zero
    }

    async fn existing(&self, range: ByteRange) -> Result<ExtentMap> {
        self.ask(async move |client: Arc<Client>| client.existing(range).await).await
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        // A copy for the log: the caller's buffer is part of a budget that the log would use up.
        let bytes = Arc::new(Buffer::unbudgeted(buffer.to_vec()));
        drop(buffer);
        self.change(Change::Write(offset, bytes)).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if mode == ZeroMode::FastOnly {
            let message = format!("{} may come back and is not cleared in advance", self.way.uri);
            return Err(Error::new(Kind::Unsupported, message));
        }
        self.change(Change::Zero(range, mode)).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        let (client, _) = self.current().await;
        client.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        let _turn = self.flushing.lock().await;
        self.flush_log().await
    }
}

/// What was written, read back.
#[async_trait]
impl BlockSource for ReconnectingTarget {
    fn geometry(&self) -> Geometry {
        self.first.geometry
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.ask(async move |client: Arc<Client>| client.extents(range).await).await
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let len = buffer.len();
        let read = async move |client: Arc<Client>| {
            client.read(offset, Buffer::unbudgeted(vec![0; len])).await
        };
        let found = self.ask(read).await?;
        buffer.copy_from_slice(&found);
        Ok(buffer)
    }
}
