//! What a dead run left in a QEMU is taken down before the next one begins.
//!
//! Everything temporary carries our names (`names::Temp`), so nothing has to be remembered. The
//! NBD server has no name and QEMU tells of none: it is taken for ours only if other things of
//! ours are there and nobody else has an NBD export. Checkpoints are not touched here.

use qmp::Monitor;
use qmp::block::{BitmapRef, Node};

use super::error::failed;
use super::names::Temp;
use super::teardown::{OurServer, Things};
use crate::error::Result;

/// Takes down what dead runs left; how many things there were.
pub(super) async fn reconcile(monitor: &Monitor) -> Result<usize> {
    let things = leftovers(monitor).await?;
    let count = things.exports.len()
        + things.snapshots.len()
        + things.jobs.len()
        + things.scratch.len()
        + things.changes.len();
    if count > 0 {
        things
            .take_down(monitor)
            .await
            .map_err(|error| error.context("cannot remove what an earlier backup left in QEMU"))?;
    }
    Ok(count)
}

async fn leftovers(monitor: &Monitor) -> Result<Things> {
    let exports = monitor.query_block_exports().await.map_err(failed("cannot ask for exports"))?;
    let jobs = monitor.query_jobs().await.map_err(failed("cannot ask for jobs"))?;
    let nodes = monitor.query_named_block_nodes().await.map_err(failed("cannot ask for nodes"))?;
    let node_names = |kind: Temp| {
        let of_kind = nodes.iter().map(Node::name).filter(move |name| kind.is(name));
        of_kind.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut changes = Vec::new();
    for node in &nodes {
        for name in node.dirty_bitmaps.iter().filter_map(|bitmap| bitmap.name.as_deref()) {
            // A filter shows the bitmaps of the node below it, too: the second removal finds none.
            if Temp::Changes.is(name) {
                changes.push(BitmapRef { node: node.name().to_owned(), name: name.to_owned() });
            }
        }
    }
    let foreign = exports.iter().any(|export| export.sort == "nbd" && !Temp::Export.is(&export.id));
    let mut things = Things {
        exports: exports.into_iter().map(|e| e.id).filter(|id| Temp::Export.is(id)).collect(),
        server: None,
        snapshots: node_names(Temp::Snapshot),
        jobs: jobs.into_iter().map(|job| job.id).filter(|id| Temp::Job.is(id)).collect(),
        scratch: node_names(Temp::Scratch),
        changes,
    };
    let any = !(things.exports.is_empty() && things.scratch.is_empty() && things.jobs.is_empty());
    things.server = (any && !foreign).then_some(OurServer);
    Ok(things)
}
