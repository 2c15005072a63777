//! An NBD server: any [`BlockSource`], and any disk that is a [`BlockSink`] too, for any client.
//!
//! ```text
//!  Listener ─► Stream ─► negotiate ─► Ready ─► session ─► reader, tasks, writer
//!                          │ options            │ request (rules) ─► execute ─► reply (bytes)
//!                          └ exports, contexts  └ limits
//! ```
//!
//! Contract:
//! - The client is not trusted. Every number it sends is checked before it is used, no memory is
//!   taken for a length that was not checked, all that it can make us hold has a limit
//!   ([`Limits`]), and a client that breaks a rule gets an error or a disconnect, and the log a
//!   line that names the rule. No client can slow another by not reading or not writing, nor keep
//!   another out by not finishing the handshake or by never asking for anything.
//! - A request that was read is answered once, with what the disk said: a failed read is an error,
//!   never zeroes or old data.
//! - A disk is open before the first client comes and stays open when the last has left; flushing
//!   at the end is the business of whoever made it. FLUSH and FUA mean [`BlockSink::flush`], which
//!   covers every completed write whichever connection it came over; therefore several connections
//!   are offered.
//! - [`Server::stop`] lets requests in progress end, refuses new ones with ESHUTDOWN, closes.
//!
//! - With a [`ServerTls`] that requires TLS, a client is told nothing before it is inside TLS.
//!
//! Deliberately not here: formats, oldstyle (obsolete; no client needs it).
//!
//! [`BlockSource`]: crate::block::BlockSource
//! [`BlockSink`]: crate::block::BlockSink
//! [`BlockSink::flush`]: crate::block::BlockSink::flush

mod contexts;
mod end;
mod execute;
mod exports;
mod limits;
mod listen;
mod memory;
mod negotiate;
mod options;
mod pace;
mod places;
mod reply;
mod request;
mod session;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::stream::Stream;
use super::tls::ServerTls;
use crate::error::{Result, with_causes};
use end::End;
use memory::Memory;
use places::{Place, Places};

pub use exports::{Export, Exports, Grown, Growth};
pub use limits::Limits;
pub use listen::Listener;

/// Pause after a failed accept (no file descriptors left, say), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A server. Clones serve the same exports and stop together.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    exports: Exports,
    tls: Option<ServerTls>,
    limits: Limits,
    stop: CancellationToken,
    places: Places,
    memory: Memory,
}

impl Server {
    /// A server of these exports, to nobody yet, in plain text.
    pub fn new(exports: Exports, limits: Limits) -> Self {
        Self::with_tls(exports, limits, None)
    }

    /// A server that offers TLS, or requires it.
    pub fn with_tls(exports: Exports, limits: Limits, tls: Option<ServerTls>) -> Self {
        let (places, memory) = (Places::new(limits), Memory::new(&limits));
        let stop = CancellationToken::new();
        Self { shared: Arc::new(Shared { exports, tls, limits, stop, places, memory }) }
    }

    /// Takes clients until [`Server::stop`], then waits until the last is gone (at most
    /// [`Limits::drain`] and a little). Dropping it cuts every client off.
    pub async fn listen(&self, listener: Listener) {
        let stop = &self.shared.stop;
        let mut sessions = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                // Reaped as they end, so that the set does not grow.
                Some(_) = sessions.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let server = self.clone();
                    // In the order in which they came, which is not that in which tasks begin.
                    let lobby = self.shared.places.enter();
                    sessions.spawn(async move {
                        // Told to the log in there; the server goes on.
                        let _ = server.session_of(stream, &peer, lobby).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // The socket goes before the clients do: nobody new gets a place to wait in.
        drop(listener);
        while sessions.join_next().await.is_some() {}
    }

    /// Serves one client; `peer` names it in the log and in errors. An error is how the client
    /// failed, not the server.
    pub async fn session(&self, stream: Box<dyn Stream>, peer: &str) -> Result<()> {
        self.session_of(stream, peer, self.shared.places.enter()).await
    }

    /// The same for a client that has a place to negotiate in.
    async fn session_of(&self, stream: Box<dyn Stream>, peer: &str, lobby: Place) -> Result<()> {
        tracing::debug!(peer, "a client came");
        let Shared { exports, tls, limits, stop, places, memory } = &*self.shared;
        let offer = negotiate::Offer { exports, tls: tls.as_ref(), places, peer };
        let negotiated = negotiate::negotiate(stream, offer, stop);
        let negotiated = tokio::select! {
            biased;
            negotiated = tokio::time::timeout(limits.handshake, negotiated) => negotiated
                .unwrap_or(Err(End::Stalled(limits.handshake.as_secs(), "the handshake"))),
            () = lobby.cut() => Err(End::Unfinished),
            () = grace(stop) => Err(End::Stopped),
        };
        drop(lobby);
        let end = match negotiated {
            Ok(ready) => session::serve(ready, memory.of_connection(), limits, stop).await,
            Err(end) => end,
        };
        let result = end.into_result(peer);
        match &result {
            Ok(()) => tracing::debug!(peer, "a client left"),
            Err(error) => {
                let reason = with_causes(error);
                tracing::warn!(peer, reason, "a client was cut off");
            }
        }
        result
    }

    /// Asks everything to end.
    pub fn stop(&self) {
        self.shared.stop.cancel();
    }
}

/// Ends a little after the server was stopped: who is in the middle of a handshake hears of it.
async fn grace(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(limits::STOP_GRACE).await;
}
