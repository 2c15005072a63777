//! What went wrong first in a run, for everybody who asks from then on.
//!
//! Invariant: a run with a failure never commits. Chunks count as known as soon as one writer has
//! claimed them, so a blob that was claimed and not stored would leave a hole in whatever else
//! relied on it: the failure therefore stays, whoever was told of it already.
//!
//! Set by the packers and by claims that were given up; asked by the packers and by `Run::make_point`.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};

/// The first failure of a run, if there is one. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Failure {
    // Locked to read or set one pointer, never across an await.
    first: Arc<Mutex<Option<Arc<Error>>>>,
}

impl Failure {
    /// Keeps `error`, unless there is an earlier one.
    pub fn set(&self, error: Error) {
        self.lock().get_or_insert_with(|| Arc::new(error));
    }

    /// `Err` with the first failure as its cause, once there is one.
    pub fn check(&self) -> Result<()> {
        let Some(first) = self.lock().clone() else { return Ok(()) };
        let error = Error::new(first.kind(), "the repository could not store what it was given");
        let error = match first.hint_text() {
            Some(hint) => error.hint(hint),
            None => error,
        };
        Err(error.source(first))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Error>>> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn the_first_failure_stays_and_keeps_kind_hint_and_cause() {
        let failure = Failure::default();
        failure.check().unwrap();
        failure.set(Error::new(Kind::NoSpace, "pack a").hint("free space"));
        failure.set(Error::new(Kind::Io, "pack b"));
        for _ in 0..2 {
            let error = failure.check().unwrap_err();
            assert_eq!((error.kind(), error.hint_text()), (Kind::NoSpace, Some("free space")));
            assert!(format!("{error:?}").contains("pack a"));
        }
    }
}
