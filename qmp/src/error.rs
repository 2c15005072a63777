//! What can go wrong between a controller and a monitor or agent.
//!
//! Each variant names the peer or the command; causes are sources, never text. [`Error::kind`] is
//! the part a caller decides on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error as ThisError;

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a monitor or agent connection.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// No connection to the socket.
    #[error("cannot connect to {peer}")]
    Connect {
        /// The address.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket took the connection but nobody greeted: a monitor serves one client at a time.
    #[error(
        "{peer} did not answer within {waited:?}: another client holds it, or its process hangs"
    )]
    Occupied {
        /// The address.
        peer: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The peer broke the protocol; the connection is given up.
    #[error("{peer} broke the protocol: {rule}")]
    Protocol {
        /// The address.
        peer: String,
        /// The rule it broke.
        rule: &'static str,
        /// What the parser said, if it was malformed text.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The connection is gone; the command may or may not have been carried out.
    #[error("connection to {peer} is closed")]
    Closed {
        /// The address.
        peer: String,
        /// Why it was closed, unless the peer just closed it.
        #[source]
        source: Option<Arc<Error>>,
    },
    /// Input or output on the connection failed.
    #[error("connection to {peer} broke")]
    Io {
        /// The address.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer refused the command.
    #[error("{command} failed: {message}")]
    Refused {
        /// The command.
        command: String,
        /// The class of the error.
        class: ErrorClass,
        /// The peer's own words.
        message: String,
    },
    /// No answer in time; the command may still be carried out later.
    #[error("{command} was not answered within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// The time given.
        after: Duration,
    },
    /// The answer has not the shape it must have.
    #[error("the answer to {command} is not understood")]
    Reply {
        /// The command.
        command: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// Too many commands wait for answers at once.
    #[error("{command} not sent to {peer}: {limit} commands are unanswered")]
    Overloaded {
        /// The address.
        peer: String,
        /// The command.
        command: String,
        /// The limit.
        limit: usize,
    },
}

/// The error classes of QMP (qapi/error.json); new code should not tell others apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Nothing special.
    Generic,
    /// The command does not exist in this QEMU.
    CommandNotFound,
    /// The device, node or job does not exist.
    DeviceNotFound,
    /// The device is not active.
    DeviceNotActive,
    /// A class this crate does not know.
    Other(String),
}

impl ErrorClass {
    pub(crate) fn from_wire(class: &str) -> Self {
        match class {
            "GenericError" => Self::Generic,
            "CommandNotFound" => Self::CommandNotFound,
            "DeviceNotFound" => Self::DeviceNotFound,
            "DeviceNotActive" => Self::DeviceNotActive,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// What sort of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// No connection, or it ended.
    Connection,
    /// Somebody else holds the socket.
    Occupied,
    /// The peer broke the protocol or answered in an unknown shape.
    Protocol,
    /// The peer refused the command.
    Refused,
    /// The object named in the command does not exist.
    NotFound,
    /// This QEMU lacks the command.
    Unsupported,
    /// A wait ended without an answer.
    Timeout,
}

impl Error {
    /// The kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Connect { .. } | Self::Closed { .. } | Self::Io { .. } => Kind::Connection,
            Self::Occupied { .. } | Self::Overloaded { .. } => Kind::Occupied,
            Self::Protocol { .. } | Self::Reply { .. } => Kind::Protocol,
            Self::Refused { class: ErrorClass::CommandNotFound, .. } => Kind::Unsupported,
            Self::Refused { class: ErrorClass::DeviceNotFound, .. } => Kind::NotFound,
            Self::Refused { .. } => Kind::Refused,
            Self::Timeout { .. } => Kind::Timeout,
        }
    }

    /// The peer's own words, if it refused a command.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused { message, .. } => Some(message),
            _ => None,
        }
    }
}
