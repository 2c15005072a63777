//! Giving scratch back while the instant is read.
//!
//! What is stored for good needs to be kept for nobody: a TRIM of the instant frees it in scratch,
//! and the guest's next write there copies nothing.
//!
//! ```text
//!  stored ─► TRIM ─► export (writable) ─► snapshot-access ─► filter: these clusters are no part of
//!                                          (discard=unmap)    the instant any more, no copy before a
//!                                                             write ─► scratch node, file: a hole
//! ```
//!
//! - *Such a range never reads again*: READ and BLOCK_STATUS of it fail (EINVAL; QEMU never shows the
//!   live disk there). Whoever gives up a range must be done with it; the copy engine asks for extents
//!   ahead of what it reads, never behind.
//! - *The first cluster stays*: a filter that broke tells nobody, so that the end of a run reads a
//!   little of each instant ([`super::snapshot`]). Of a whole disk given up, that would fail for
//!   another reason, and what failed for that one would look like it.
//! - The export is on a private socket, and a snapshot-access node takes no WRITE (ENOTSUP): who gets
//!   hold of it all the same can make the backup fail, not lie, and nothing of the guest's disk changes.
//! - *Whole clusters of the filter*: QEMU before 9.1 dies of anything else (`cbw_co_pdiscard_snapshot`:
//!   `bdrv_reset_dirty_bitmap` asserts; newer ones round inward), so what is asked for is rounded here,
//!   too. An odd end of a disk stays.
//! - A write of the guest that is just being copied may leave its cluster in scratch.
//!
//! Only with `guest_first`, and on a QEMU that uses the same itself: what `discard-source` of
//! `blockdev-backup` needs was put right together with it (9.1), and its tests go that way. No guest
//! is risked for a few GiB of scratch on an older one. One that refuses the writable export, or offers
//! no TRIM in it, is read as before, and that is told.

use std::sync::Arc;

use async_trait::async_trait;
use qmp::export::ExportAccess;

use super::Qemu;
use super::old_access::CLUSTER_BYTES;
use crate::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry, Release};
use crate::error::Result;
use crate::nbd::wire::export;
use crate::nbd::{Client, Durable, Order};
use crate::platform::SnapshotRequest;

/// What clients of the instant's exports may do.
pub(super) fn access(qemu: &Qemu, request: &SnapshotRequest) -> ExportAccess {
    if request.guest_first && qemu.features.backup_discard_source {
        ExportAccess::Writable
    } else {
        ExportAccess::ReadOnly
    }
}

/// Why parts of an instant with such an export cannot be given up.
pub(super) fn unavailable(access: ExportAccess) -> &'static str {
    match access {
        ExportAccess::ReadOnly => "that takes QEMU 9.1 or newer",
        ExportAccess::Writable => "its QEMU refuses a writable export or TRIM",
    }
}

/// The instant behind `client`, of which parts can be given up if QEMU says so.
pub(super) fn releasing(client: Client) -> Arc<dyn BlockSource> {
    let client = Arc::new(client);
    let export = client.export();
    if export.has(export::SEND_TRIM) && !export.has(export::READ_ONLY) {
        Arc::new(Releasing(Arc::new(Instant(client))))
    } else {
        client
    }
}

struct Releasing(Arc<Instant>);

struct Instant(Arc<Client>);

#[async_trait]
impl BlockSource for Releasing {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&*self.0.0)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.0.0.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.0.0.read(offset, buffer).await
    }

    fn release(&self) -> Option<Arc<dyn Release>> {
        Some(Arc::clone(&self.0) as Arc<dyn Release>)
    }
}

#[async_trait]
impl Release for Instant {
    async fn release(&self, range: ByteRange) -> Result<()> {
        match given_up(range) {
            Some(range) => self.0.order(Order::Trim(range), Durable::Later).await,
            None => Ok(()),
        }
    }
}

/// What of a range is given up: whole clusters, but for the first of the disk.
fn given_up(range: ByteRange) -> Option<ByteRange> {
    let start = range.offset().checked_next_multiple_of(CLUSTER_BYTES)?.max(CLUSTER_BYTES);
    let end = range.end() - range.end() % CLUSTER_BYTES;
    (start < end).then(|| ByteRange::between(start, end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn only_whole_clusters_behind_the_first_are_given_up(
            offset in 0..5 * CLUSTER_BYTES, len in 0..5 * CLUSTER_BYTES,
        ) {
            let range = ByteRange::new(offset, len);
            let clusters = (1..10).map(|n| ByteRange::new(n * CLUSTER_BYTES, CLUSTER_BYTES));
            let whole: Vec<_> = clusters.filter(|cluster| range.contains(*cluster)).collect();
            let given_up = given_up(range);
            prop_assert_eq!(given_up.map_or(0, ByteRange::len), whole.len() as u64 * CLUSTER_BYTES);
            prop_assert!(whole.iter().all(|cluster| given_up.unwrap().contains(*cluster)));
        }
    }
}
