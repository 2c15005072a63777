//! A hold on the repository: what there is now stays readable until it ends.
//!
//! A hold that is lost (the process was stopped, or its store was out of reach, for longer than a lease
//! lasts) protects nothing: the collector may have removed what its holder was reading, and that looks
//! like damage. So whoever holds asks in the end, and what is missing then is told as what it is.
//!
//! A repository that cannot be written (read-only, full) is read without one.

use super::{Lease, Repository};
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};

/// A hold as far as one can be had.
#[derive(Debug)]
pub struct Hold(Option<Lease>);

impl Hold {
    /// Begins to hold; where the repository cannot be written, says that there is none: what is
    /// forgotten and collected elsewhere meanwhile is then lost to the reader.
    pub async fn begin(repository: &Repository, control: &Control) -> Result<Self> {
        match repository.hold().await {
            Ok(lease) => Ok(Self(Some(lease))),
            Err(error) if cannot_write(&error) => {
                let text = format!("points are read without a hold against 'gc': {error}");
                control.notice(NoticeLevel::Info, text);
                Ok(Self(None))
            }
            Err(error) => Err(error),
        }
    }

    /// Fails with [`Kind::Timeout`] when the hold was lost: what is missing may have been collected.
    /// Whether it was cannot be asked of a store that fails, which is an error too.
    pub async fn check(&self) -> Result<()> {
        let Some(lease) = &self.0 else { return Ok(()) };
        match lease.check().await {
            // The repository became read-only: as if there had been no hold.
            Err(error) if cannot_write(&error) => Ok(()),
            Err(error) if lease.is_lost().await => Err(error.context(
                "the hold on the repository was lost while points were read: what is missing may \
                 have been removed by 'gc', and need not be damaged",
            )),
            checked => checked.map(drop),
        }
    }

    async fn is_lost(&self) -> bool {
        match &self.0 {
            Some(lease) => lease.is_lost().await,
            None => false,
        }
    }

    /// Ends the hold, and says so if `done` failed because it was lost before.
    pub async fn end<T>(self, done: Result<T>) -> Result<T> {
        let done = match done {
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => {
                match self.check().await {
                    Err(lost) if self.is_lost().await => {
                        tracing::warn!(%error, "failed after the hold was lost");
                        Err(lost)
                    }
                    _ => Err(error),
                }
            }
            done => done,
        };
        if let Some(lease) = self.0
            && let Err(error) = lease.end().await
        {
            // It lapses by itself.
            tracing::warn!(%error, "cannot end the hold on the repository");
        }
        done
    }
}

fn cannot_write(error: &Error) -> bool {
    matches!(error.kind(), Kind::Permission | Kind::NoSpace)
}

#[cfg(test)]
mod tests {
    use super::super::store::Folder;
    use super::super::store::memory::{Fault, Operation};
    use super::super::tests::{open, store};
    use super::*;
    use crate::content::LEAF_BYTES;

    /// Damage was told as a hold that was lost, because the store did not answer when it was asked for that.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_store_that_does_not_answer_hides_no_damage() {
        let store = store();
        let repository = open(&store, LEAF_BYTES).await;
        let hold = Hold::begin(&repository, &Control::new()).await.unwrap();
        store.set_fault_hook(|op| match op {
            Operation::Create(name) if name.as_str().starts_with(Folder::Runs.prefix()) => {
                Some(Fault::Silent)
            }
            _ => None,
        });
        let asked = hold.check().await.unwrap_err();
        assert!(!asked.to_string().contains("was lost"), "{asked}");
        let done: Result<()> = Err(Error::new(Kind::Corrupt, "a chunk is damaged"));
        assert_eq!(hold.end(done).await.unwrap_err().kind(), Kind::Corrupt);
    }
}
