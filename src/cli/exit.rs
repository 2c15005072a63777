//! The exit codes: the one place that turns an error's [`Kind`] into a number.
//!
//! The table is part of the interface: scripts decide on it, `vmbackup help` prints it and
//! `docs/troubleshooting.md` explains each. A number is never given a new meaning.

use crate::error::Kind;

/// What `vmbackup --help` says about exit codes. A test holds it against [`code`].
pub(crate) const HELP: &str = "\
Exit codes:
    0  success
    2  wrong usage: an option, a name, a number
    3  the named object does not exist
    4  the name means more than one object (the message lists them)
    5  the target exists already and is not replaced
    6  permission denied
    7  busy: another job, migration, writer or lock holds the object; try later
    8  not supported by this version, format or device
    9  no space in scratch, repository or target
   10  stored data is corrupt or missing
   11  wrong password or key
   12  the repository was written by a newer version of vmbackup
   13  connection failed or lost
   14  a peer broke its protocol
   15  a deadline passed
   16  the snapshot ended before the last read; nothing was stored as a point
   17  nothing to build an incremental on
   18  verification found a difference
   19  the point is stored, but not all was put back as it was: see the message
   20  input or output failed
   70  internal error (a bug: please report it)
  130  stopped by Ctrl-C or SIGTERM";

/// The exit code of success.
pub(crate) const SUCCESS: u8 = 0;

/// The exit code of a failure of `kind`.
pub(crate) fn code(kind: Kind) -> u8 {
    match kind {
        Kind::Usage => 2,
        Kind::NotFound => 3,
        Kind::Ambiguous => 4,
        Kind::AlreadyExists => 5,
        Kind::Permission => 6,
        Kind::Busy => 7,
        Kind::Unsupported => 8,
        Kind::NoSpace => 9,
        Kind::Corrupt => 10,
        Kind::WrongKey => 11,
        Kind::TooNew => 12,
        Kind::Connection => 13,
        Kind::Protocol => 14,
        Kind::Timeout => 15,
        Kind::SnapshotLost => 16,
        Kind::NoBase => 17,
        Kind::Mismatch => 18,
        Kind::Unfinished => 19,
        Kind::Io => 20,
        Kind::Internal => 70,
        Kind::Cancelled => 130,
    }
}

/// The name of `kind` in JSON errors: as stable as the number.
pub(crate) fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Usage => "usage",
        Kind::NotFound => "not-found",
        Kind::Ambiguous => "ambiguous",
        Kind::AlreadyExists => "already-exists",
        Kind::Permission => "permission",
        Kind::Busy => "busy",
        Kind::Unsupported => "unsupported",
        Kind::NoSpace => "no-space",
        Kind::Corrupt => "corrupt",
        Kind::WrongKey => "wrong-key",
        Kind::TooNew => "too-new",
        Kind::Connection => "connection",
        Kind::Protocol => "protocol",
        Kind::Timeout => "timeout",
        Kind::SnapshotLost => "snapshot-lost",
        Kind::NoBase => "no-base",
        Kind::Mismatch => "mismatch",
        Kind::Unfinished => "unfinished",
        Kind::Io => "io",
        Kind::Internal => "internal",
        Kind::Cancelled => "cancelled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const ALL: [Kind; 21] = [
        Kind::Usage,
        Kind::NotFound,
        Kind::Ambiguous,
        Kind::AlreadyExists,
        Kind::Permission,
        Kind::Busy,
        Kind::Unsupported,
        Kind::NoSpace,
        Kind::Corrupt,
        Kind::WrongKey,
        Kind::TooNew,
        Kind::Connection,
        Kind::Protocol,
        Kind::Timeout,
        Kind::SnapshotLost,
        Kind::NoBase,
        Kind::Mismatch,
        Kind::Unfinished,
        Kind::Io,
        Kind::Internal,
        Kind::Cancelled,
    ];

    #[test]
    fn every_kind_has_its_own_code_and_the_help_lists_each() {
        let listed: HashSet<u8> = HELP
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().next().unwrap().parse().unwrap())
            .collect();
        let codes: HashSet<u8> = ALL.iter().map(|kind| code(*kind)).collect();
        assert_eq!(codes.len(), ALL.len(), "two kinds share a code");
        assert_eq!(listed, codes.into_iter().chain([0]).collect());
    }

    #[test]
    fn the_table_for_operators_has_every_code_of_a_failure_once_and_no_other() {
        let document = include_str!("../../docs/troubleshooting.md");
        let (_, table) = document.split_once("| code | meaning |").unwrap();
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let explained: Vec<u8> =
            rows.map(|row| row.split('|').nth(1).unwrap().trim().parse().unwrap()).collect();
        let mut codes = ALL.map(code);
        codes.sort_unstable();
        assert_eq!(explained, codes);
    }
}
