//! An export that is read to its end although its server, or the way to it, breaks down in between.
//!
//! ```text
//!  read ─► client ─ lost ─► wait ─► open again ─► same export? ─► read again
//!                    └ so many times, each wait twice as long as the last ┘
//! ```
//!
//! For reading only: a server that comes back may have lost what it had not made durable, and nobody
//! would know which writes those were. And for exports that do not change: what is read after the
//! break has to belong to what was read before. The size, the flags and the block sizes are compared,
//! which finds another disk, not another state of the same one; so it is the user who asks for this,
//! for no backup does.
//!
//! Requests that fail together wait together: whoever comes first opens the export for all.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::client::{Client, ClientOptions};
use super::uri::NbdUri;
use crate::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry};
use crate::error::{Error, Kind, Result};

/// Longest wait before an attempt.
const DELAY_MAX: Duration = Duration::from_secs(60);

/// How often an export is opened again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retries {
    /// Attempts for a request that fails, after the first.
    pub attempts: u32,
    /// Wait before the first of them; the next is twice as long, up to a minute.
    pub delay: Duration,
}

/// Is told, in a sentence, that the export was lost.
pub type OnLost = Box<dyn Fn(String) + Send + Sync>;

/// An export that is opened again when it is lost.
pub struct ReconnectingClient {
    on_lost: OnLost,
    uri: NbdUri,
    options: ClientOptions,
    retries: Retries,
    geometry: Geometry,
    state: Mutex<State>,
}

struct State {
    client: Arc<Client>,
    /// Attempts to open it again, successful or not.
    round: u64,
}

impl ReconnectingClient {
    /// Opens the export; this first time is not repeated, because what fails at once is more likely
    /// a wrong address.
    pub async fn open(
        uri: NbdUri,
        options: ClientOptions,
        retries: Retries,
        on_lost: OnLost,
    ) -> Result<Self> {
        let client = Arc::new(Box::pin(Client::open_uri(&uri, options.clone())).await?);
        let geometry = BlockSource::geometry(&*client);
        let state = Mutex::new(State { client, round: 0 });
        Ok(Self { on_lost, uri, options, retries, geometry, state })
    }

    /// Asks until there is an answer, or the attempts are used up.
    async fn ask<T>(&self, request: impl AsyncFn(Arc<Client>) -> Result<T>) -> Result<T> {
        let mut attempt = 0;
        loop {
            let (client, round) = {
                let state = self.state.lock().await;
                (Arc::clone(&state.client), state.round)
            };
            let error = match request(client).await {
                Err(error) if matches!(error.kind(), Kind::Connection | Kind::Timeout) => error,
                answered => return answered,
            };
            if attempt == self.retries.attempts {
                return Err(match attempt {
                    0 => error,
                    _ => error.context(format!("{attempt} attempts to go on failed")),
                });
            }
            self.open_again(round, attempt, &error).await?;
            attempt += 1;
        }
    }

    /// Opens the export again, unless another did since `round`. That it cannot be reached is no
    /// error yet: the next request fails, and comes here again.
    async fn open_again(&self, round: u64, attempt: u32, why: &Error) -> Result<()> {
        let mut state = self.state.lock().await;
        if state.round != round {
            return Ok(());
        }
        let delay =
            self.retries.delay.saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX));
        let delay = delay.min(DELAY_MAX);
        let seconds = delay.as_secs();
        (self.on_lost)(format!("{} was lost ({why}): trying again in {seconds} s", self.uri));
        tokio::time::sleep(delay).await;
        state.round += 1;
        match Box::pin(Client::open_uri(&self.uri, self.options.clone())).await {
            Ok(client) => {
                self.check_same(&state.client, &client)?;
                state.client = Arc::new(client);
                Ok(())
            }
            Err(error) => match error.kind() {
                // A server that is starting is not there yet, or does not know the export yet.
                Kind::Connection | Kind::Timeout | Kind::NotFound => {
                    tracing::debug!(uri = %self.uri, %error, "the export is not back yet");
                    Ok(())
                }
                _ => Err(error.context("the export was lost and cannot be opened again")),
            },
        }
    }

    fn check_same(&self, before: &Client, after: &Client) -> Result<()> {
        let key = |client: &Client| {
            let export = client.export();
            (export.size_bytes, export.transmission_flags, export.block_sizes)
        };
        if key(before) == key(after) && before.tls().is_some() == after.tls().is_some() {
            return Ok(());
        }
        let message = format!("{} was lost and came back as another export", self.uri);
        Err(Error::new(Kind::Mismatch, message).hint("copy it from the start"))
    }
}

#[async_trait]
impl BlockSource for ReconnectingClient {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.ask(async move |client: Arc<Client>| client.extents(range).await).await
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        // A request that is lost takes its buffer along, and with it what is in there beside the
        // window: the caller's stays here. That is a copy, and twice the memory in flight.
        let len = buffer.len();
        let read = async move |client: Arc<Client>| {
            client.read(offset, Buffer::unbudgeted(vec![0; len])).await
        };
        let found = self.ask(read).await?;
        buffer.copy_from_slice(&found);
        Ok(buffer)
    }
}
