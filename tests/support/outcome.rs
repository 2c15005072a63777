//! What a program said and how it ended; used by every test that runs one.

use std::process::{Command, Output};

use serde_json::Value;

/// A finished program with its output.
pub(crate) struct Outcome {
    /// The command line, for failure messages.
    pub(crate) command: String,
    /// Exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

impl Outcome {
    /// Runs `command` to its end.
    pub(crate) fn of(command: &mut Command) -> Self {
        let line = format!("{command:?}");
        let output = command.output().unwrap_or_else(|error| panic!("{line}: {error}"));
        Self::from_output(line, &output)
    }

    /// Takes over the output of a process that was waited for elsewhere.
    pub(crate) fn from_output(command: String, output: &Output) -> Self {
        Self {
            command,
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Requires success.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert!(self.code == Some(0), "failed unexpectedly: {self:?}");
        self
    }

    /// Requires failure by an exit code (not a signal, not a panic's 101).
    #[track_caller]
    pub(crate) fn fails(self) -> Self {
        assert!(
            self.code.is_some_and(|code| code != 0 && code != 101),
            "did not fail cleanly: {self:?}"
        );
        self
    }

    /// Requires failure with a message that contains every one of `words`.
    #[track_caller]
    pub(crate) fn fails_with(self, words: &[&str]) -> Self {
        let outcome = self.fails();
        for word in words {
            assert!(outcome.stderr.contains(word), "no {word:?} in the message of {outcome:?}");
        }
        outcome
    }

    /// Requires success and one JSON document on standard output.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let outcome = self.ok();
        serde_json::from_str(&outcome.stdout)
            .unwrap_or_else(|error| panic!("no JSON on stdout ({error}): {outcome:?}"))
    }

    /// Requires success and gives standard output without the line end.
    #[track_caller]
    pub(crate) fn text(self) -> String {
        self.ok().stdout.trim_end().to_owned()
    }
}

impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.command)?;
        writeln!(f, "exit code {:?}", self.code)?;
        writeln!(f, "--- stdout\n{}", self.stdout)?;
        write!(f, "--- stderr\n{}", self.stderr)
    }
}
