//! What keeps a restore from being possible: all of it, so that a preview can show it at once; the
//! restore itself fails with the first.

use crate::error::{Error, Result};

/// What was found, in the order it was looked for.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<Error>);

impl Problems {
    /// Takes note of an error; the value where there is none.
    pub(super) fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.0.push(error)).ok()
    }

    /// Takes note of an error.
    pub(super) fn add(&mut self, error: Error) {
        self.0.push(error);
    }

    /// The first, if there is one.
    pub(super) fn check(self) -> Result<()> {
        self.0.into_iter().next().map_or(Ok(()), Err)
    }

    /// All of them.
    pub(super) fn into_vec(self) -> Vec<Error> {
        self.0
    }
}
