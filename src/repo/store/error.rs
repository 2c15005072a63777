//! What can go wrong at a store, as far as anybody decides on it.

use std::io;
use std::time::Duration;

use crate::error::{Error, Kind, READ_ONLY};

use super::ObjectName;

/// Result of a store.
pub type StoreResult<T> = Result<T, StoreError>;

/// A failure of a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no object of this name.
    #[error("object {name} does not exist")]
    NotFound {
        /// Which.
        name: ObjectName,
    },
    /// Somebody made an object of this name.
    #[error("object {name} exists already")]
    AlreadyExists {
        /// Which.
        name: ObjectName,
    },
    /// The store is full or a quota is reached.
    #[error("no space for {what}")]
    NoSpace {
        /// What was being stored, and where.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Access was denied.
    #[error("access denied: {what}")]
    Permission {
        /// What was being done, and where.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The store itself is gone: unplugged, unmounted, moved.
    #[error("{store} is not there any more")]
    Unavailable {
        /// Which store.
        store: String,
    },
    /// It does not answer. What it was asked to do may yet be done.
    #[error("{store} has not answered for {} s", limit.as_secs())]
    Silent {
        /// Which store.
        store: String,
        /// For so long.
        limit: Duration,
    },
    /// A folder that every repository has is gone, and others are there.
    #[error("folder {folder} of {store} is gone")]
    FolderGone {
        /// Which folder.
        folder: &'static str,
        /// Of which store.
        store: String,
    },
    /// The object ends before the range that was asked for: it was damaged or is another object.
    #[error("object {name} is {size_bytes} bytes long, needed up to {end}")]
    Short {
        /// Which.
        name: ObjectName,
        /// Its size.
        size_bytes: u64,
        /// Where the range ends.
        end: u64,
    },
    /// The object is larger than the caller is willing to read.
    #[error("object {name} is {size_bytes} bytes long, at most {bytes_max} were expected")]
    TooLarge {
        /// Which.
        name: ObjectName,
        /// Its size.
        size_bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// Anything else.
    #[error("{what} failed")]
    Io {
        /// What was being done, on which object, and where.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// An operating system error while doing `what` ("writing packs/00/… in directory /srv/b").
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        use io::ErrorKind as E;
        let what = what.into();
        match source.kind() {
            E::StorageFull | E::QuotaExceeded | E::FileTooLarge => Self::NoSpace { what, source },
            E::PermissionDenied | E::ReadOnlyFilesystem => Self::Permission { what, source },
            _ => Self::Io { what, source },
        }
    }

    /// Whether the object is known not to be there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether somebody else made the object.
    pub fn is_already_exists(&self) -> bool {
        matches!(self, Self::AlreadyExists { .. })
    }

    fn kind(&self) -> Kind {
        match self {
            Self::NotFound { .. } => Kind::NotFound,
            Self::AlreadyExists { .. } => Kind::AlreadyExists,
            Self::NoSpace { .. } => Kind::NoSpace,
            Self::Permission { .. } => Kind::Permission,
            Self::Unavailable { .. } => Kind::Connection,
            Self::Silent { .. } => Kind::Timeout,
            Self::Short { .. } | Self::TooLarge { .. } | Self::FolderGone { .. } => Kind::Corrupt,
            Self::Io { .. } => Kind::Io,
        }
    }
}

fn is_read_only(error: &StoreError) -> bool {
    matches!(error, StoreError::Permission { source, .. }
        if source.kind() == io::ErrorKind::ReadOnlyFilesystem)
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let kind = error.kind();
        let hint = match kind {
            _ if matches!(error, StoreError::FolderGone { .. }) => {
                "put it back from a copy, or mount what belongs there: the rest is kept until then"
            }
            Kind::NoSpace => {
                "make room on the file system of the repository; 'forget' and 'gc' free more, and need \
                 a little themselves: 256 MiB for each TiB that is stored, before compression"
            }
            _ if is_read_only(&error) => READ_ONLY,
            Kind::Permission => "run as a user who may write to the repository",
            Kind::Timeout => {
                "see whether its disk or server answers, then run it again; VMBACKUP_REPO_TIMEOUT is how \
                 long it is waited for"
            }
            Kind::Connection => "check that the repository's disk is plugged in and mounted",
            _ => "",
        };
        let message = error.to_string();
        let cause = match error {
            StoreError::NoSpace { source, .. }
            | StoreError::Permission { source, .. }
            | StoreError::Io { source, .. } => Some(source),
            _ => None,
        };
        let mut border = Self::new(kind, message);
        if !hint.is_empty() {
            border = border.hint(hint);
        }
        match cause {
            Some(cause) => border.source(cause),
            None => border,
        }
    }
}
