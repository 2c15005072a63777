//! The one error type that crosses layer boundaries, and the kinds a caller may decide on.
//!
//! Modules with decisions of their own to make (the repository, the NBD client) keep their own
//! error enums and convert into this one at their border. An [`Error`] carries a stable [`Kind`]
//! (which alone picks the exit code, in `cli::exit`), a message that names *what failed on which
//! object*, an optional hint with the next step, and the cause as `source()`; a cause is never
//! formatted into the message, so that a face can print the chain once.

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;

/// Result with the crate's border error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What to do about a file system that nobody may write to.
pub(crate) const READ_ONLY: &str = "the file system is mounted read-only: choose another place, or mount it for writing \
     ('mount -o remount,rw'); after errors of its disk the kernel makes it so, see 'dmesg'";

/// What sort of failure this is: the only part of an error that code decides on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The request itself is wrong: an option, a name, a number.
    Usage,
    /// The named object does not exist.
    NotFound,
    /// The name means more than one object; the message lists them.
    Ambiguous,
    /// The object is there already and must not be replaced.
    AlreadyExists,
    /// The operating system or a daemon denied access.
    Permission,
    /// Another job, migration, writer or lock holds the object; trying later may work.
    Busy,
    /// This version, format or device cannot do it.
    Unsupported,
    /// Scratch, repository or target is full.
    NoSpace,
    /// Stored data does not match its hash, seal or structure.
    Corrupt,
    /// Password or key does not open the repository.
    WrongKey,
    /// Written by a newer version of this program.
    TooNew,
    /// A connection could not be made or broke.
    Connection,
    /// A peer broke its protocol; the message names the peer and the rule.
    Protocol,
    /// A wait reached its deadline.
    Timeout,
    /// The point in time ended before the last read: nothing that was read may be trusted.
    SnapshotLost,
    /// There is nothing an incremental could build on.
    NoBase,
    /// Two things that had to be equal differ (verification).
    Mismatch,
    /// What was asked for is done, and what had to follow it is not: somebody must look.
    Unfinished,
    /// The user or a signal asked to stop.
    Cancelled,
    /// Input or output failed below us.
    Io,
    /// An invariant of ours does not hold: a bug.
    Internal,
}

/// An error with kind, message, hint and cause. One pointer wide.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `message` says what failed, on which object (no trailing full stop).
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), hint: None, source: None }))
    }

    /// Adds the next step for the person who reads it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// All of it, with causes and hint, for a place where a line of text is told.
    pub fn in_one_line(&self) -> String {
        match &self.0.hint {
            Some(hint) => format!("{} (hint: {hint})", with_causes(self)),
            None => with_causes(self),
        }
    }

    /// Wraps this error into one that says more of the context and keeps kind and hint.
    #[must_use]
    pub fn context(self, message: impl Into<String>) -> Self {
        let (kind, hint) = (self.0.kind, self.0.hint.clone());
        Self(Box::new(Inner { kind, message: message.into(), hint, source: Some(Box::new(self)) }))
    }

    /// The same error once more, its causes as text: for a reason that is kept and told whenever
    /// somebody asks for it.
    #[must_use]
    pub fn again(&self) -> Self {
        let mut again = Self::new(self.kind(), self.to_string());
        again.0.hint.clone_from(&self.0.hint);
        match &self.0.source {
            Some(cause) => again.source(with_causes(&**cause)),
            None => again,
        }
    }

    /// An I/O error on a named object; kind and, where there is one for all, hint follow the error
    /// number.
    pub fn io(message: impl Into<String>, error: std::io::Error) -> Self {
        let kind = kind_of_io(&error);
        let is_read_only = error.kind() == std::io::ErrorKind::ReadOnlyFilesystem;
        let wrapped = Self::new(kind, message).source(error);
        if is_read_only {
            return wrapped.hint(READ_ONLY);
        }
        match kind {
            Kind::NoSpace => wrapped.hint("free space there, or choose another place"),
            _ => wrapped,
        }
    }

    /// The same for a file that cannot be opened, with the next step where there is one.
    pub fn open(path: &Path, error: std::io::Error) -> Self {
        let wrapped = Self::io(format!("cannot open {}", path.display()), error);
        match wrapped.kind() {
            Kind::NotFound => wrapped.hint("check the path"),
            Kind::Permission if wrapped.hint_text().is_none() => {
                wrapped.hint("run as root, or as a user who may open it")
            }
            _ => wrapped,
        }
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The next step, if one is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

/// An error and its causes on one line, for a log or where a reason is one line of text.
pub fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Maps an operating system error to the kind a caller decides on.
fn kind_of_io(error: &std::io::Error) -> Kind {
    use std::io::ErrorKind as E;
    match error.kind() {
        E::NotFound => Kind::NotFound,
        E::PermissionDenied | E::ReadOnlyFilesystem => Kind::Permission,
        E::AlreadyExists => Kind::AlreadyExists,
        E::StorageFull | E::QuotaExceeded => Kind::NoSpace,
        // A limit of the file system, which no room made helps against.
        E::FileTooLarge => Kind::Unsupported,
        E::TimedOut => Kind::Timeout,
        E::ResourceBusy | E::WouldBlock | E::ExecutableFileBusy => Kind::Busy,
        E::ConnectionRefused
        | E::ConnectionReset
        | E::ConnectionAborted
        | E::NotConnected
        | E::BrokenPipe
        | E::UnexpectedEof
        | E::HostUnreachable
        | E::NetworkUnreachable => Kind::Connection,
        _ => Kind::Io,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.in_one_line())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|s| s as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_kind_and_hint_and_nests_the_cause() {
        let error = Error::new(Kind::Busy, "image a.qcow2 is in use")
            .hint("stop the VM")
            .context("cannot back up domain foo");
        assert_eq!(error.kind(), Kind::Busy);
        assert_eq!(error.hint_text(), Some("stop the VM"));
        assert_eq!(error.to_string(), "cannot back up domain foo");
        let cause = StdError::source(&error).expect("the cause is kept");
        assert_eq!(cause.to_string(), "image a.qcow2 is in use");
    }

    #[test]
    fn told_again_it_says_the_same() {
        let error = Error::new(Kind::Busy, "image a.qcow2 is in use").hint("stop the VM");
        let error = error.source("a lock".to_owned()).context("cannot back up domain foo");
        for told in [error.again(), error.again().again()] {
            assert_eq!((told.kind(), told.in_one_line()), (Kind::Busy, error.in_one_line()));
        }
    }

    #[test]
    fn a_full_disk_is_no_space_whatever_the_call() {
        let error = Error::io("write x", std::io::Error::from_raw_os_error(28));
        assert_eq!(error.kind(), Kind::NoSpace);
    }
}
