//! Output that is too long to hold: printed piece by piece, the same to the reader as a document.

use std::io::{BufWriter, ErrorKind, Stdout, Write};

use serde::Serialize;

use super::output::JSON_VERSION;
use crate::error::{Error, Kind, Result};

/// What is gathered for a write to stdout.
const BUFFER_BYTES: usize = 64 << 10;

/// Standard output, until its reader has seen enough.
pub(crate) struct Stream {
    out: BufWriter<Stdout>,
    /// What comes before the next item of the document.
    before: String,
    is_wanted: bool,
}

impl Stream {
    /// Nothing is printed yet.
    pub(crate) fn new() -> Self {
        let out = BufWriter::with_capacity(BUFFER_BYTES, std::io::stdout());
        Self { out, before: String::new(), is_wanted: true }
    }

    /// Whether the reader still listens (`| head` does not for long).
    pub(crate) fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// Begins the JSON document `name`, which is one list called `list`.
    pub(crate) fn begin(&mut self, name: &str, list: &str) {
        self.before = format!(
            "{{\n  \"document\": \"{name}\",\n  \"version\": {JSON_VERSION},\n  \"{list}\": ["
        );
    }

    /// The next of the list.
    pub(crate) fn item<T: Serialize>(&mut self, item: &T) -> Result<()> {
        let json = serde_json::to_string_pretty(item)
            .map_err(|e| Error::new(Kind::Internal, "a document cannot be written").source(e))?;
        let before = std::mem::replace(&mut self.before, ",".to_owned());
        self.text(&before)?;
        // A string within JSON holds no line feed: all there are separate lines.
        for line in json.lines() {
            self.text("\n    ")?;
            self.text(line)?;
        }
        Ok(())
    }

    /// Ends the document.
    pub(crate) fn end(mut self) -> Result<()> {
        let end = if self.before == "," {
            "\n  ]\n}\n".to_owned()
        } else {
            format!("{}]\n}}\n", self.before)
        };
        self.text(&end)?;
        self.flush()
    }

    /// Prints text.
    pub(crate) fn text(&mut self, text: &str) -> Result<()> {
        if self.is_wanted {
            let written = self.out.write_all(text.as_bytes());
            self.settle(written)?;
        }
        Ok(())
    }

    /// Prints what was gathered.
    pub(crate) fn flush(mut self) -> Result<()> {
        let flushed = if self.is_wanted { self.out.flush() } else { Ok(()) };
        self.settle(flushed)
    }

    fn settle(&mut self, written: std::io::Result<()>) -> Result<()> {
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.is_wanted = false;
                Ok(())
            }
            written => written.map_err(|e| Error::io("cannot write to standard output", e)),
        }
    }
}
