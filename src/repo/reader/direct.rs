//! A stored disk, read on the caller's own thread.
//!
//! The same steps as over the reactor, and the same proofs. What is usually in memory (nodes, the
//! index) is asked through the runtime, and so is all that is rare: another copy of a chunk, a
//! pack that was collected meanwhile.

use std::cell::RefCell;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::{Batch, DiskReader, Piece, may_have_another};
use crate::block::{BlockingRead, Waited};
use crate::error::Result;
use crate::repo::store::BlockingObjects;

thread_local! {
    /// Sealed bytes: fresh memory for every read would cost a page fault for each 4 KiB of it. At
    /// most a request of chunks that do not compress.
    static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The reader.
pub(super) struct DirectReader {
    reader: DiskReader,
    objects: Arc<dyn BlockingObjects>,
    runtime: Handle,
}

impl DirectReader {
    /// None where the store has to be asked through the reactor.
    pub(super) fn new(reader: DiskReader) -> Option<Self> {
        let objects = reader.blobs.store.blocking()?;
        Some(Self { objects, reader, runtime: Handle::try_current().ok()? })
    }

    /// Reads a batch to where it belongs.
    fn fill(&self, batch: Batch, target: &mut [u8]) -> Result<Filled> {
        let len = usize::try_from(batch.run().2).expect("a batch fits memory");
        SEALED.with_borrow_mut(|memory| {
            if memory.len() < len {
                memory.resize(len, 0);
            }
            let sealed = &mut memory[..len];
            let (pack, offset, _) = batch.run();
            let waited = match self.reader.blobs.read_run_at(&*self.objects, (pack, offset), sealed)
            {
                Ok(Some(waited)) => waited,
                Ok(None) => return Ok(Filled::Gone(batch.into_pieces())),
                Err(error) if may_have_another(&error) => {
                    return Ok(Filled::But(batch.into_pieces(), Waited::ForDisk));
                }
                Err(error) => return Err(self.reader.at_piece(&batch.pieces[0].0, error)),
            };
            let failed = match self.reader.opener(&batch)? {
                Some(opener) => batch.open(&opener, sealed, target),
                None => batch.into_pieces(),
            };
            Ok(Filled::But(failed, waited))
        })
    }
}

/// What became of a batch.
enum Filled {
    /// It is in place, but for these pieces, of which another copy may be good.
    But(Vec<Piece>, Waited),
    /// Its pack is not there: these are to be found anew.
    Gone(Vec<Piece>),
}

impl BlockingRead for DirectReader {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<Waited> {
        let mut any = Waited::No;
        let (mut batches, mut failed) = self.runtime.block_on(self.reader.find(offset, bytes))?;
        while let Some(batch) = batches.pop_front() {
            match self.fill(batch, bytes)? {
                Filled::But(pieces, waited) => {
                    if waited == Waited::ForDisk {
                        any = waited;
                    }
                    failed.extend(pieces);
                }
                // Ends: a pack that is gone is not located again.
                Filled::Gone(pieces) => {
                    let (found, nowhere) = self.runtime.block_on(self.reader.batches(pieces))?;
                    batches.extend(found);
                    failed.extend(nowhere);
                }
            }
        }
        for piece in failed {
            self.runtime.block_on(self.reader.salvage(piece, bytes))?;
        }
        Ok(any)
    }
}
