//! Background jobs.

use qapi::qmp;
use serde::Deserialize;
use serde_json::json;

use crate::connection::Monitor;
use crate::error::Result;

/// A job of any sort.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// Its sort (`backup`, `mirror`), known to this crate or not.
    #[serde(rename = "type")]
    pub sort: String,
    /// Its status (`running`, `concluded`); compare with the constants of [`status`].
    pub status: String,
    /// Why it failed, once it has. `Operation canceled` after a cancel is the normal end of a
    /// backup job with `sync=none`.
    #[serde(default)]
    pub error: Option<String>,
}

/// Status names of jobs (qapi/job.json, JobStatus).
pub mod status {
    /// It runs.
    pub const RUNNING: &str = "running";
    /// It runs, and is stopped for a moment; every graph change does this to every job.
    pub const PAUSED: &str = "paused";
    /// It ended and waits to be dismissed.
    pub const CONCLUDED: &str = "concluded";
}

/// A job on a block device, as the older query shows it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct BlockJob {
    /// The id of the job; device name for old-style jobs.
    pub device: String,
    /// Its sort.
    #[serde(rename = "type")]
    pub sort: String,
    /// Bytes to do.
    pub len: u64,
    /// Bytes done.
    pub offset: u64,
    /// Its status.
    #[serde(default)]
    pub status: Option<String>,
}

/// Each is cancel-safe as [`Monitor::execute`] is.
impl Monitor {
    /// All jobs.
    pub async fn query_jobs(&self) -> Result<Vec<Job>> {
        self.query("query-jobs", json!({})).await
    }

    /// All jobs on block devices.
    pub async fn query_block_jobs(&self) -> Result<Vec<BlockJob>> {
        self.query("query-block-jobs", json!({})).await
    }

    /// Asks a job to end at once; it concludes some time later.
    pub async fn job_cancel(&self, id: &str) -> Result<()> {
        self.execute(qmp::job_cancel { id: id.to_owned() }).await.map(drop)
    }

    /// Removes a concluded job.
    pub async fn job_dismiss(&self, id: &str) -> Result<()> {
        self.execute(qmp::job_dismiss { id: id.to_owned() }).await.map(drop)
    }
}
