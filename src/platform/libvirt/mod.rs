//! Domains of a libvirt daemon: running ones through pull-mode backup jobs and checkpoints, stopped
//! ones through their images.
//!
//! ```text
//!  survey ─► lock ─► reconcile ─► bases ─► [freeze] ─► begin job + checkpoint ─► [thaw]
//!                                                            │
//!     commit: end job, drop old bitmaps, forget metadata ◄───┼──► abort: end job, drop new bitmap
//! ```
//!
//! Everything goes through libvirt's own API; the monitor is libvirt's and is left alone. The
//! domain keeps no mark of us but one bitmap per tracked disk and repository: checkpoint metadata
//! is redefined before a run and removed after it, so that a protected domain can be undefined,
//! migrated and managed as any other.
//!
//! Files: `ffi` (the C calls), `connection` (deadlines, look-up), `survey`, `disks`, `xml` (what a
//! domain is), `pools` (volumes of storage pools), `names`, `lock` (ownership), `reconcile` (what a
//! killed run left), `checkpoint` (bases), `job`, `quiesce`, `agent`, `scratch`, `watch`, `teardown`
//! (the end of a job), `reach`, `restore` (the way back), `open`, `snapshot` (the transaction),
//! `stopped` (the same for images), `plan`, `artifacts`.
//!
//! Deliberately not done: monitor commands (they taint the domain), push-mode jobs (QEMU would
//! write to the target at the target's speed, in the guest's way).

mod agent;
mod artifacts;
mod checkpoint;
mod connection;
mod disks;
mod error;
mod ffi;
mod job;
mod lock;
mod names;
mod open;
mod plan;
mod pools;
mod quiesce;
mod reach;
mod reconcile;
pub mod restore;
mod scratch;
mod snapshot;
mod stopped;
mod survey;
mod teardown;
mod watch;
pub mod xml;

use std::path::PathBuf;

use async_trait::async_trait;

pub use self::agent::DomainAgent;
pub(crate) use self::connection::remote_host;
use self::connection::{DomainHandle, Host};
use super::{Platform, RecoverRequest, SnapshotPlan, SnapshotRequest, VmSnapshot};
use crate::control::Control;
use crate::error::Result;
use crate::journal::{Item, Journals};
use crate::vm::VmIdentity;

/// Registry name of this platform.
pub const PLATFORM: &str = "libvirt";

/// How to reach a domain.
#[derive(Clone, Debug)]
pub struct LibvirtOptions {
    /// Connection URI; `qemu:///system` if not given.
    pub uri: Option<String>,
    /// The domain's name or UUID.
    pub domain: String,
    /// Where the locks of running backups are: one directory per machine and user, gone at boot
    /// (`/run/vmbackup`). Made if missing.
    pub runtime_dir: PathBuf,
    /// Where it is written down what a run has to undo.
    pub journals: Journals,
    /// What happens to libvirt's record of our checkpoints after a run.
    pub metadata: CheckpointMetadata,
}

/// What happens to libvirt's record of our checkpoints after a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckpointMetadata {
    /// Removed; the bitmaps stay. The domain can be undefined and migrated as before.
    #[default]
    Remove,
    /// Left, for other tools to see.
    Keep,
}

/// A domain of a libvirt daemon.
pub struct Libvirt {
    domain: DomainHandle,
    options: LibvirtOptions,
}

impl Libvirt {
    /// Connects and finds the domain. Changes nothing.
    ///
    /// Fails with [`Kind::NotFound`](crate::error::Kind::NotFound) and the names there are when the
    /// domain is unknown.
    pub async fn open(options: LibvirtOptions) -> Result<Self> {
        let host = Host::open(options.uri.as_deref()).await?;
        let domain = host.domain(&options.domain).await?;
        Ok(Self { domain, options })
    }

    fn identity(&self) -> VmIdentity {
        VmIdentity {
            uuid: self.domain.uuid,
            name: self.domain.name.to_string(),
            host: self.domain.host.hostname().to_owned(),
            platform: PLATFORM.to_owned(),
        }
    }
}

#[async_trait]
impl Platform for Libvirt {
    async fn identify(&self) -> Result<VmIdentity> {
        Ok(self.identity())
    }

    async fn plan(&self, request: &SnapshotRequest) -> Result<SnapshotPlan> {
        plan::plan(&self.domain, &self.options, self.identity(), request).await
    }

    async fn open_snapshot(
        &self,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<Box<dyn VmSnapshot>> {
        open::open(&self.domain, &self.options, request, control).await
    }

    async fn recover(&self, request: &RecoverRequest, control: &Control) -> Result<Vec<Item>> {
        reconcile::recover(&self.domain, &self.options, request, control).await
    }
}
