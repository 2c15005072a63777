//! The block graph: nodes, devices, dirty bitmaps, adding and removing nodes.
//!
//! Reply types hold what a controller decides on and ignore the rest, so that neither a new member
//! nor a new driver of a later QEMU makes a query fail.

use qapi::qmp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::connection::Monitor;
use crate::error::{Error, Kind, Result};

/// A dirty bitmap as queries report it.
#[expect(clippy::struct_excessive_bools, reason = "QEMU reports four independent facts")]
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Bitmap {
    /// Its name; internal bitmaps of jobs have none.
    #[serde(default)]
    pub name: Option<String>,
    /// Dirty bytes (a multiple of the granularity).
    pub count: u64,
    /// Bytes per bit.
    pub granularity: u64,
    /// Whether writes are recorded now.
    pub recording: bool,
    /// Whether a job or export holds it.
    pub busy: bool,
    /// Whether it is stored in the image when QEMU closes it.
    pub persistent: bool,
    /// Whether it was not stored properly: it can only be removed.
    #[serde(default)]
    pub inconsistent: bool,
}

/// The image behind a node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Image {
    /// Its name as QEMU opened it.
    pub filename: String,
    /// The driver's name for its format.
    pub format: String,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Bytes allocated on the host, where known.
    #[serde(default)]
    pub actual_size: Option<u64>,
    /// Whether the content is encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// What the format says of itself, as it came.
    #[serde(default)]
    pub format_specific: Option<Value>,
}

/// A node of the block graph.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Node {
    /// Its name; generated ones begin with `#`.
    #[serde(default)]
    pub node_name: Option<String>,
    /// The driver (`qcow2`, `raw`, `throttle`).
    pub drv: String,
    /// Whether it is read-only.
    pub ro: bool,
    /// The file name as QEMU shows it.
    pub file: String,
    /// The backing file's name, if there is one.
    #[serde(default, rename = "backing_file")]
    pub backing_file: Option<String>,
    /// The image.
    pub image: Image,
    /// Its named bitmaps.
    #[serde(default)]
    pub dirty_bitmaps: Vec<Bitmap>,
    /// Whether this QEMU has not given the image to somebody else (QEMU 10.0 and newer).
    #[serde(default)]
    pub active: Option<bool>,
}

impl Node {
    /// The node's name, which every node of a running QEMU has.
    pub fn name(&self) -> &str {
        self.node_name.as_deref().unwrap_or_default()
    }

    /// The bitmap of that name.
    pub fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.dirty_bitmaps.iter().find(|bitmap| bitmap.name.as_deref() == Some(name))
    }
}

/// A device of the guest with what is inserted.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Device {
    /// The name of its backend (`-drive id=`), empty if it has none.
    #[serde(default)]
    pub device: String,
    /// QOM path or id of the device.
    #[serde(default)]
    pub qdev: Option<String>,
    /// Whether the medium can be removed.
    #[serde(default)]
    pub removable: bool,
    /// Whether a request failed and the guest stands still for it (`nospace`, `failed`; else `ok`).
    #[serde(default)]
    pub io_status: Option<String>,
    /// The top node, unless the drive is empty.
    #[serde(default)]
    pub inserted: Option<Node>,
}

/// A bitmap named by the node it lives on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct BitmapRef {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub name: String,
}

/// A bitmap to be added. `Default` records, in memory, with QEMU's own granularity.
#[derive(Clone, Debug, Default)]
pub struct NewBitmap {
    /// Bytes per bit; QEMU takes the cluster size, within 4 and 64 KiB, if not given.
    pub granularity: Option<u32>,
    /// Where it is kept.
    pub storage: BitmapStorage,
    /// Whether it records from the start.
    pub state: BitmapState,
}

/// Where a bitmap is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BitmapStorage {
    /// In memory, until QEMU ends.
    #[default]
    Transient,
    /// In the image, from when QEMU closes it.
    Persistent,
}

/// Whether a bitmap records writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BitmapState {
    /// It does.
    #[default]
    Recording,
    /// It stands still: as a target of merges, and for exports.
    Disabled,
}

