//! What commands print: data on stdout, talk on stderr.
//!
//! A command hands over one serialisable document and the text a person gets instead; both are
//! made from the same value, so they say the same. `docs/json.md` documents every document.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io::{BufWriter, Write};

use serde::Serialize;
use serde_json::json;

use super::exit;
use super::text::{lines_shown, shown};
use crate::control::{Notice, NoticeLevel};
use crate::error::{Error, Result};

/// Version of all JSON documents: raised when a field is removed or changes its meaning.
pub(super) const JSON_VERSION: u32 = 1;

/// What is gathered for a write to stdout.
const BUFFER_BYTES: usize = 64 << 10;

/// The two streams in the style the user asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// One JSON document on stdout, JSON lines on stderr.
    pub(crate) json: bool,
    /// Only warnings and errors on stderr.
    pub(crate) quiet: bool,
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    document: &'a str,
    version: u32,
    #[serde(flatten)]
    data: &'a T,
}

impl Output {
    /// Prints the result of a command: `data` as the JSON document `name`, or `text`.
    pub(crate) fn document<T: Serialize>(
        self,
        name: &str,
        data: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        let mut stdout = BufWriter::with_capacity(BUFFER_BYTES, std::io::stdout().lock());
        let written = if self.json {
            // Straight to the stream: a list of a million points never is in memory as text.
            let envelope = Envelope { document: name, version: JSON_VERSION, data };
            let written = serde_json::to_writer_pretty(&mut stdout, &envelope);
            written.map_err(std::io::Error::from).and_then(|()| stdout.write_all(b"\n"))
        } else {
            stdout.write_all(lines_shown(&text(data)).as_bytes())
        };
        match written.and_then(|()| stdout.flush()) {
            // The reader has seen enough (`| head`).
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            result => result.map_err(|e| Error::io("cannot write to standard output", e)),
        }
    }

    /// Says something to the person who watches. Lost if nobody listens: talk is not data.
    pub(crate) fn notice(self, notice: &Notice) {
        let level = match notice.level {
            NoticeLevel::Info if self.quiet => return,
            NoticeLevel::Info => "note",
            NoticeLevel::Warning => "warning",
        };
        if self.json {
            line(&json!({"type": "notice", "level": level, "message": notice.text}));
        } else {
            say(&format!("{level}: {}", shown(&notice.text)));
        }
    }

    /// Prints a failure: message, each cause once, the next step.
    pub(crate) fn error(self, error: &Error) {
        let causes = causes(error);
        if self.json {
            line(&json!({
                "type": "error",
                "kind": exit::name(error.kind()),
                "exit_code": exit::code(error.kind()),
                "message": error.to_string(),
                "causes": causes,
                "hint": error.hint_text(),
            }));
            return;
        }
        let mut text = format!("error: {}", shown(&error.to_string()));
        for cause in causes {
            let _ = write!(text, "\n  because: {}", shown(&cause));
        }
        if let Some(hint) = error.hint_text() {
            let _ = write!(text, "\nhint: {}", shown(hint));
        }
        say(&text);
    }
}

/// A JSON line on stderr.
pub(crate) fn line(value: &serde_json::Value) {
    say(&value.to_string());
}

/// A line on stderr.
pub(crate) fn say(text: &str) {
    // Where talk cannot be written nobody is there to be told so.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The causes below `error`, without those that only repeat what was said already.
fn causes(error: &Error) -> Vec<String> {
    let mut said = vec![error.to_string()];
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !said.iter().any(|earlier| earlier.contains(&text)) {
            said.push(text);
        }
        next = cause.source();
    }
    said.split_off(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_cause_is_said_once() {
        let io = std::io::Error::other("disk on fire");
        let error = Error::io("read a.raw", io)
            .context("read a.raw")
            .context("cannot back up domain foo: read a.raw");
        assert_eq!(causes(&error), ["disk on fire"]);
        assert_eq!(causes(&Error::new(Kind::Io, "alone")), Vec::<String>::new());
    }
}
