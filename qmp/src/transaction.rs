//! Transactions: several changes of the block layer at one instant, all or none.
//!
//! Actions are built from the types of `qapi` and completed by hand with members newer than its
//! schema. The `grouped` completion mode is left out: QEMU refuses it beside bitmap actions (seen
//! with 10.0.2).

use qapi::qmp;
use serde::Serialize;
use serde_json::{Value, json};

use crate::block::{self, BitmapRef, NewBitmap};
use crate::connection::Monitor;
use crate::error::Result;

/// One action of a transaction.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Action(Value);

/// A backup job that keeps what the guest overwrites (`blockdev-backup`, `sync=none`): the target
/// receives the old content of each cluster before it is written.
#[derive(Clone, Debug)]
pub struct BackupJob {
    /// The job's id.
    pub id: String,
    /// The device or node whose state is kept.
    pub device: String,
    /// The node that takes old content: exactly as large as the device.
    pub target: String,
    /// The name of the filter node the job inserts above the device.
    pub filter: String,
    /// Lets the snapshot break instead of the guest's write when the target fails; only where
    /// [`Features::backup_on_cbw_error`](crate::Features) is set.
    pub on_target_failure: OnTargetFailure,
}

/// What gives way when old content cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTargetFailure {
    /// The guest's write fails (all that QEMU up to 10.0 can do).
    BreakGuestWrite,
    /// The job ends in an error and the guest goes on.
    BreakSnapshot,
}

impl Action {
    fn new(kind: &str, data: impl Serialize) -> Self {
        let data = serde_json::to_value(data).expect("arguments of an action are JSON");
        Self(json!({ "type": kind, "data": data }))
    }

    /// Any action.
    pub fn raw(kind: &str, data: &Value) -> Self {
        Self::new(kind, data)
    }

    /// Adds a bitmap.
    pub fn bitmap_add(at: &BitmapRef, new: &NewBitmap) -> Self {
        Self::new("block-dirty-bitmap-add", block::bitmap_add(at, new))
    }

    /// Removes a bitmap.
    pub fn bitmap_remove(at: &BitmapRef) -> Self {
        Self::new("block-dirty-bitmap-remove", block::bitmap_ref(at))
    }

    /// Merges bitmaps.
    pub fn bitmap_merge(target: &BitmapRef, sources: &[BitmapRef]) -> Self {
        Self::new("block-dirty-bitmap-merge", block::bitmap_merge(target, sources))
    }

    /// Stops a bitmap from recording.
    pub fn bitmap_disable(at: &BitmapRef) -> Self {
        Self::new("block-dirty-bitmap-disable", block::bitmap_ref(at))
    }

    /// Starts a backup job. It is not dismissed by itself, so that how it ended can be asked.
    pub fn backup(job: &BackupJob) -> Self {
        let base = qmp::BackupCommon {
            device: job.device.clone(),
            sync: qmp::MirrorSyncMode::none,
            job_id: Some(job.id.clone()),
            filter_node_name: Some(job.filter.clone()),
            auto_dismiss: Some(false),
            auto_finalize: Some(true),
            bitmap: None,
            bitmap_mode: None,
            compress: None,
            discard_source: None,
            on_source_error: None,
            on_target_error: None,
            speed: None,
            x_perf: None,
        };
        let mut data =
            serde_json::to_value(qmp::BlockdevBackup { base, target: job.target.clone() })
                .expect("arguments of an action are JSON");
        if job.on_target_failure == OnTargetFailure::BreakSnapshot {
            data["on-cbw-error"] = json!("break-snapshot");
        }
        Self::new("blockdev-backup", data)
    }
}

impl Monitor {
    /// Carries out all actions at one instant, or none. Cancel-safe as [`Monitor::execute`].
    pub async fn transaction(&self, actions: &[Action]) -> Result<()> {
        self.execute_raw("transaction", json!({ "actions": actions })).await.map(drop)
    }
}
