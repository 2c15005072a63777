//! Another copy of a blob where the usual one does not do.
//!
//! A blob lies in several packs when it was stored anew because one of them is damaged
//! ([`super::damaged`]), when two runs stored it at the same moment, or while the collector moves
//! it. Any copy that proves itself is as good as any other, so nothing that a reader needs is lost
//! before all copies are. This is the slow way: `Blobs` and `DiskReader` come here after a read
//! failed, with one blob at a time, and every copy is read again before damage is recorded.

use std::collections::HashSet;
use std::sync::Arc;

use super::blobs::{self, Blobs, pack_missing};
use super::index::{Location, missing};
use super::seal::BlobId;
use crate::error::{Error, Kind, Result};

/// Whether another copy may do where one failed like this. An error of the store is worth a try
/// too; it is not recorded.
pub(super) fn may_have_another(error: &Error) -> bool {
    matches!(error.kind(), Kind::Corrupt | Kind::NotFound | Kind::Io)
}

impl Blobs {
    /// Reads `id` from the first of its copies that opens and that `prove` accepts, given its
    /// plaintext; packs that are known to be damaged come last. Fails with what is wrong with the
    /// first, or with an error of the store if that hides one: it may pass. Cancel-safe.
    pub(super) async fn salvage<T: Send + 'static>(
        &self,
        id: &BlobId,
        prove: impl Fn(&Location, Vec<u8>) -> Result<T> + Send + Sync + 'static,
    ) -> Result<T> {
        let prove = Arc::new(prove);
        let mut tried = HashSet::new();
        let mut first: Option<Error> = None;
        for refreshed in [false, true] {
            if refreshed {
                self.index.refresh_now_and_then().await?;
            }
            let mut copies = self.index.copies(id).await?;
            copies.sort_by_key(|copy| self.damaged.contains(&copy.pack.id));
            for copy in copies {
                if !tried.insert((copy.pack.id, copy.counter)) {
                    continue;
                }
                let prove = Arc::clone(&prove);
                match self.read_copy(copy, move |copy, plain| prove(copy, plain)).await {
                    Err(error) if may_have_another(&error) => {
                        let was_damage = |first: &Error| first.kind() == Kind::Corrupt;
                        let is_passing = error.kind() != Kind::Corrupt;
                        if first.as_ref().is_none_or(|first| is_passing && was_damage(first)) {
                            first = Some(error);
                        }
                    }
                    read => return read,
                }
            }
        }
        Err(first.unwrap_or_else(|| missing(id)))
    }

    /// Reads and proves one copy of a blob, and records damage.
    pub(super) async fn read_copy<T: Send + 'static>(
        &self,
        copy: Location,
        prove: impl FnOnce(&Location, Vec<u8>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let pack = Arc::clone(&copy.pack);
        let read = self.read_run(&pack, copy.offset, copy.stored_bytes.into()).await;
        let result = match read {
            // Not recorded: see `damaged`.
            Ok(None) => return Err(pack_missing(&pack)),
            Ok(Some(mut sealed)) => {
                let opener = self.opener(&pack)?;
                let work = move || prove(&copy, blobs::open(&opener, &copy, &mut sealed)?);
                self.workers.run(work).await?
            }
            Err(error) => Err(error),
        };
        if let Err(error) = &result {
            self.damaged.report(&pack.id, error).await;
        }
        result
    }
}
