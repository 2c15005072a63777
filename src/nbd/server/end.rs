//! Why a session ended.

use std::io;

use crate::error::{Error, Kind};

/// The end of a session, for decisions in this folder and for the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The client said goodbye, or hung up between two requests.
    #[error("the client left")]
    Left,
    /// The server stops.
    #[error("the server stops")]
    Stopped,
    /// The client sent what it must not send.
    #[error("it broke the protocol: {0}")]
    Violation(String),
    /// The connection broke.
    #[error("the connection broke")]
    Lost(#[from] io::Error),
    /// The TLS handshake failed.
    #[error("no TLS")]
    Tls(Error),
    /// Too little moved for too long.
    #[error("too little moved for {0} s in the middle of {1}")]
    Stalled(u64, &'static str),
    /// There were too many in the handshake, and it was there longest.
    #[error("it had not finished the handshake, and others wait")]
    Unfinished,
    /// All places were taken, and it had made no use of its own.
    #[error("it has never made a request, and others wait for a place")]
    Unused,
    /// All places are taken.
    #[error("all {0} places are taken")]
    Full(usize),
}

impl End {
    /// `Ok` for the ways in which sessions should end.
    pub(super) fn into_result(self, peer: &str) -> Result<(), Error> {
        let kind = match &self {
            Self::Left | Self::Stopped => return Ok(()),
            Self::Violation(_) => Kind::Protocol,
            Self::Stalled(..) => Kind::Timeout,
            Self::Unfinished | Self::Unused | Self::Full(_) => Kind::Busy,
            Self::Lost(_) | Self::Tls(_) => Kind::Connection,
        };
        if let Self::Tls(error) = self {
            // It names the client and says why.
            return Err(error);
        }
        let error = Error::new(kind, format!("NBD client {peer}: {self}"));
        Err(match self {
            Self::Lost(cause) => error.source(cause),
            _ => error,
        })
    }
}

/// Shorthand for a broken rule.
pub(super) fn violation(rule: impl Into<String>) -> End {
    End::Violation(rule.into())
}
