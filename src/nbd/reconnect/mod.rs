//! An export that is used to its end although its server, or the way to it, breaks down in between.
//!
//! ```text
//!  request ─► client ─ lost ─► wait ─► open again ─► same export? ─► [write again] ─► request again
//!                       └ so many times, each wait twice as long as the last ┘
//! ```
//!
//! Only for exports that nobody else changes. The size, the flags and the block sizes are compared
//! when an export comes back, which finds another disk, not another state of the same one; so it is
//! the user who asks for this, for no backup does. How a source ([`ReconnectingClient`]) and a target
//! ([`ReconnectingTarget`]) go on differs: a server that comes back may have lost what it had not
//! made durable.
//!
//! Requests that fail together wait together: whoever comes first opens the export for all.

mod log;
mod source;
mod target;

pub use source::ReconnectingClient;
pub use target::ReconnectingTarget;

use std::sync::Arc;
use std::time::Duration;

use super::client::{Client, ClientOptions};
use super::uri::NbdUri;
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

/// How an export is opened, and opened again.
struct Way {
    uri: NbdUri,
    options: ClientOptions,
    retries: Retries,
    on_lost: OnLost,
}

impl Way {
    /// Opens the export; this first time is not repeated, because what fails at once is more likely
    /// a wrong address.
    async fn open(&self) -> Result<Arc<Client>> {
        Ok(Arc::new(Box::pin(Client::open_uri(&self.uri, self.options.clone())).await?))
    }

    /// Waits and opens the export again. `None` if it cannot be reached, which is no error yet: the
    /// next request fails, and comes here again.
    async fn again(
        &self,
        before: &Client,
        attempt: u32,
        why: &Error,
    ) -> Result<Option<Arc<Client>>> {
        let delay =
            self.retries.delay.saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX));
        let delay = delay.min(DELAY_MAX);
        let seconds = delay.as_secs();
        (self.on_lost)(format!("{} was lost ({why}): trying again in {seconds} s", self.uri));
        tokio::time::sleep(delay).await;
        match self.open().await {
            Ok(client) => {
                self.check_same(before, &client)?;
                Ok(Some(client))
            }
            Err(error) => match error.kind() {
                // A server that is starting is not there yet, or does not know the export yet.
                Kind::Connection | Kind::Timeout | Kind::NotFound => {
                    tracing::debug!(uri = %self.uri, %error, "the export is not back yet");
                    Ok(None)
                }
                _ => Err(error.context("the export was lost and cannot be opened again")),
            },
        }
    }

    /// Gives back the error of a request that is not to be repeated.
    fn may_repeat(&self, attempt: u32, error: Error) -> Result<Error> {
        if !is_lost(&error) || self.retries.attempts == 0 {
            return Err(error);
        }
        if attempt == self.retries.attempts {
            return Err(error.context(format!("{attempt} attempts to go on failed")));
        }
        Ok(error)
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

/// Whether the request failed with its connection.
fn is_lost(error: &Error) -> bool {
    matches!(error.kind(), Kind::Connection | Kind::Timeout)
}
