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
//! - QEMU rounds inward to whole clusters of the filter (`cbw_co_pdiscard_snapshot`,
//!   block/copy-before-write.c): an odd end of a disk stays.
//! - A write of the guest that is just being copied may leave its cluster in scratch.
//!
//! Only with `guest_first`, and on a QEMU that is right about which clusters were copied
//! ([`super::old_access`]; what a TRIM does before 8.0 nobody has looked at). One that refuses the
//! writable export, or offers no TRIM in it, is read as before.

use std::sync::Arc;

use async_trait::async_trait;
use qmp::export::ExportAccess;

use super::Qemu;
use super::old_access::{self, CLUSTER_BYTES};
use crate::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry, Release};
use crate::error::Result;
use crate::nbd::wire::export;
use crate::nbd::{Client, Durable, Order};
use crate::platform::SnapshotRequest;

/// What clients of the instant's exports may do.
pub(super) fn access(qemu: &Qemu, request: &SnapshotRequest) -> ExportAccess {
    if request.guest_first && old_access::is_right(&qemu.monitor) {
        ExportAccess::Writable
    } else {
        ExportAccess::ReadOnly
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
        let stays = range.offset().max(CLUSTER_BYTES).min(range.end());
        let range = ByteRange::between(stays, range.end());
        if range.is_empty() {
            return Ok(());
        }
        self.0.order(Order::Trim(range), Durable::Later).await
    }
}
