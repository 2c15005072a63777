//! What can go wrong between us and an NBD server, for decisions made in this folder.
//!
//! The error is cloneable because the death of a connection is told to every request in flight.
//! It converts into [`crate::error::Error`] at the border.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::wire::errno;
use crate::error::{Error, Kind};

/// A failure; names the peer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NbdError {
    /// The server sent what it must not send. The connection is closed.
    #[error("NBD server {peer} broke the protocol: {rule}")]
    Violation {
        /// Who.
        peer: Arc<str>,
        /// Which rule, with the offending number.
        rule: Arc<str>,
    },
    /// The server answered a command with an error; the connection goes on.
    #[error("NBD server {peer} failed {what}: {}", describe(*.errno, .message))]
    Refused {
        /// Who.
        peer: Arc<str>,
        /// Command and range.
        what: Arc<str>,
        /// Error number on the wire.
        errno: u32,
        /// What the server says about it; may be empty.
        message: Arc<str>,
    },
    /// The connection broke.
    #[error("connection to NBD server {peer} lost")]
    Lost {
        /// Who.
        peer: Arc<str>,
        /// Why.
        #[source]
        cause: Arc<io::Error>,
    },
    /// Too little moved for too long.
    #[error("NBD server {peer} did not answer for {} s", .after.as_secs())]
    Stalled {
        /// Who.
        peer: Arc<str>,
        /// How long.
        after: Duration,
    },
    /// We closed the connection ourselves.
    #[error("connection to NBD server {peer} is closed")]
    Closed {
        /// Who.
        peer: Arc<str>,
    },
}

impl NbdError {
    /// The error number, if the server answered with one.
    pub fn errno(&self) -> Option<u32> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// The kind at the border.
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Violation { .. } => Kind::Protocol,
            Self::Lost { .. } | Self::Closed { .. } => Kind::Connection,
            Self::Stalled { .. } => Kind::Timeout,
            Self::Refused { errno, .. } => match *errno {
                errno::EPERM => Kind::Permission,
                errno::ENOSPC => Kind::NoSpace,
                errno::ENOTSUP => Kind::Unsupported,
                errno::ESHUTDOWN => Kind::Connection,
                _ => Kind::Io,
            },
        }
    }
}

impl From<NbdError> for Error {
    fn from(error: NbdError) -> Self {
        let kind = error.kind();
        match error {
            // The cause is given as the source, so the message must not repeat the chain.
            NbdError::Lost { ref cause, .. } => {
                Self::new(kind, error.to_string()).source(Arc::clone(cause))
            }
            _ => Self::new(kind, error.to_string()),
        }
    }
}

fn describe(errno: u32, message: &str) -> String {
    let name = match errno {
        errno::EPERM => "not permitted",
        errno::EIO => "input/output error",
        errno::ENOMEM => "server out of memory",
        errno::EINVAL => "invalid argument",
        errno::ENOSPC => "no space left",
        errno::EOVERFLOW => "too large",
        errno::ENOTSUP => "not supported",
        errno::ESHUTDOWN => "server is shutting down",
        _ => "unknown error",
    };
    if message.is_empty() {
        format!("{name} ({errno})")
    } else {
        format!("{name} ({errno}): {message}")
    }
}

/// Shorthand for a broken rule.
pub(super) fn violation(peer: &Arc<str>, rule: impl Into<Arc<str>>) -> NbdError {
    NbdError::Violation { peer: Arc::clone(peer), rule: rule.into() }
}

/// Shorthand for a broken connection.
pub(super) fn lost(peer: &Arc<str>, cause: io::Error) -> NbdError {
    NbdError::Lost { peer: Arc::clone(peer), cause: Arc::new(cause) }
}
