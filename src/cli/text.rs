//! Words for facts that several commands show.

use std::fmt::Write as _;

use jiff::tz::TimeZone;

use crate::clock::Timestamp;
use crate::vm::{Consistency, Quiescence, ReadMode};

/// How a disk was or would be read.
pub(crate) fn read_mode(read: &ReadMode) -> String {
    match read {
        ReadMode::Incremental { base } => format!("incremental since {}", base.short()),
        ReadMode::Full { reason } => format!("full: {}", reason.describe()),
    }
}

/// What was achieved around the instant.
pub(crate) fn quiescence(quiescence: &Quiescence) -> String {
    let level = match quiescence.level {
        Consistency::Filesystem => "file system consistent",
        Consistency::Crash => "crash consistent",
        Consistency::Stopped => "VM stopped",
    };
    let mut text = level.to_owned();
    if let Some(ms) = quiescence.frozen_ms {
        let _ = write!(text, " (frozen {})", duration_ms(ms));
    }
    if let Some(reason) = &quiescence.reason {
        let _ = write!(text, " ({reason})");
    }
    text
}

/// A duration with three digits or so.
pub(crate) fn duration_ms(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1000),
        _ => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

/// A time as it is shown: local, to the second, as `VM@TIME` takes it.
pub(crate) fn time(time: Timestamp, zone: &TimeZone) -> String {
    time.to_zoned(zone.clone()).strftime("%Y-%m-%dT%H:%M:%S").to_string()
}

/// "1 point", "2 points".
pub(crate) fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}
