//! A source that is read to its end: what was lost is read again.
//!
//! For exports that do not change: what is read after the break has to belong to what was read
//! before it.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::{OnLost, Retries, Way};
use crate::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry};
use crate::error::{Error, Result};
use crate::nbd::client::{Client, ClientOptions};
use crate::nbd::uri::NbdUri;

/// An export that is opened again when it is lost.
pub struct ReconnectingClient {
    way: Way,
    geometry: Geometry,
    state: Mutex<State>,
}

struct State {
    client: Arc<Client>,
    /// Attempts to open it again, successful or not.
    round: u64,
}

impl ReconnectingClient {
    /// Opens the export; this first time is not repeated.
    pub async fn open(
        uri: NbdUri,
        options: ClientOptions,
        retries: Retries,
        on_lost: OnLost,
    ) -> Result<Self> {
        let way = Way { uri, options, retries, on_lost };
        let client = way.open().await?;
        let geometry = BlockSource::geometry(&*client);
        Ok(Self { way, geometry, state: Mutex::new(State { client, round: 0 }) })
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
                Err(error) => self.way.may_repeat(attempt, error)?,
                answered => return answered,
            };
            self.open_again(round, attempt, &error).await?;
            attempt += 1;
        }
    }

    /// Opens the export again, unless another did since `round`.
    async fn open_again(&self, round: u64, attempt: u32, why: &Error) -> Result<()> {
        let mut state = self.state.lock().await;
        if state.round != round {
            return Ok(());
        }
        let found = self.way.again(&state.client, attempt, why).await?;
        state.round += 1;
        if let Some(client) = found {
            state.client = client;
        }
        Ok(())
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
