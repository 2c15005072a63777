//! Words for facts that several commands show.

use std::borrow::Cow;
use std::fmt::Write as _;

use jiff::tz::TimeZone;

use crate::clock::Timestamp;
use crate::vm::{Consistency, Quiescence, ReadMode};

/// Text that somebody else wrote, on one line and without what a terminal obeys: control characters
/// and marks that change the direction of text are written as `\u{1b}`.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    escape(text, |_| false)
}

/// The same for text of several lines.
pub(crate) fn lines_shown(text: &str) -> Cow<'_, str> {
    escape(text, |c| c == '\n')
}

fn escape(text: &str, is_allowed: impl Fn(char) -> bool) -> Cow<'_, str> {
    let obeyed = |c: char| {
        let turns = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        (c.is_control() || turns) && !is_allowed(c)
    };
    if !text.contains(obeyed) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if obeyed(c) { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    Cow::Owned(out)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_speak_to_the_terminal() {
        assert_eq!(shown("evil\u{1b}[31m\nb\u{202e}"), "evil\\u{1b}[31m\\u{a}b\\u{202e}");
        assert_eq!(lines_shown("a\nb\u{7}"), "a\nb\\u{7}");
        assert_eq!(shown("Zoë 日本"), "Zoë 日本");
    }
}