/// The typed form of a bitmap to be added.
pub(crate) fn bitmap_add(at: &BitmapRef, new: &NewBitmap) -> qmp::BlockDirtyBitmapAdd {
    qmp::BlockDirtyBitmapAdd {
        node: at.node.clone(),
        name: at.name.clone(),
        granularity: new.granularity,
        persistent: (new.storage == BitmapStorage::Persistent).then_some(true),
        disabled: (new.state == BitmapState::Disabled).then_some(true),
    }
}

/// The typed form of a bitmap's name.
pub(crate) fn bitmap_ref(at: &BitmapRef) -> qmp::BlockDirtyBitmap {
    qmp::BlockDirtyBitmap { node: at.node.clone(), name: at.name.clone() }
}

/// The typed form of a merge.
pub(crate) fn bitmap_merge(
    target: &BitmapRef,
    sources: &[BitmapRef],
) -> qmp::BlockDirtyBitmapMerge {
    qmp::BlockDirtyBitmapMerge {
        node: target.node.clone(),
        target: target.name.clone(),
        bitmaps: sources
            .iter()
            .map(|source| qmp::BlockDirtyBitmapOrStr::external(bitmap_ref(source)))
            .collect(),
    }
}

/// Each is cancel-safe as [`Monitor::execute`] is.
impl Monitor {
    /// All nodes. `flat` spares the backing chains repeated under each node (QEMU 5.0 and newer).
    pub async fn query_named_block_nodes(&self) -> Result<Vec<Node>> {
        self.query("query-named-block-nodes", json!({ "flat": true })).await
    }

    /// All devices that have, or can have, a medium.
    pub async fn query_block(&self) -> Result<Vec<Device>> {
        self.query("query-block", json!({})).await
    }

    /// Adds a node; `options` as `blockdev-add` of the manual has them.
    pub async fn blockdev_add(&self, options: Value) -> Result<()> {
        self.execute_raw("blockdev-add", options).await.map(drop)
    }

    /// Removes a node.
    pub async fn blockdev_del(&self, node: &str) -> Result<()> {
        self.execute(qmp::blockdev_del { node_name: node.to_owned() }).await.map(drop)
    }

    /// Adds a bitmap.
    pub async fn bitmap_add(&self, at: &BitmapRef, new: &NewBitmap) -> Result<()> {
        self.execute(qmp::block_dirty_bitmap_add(bitmap_add(at, new))).await.map(drop)
    }

    /// Removes a bitmap, from the image too.
    pub async fn bitmap_remove(&self, at: &BitmapRef) -> Result<()> {
        self.execute(qmp::block_dirty_bitmap_remove(bitmap_ref(at))).await.map(drop)
    }

    /// Lets a bitmap record.
    pub async fn bitmap_enable(&self, at: &BitmapRef) -> Result<()> {
        self.execute(qmp::block_dirty_bitmap_enable(bitmap_ref(at))).await.map(drop)
    }

    /// Stops a bitmap from recording.
    pub async fn bitmap_disable(&self, at: &BitmapRef) -> Result<()> {
        self.execute(qmp::block_dirty_bitmap_disable(bitmap_ref(at))).await.map(drop)
    }

    /// Adds the dirty bits of `sources` to `target`, all or none.
    pub async fn bitmap_merge(&self, target: &BitmapRef, sources: &[BitmapRef]) -> Result<()> {
        self.execute(qmp::block_dirty_bitmap_merge(bitmap_merge(target, sources))).await.map(drop)
    }

    /// Runs a query whose reply grows with QEMU, into a tolerant type.
    pub(crate) async fn query<T: serde::de::DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T> {
        let value = self.execute_raw(command, arguments).await?;
        serde_json::from_value(value)
            .map_err(|source| Error::Reply { command: command.to_owned(), source })
    }
}

/// Whether the refusal means the object is not there (any more): for clean-up, which wants it gone.
///
/// QEMU has no error class for it in these commands; the texts are those of 7.2 to 10.0
/// (block.c "Failed to find node", "Cannot find device"; block/monitor/bitmap-qmp-cmds.c "Dirty
/// bitmap '%s' not found"; job-qmp.c "Job not found"; block/export "not found").
pub fn is_missing(error: &Error) -> bool {
    error.kind() == Kind::NotFound
        || error.refusal().is_some_and(|text| {
            text.contains("not found")
                || text.contains("Failed to find node")
                || text.contains("Cannot find device")
        })
}
