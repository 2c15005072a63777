//! The deduplicating repository: complete restore points out of shared, sealed chunks.
//!
//! ```text
//!  point (manifest) ─► disk: top of a content tree ─► nodes ─► chunks      what is stored
//!  id of a blob = keyed hash(content hash) ─► index ─► pack, offset        where it lies
//!
//!  Run ── DiskWriter ─► Packer ─► ObjectStore       one backup writes      (session, writer, packer)
//!  DiskReader ◄── Blobs ◄── Index ◄── ObjectStore   anybody reads          (reader, blobs, index)
//! ```
//!
//! Invariants kept here: *Commit order* (chunks durable → index durable → manifest, the commit
//! point: [`session`]), *Deletion* (only the collector deletes objects), *Secrets* (keys appear in
//! no message and no `Debug`). Every point is complete: no chain is replayed, and forgetting one
//! never touches another. `docs/repository-format.md` specifies every byte.
//!
//! Called by `job`; knows nothing of platforms.

pub mod blobs;
pub mod catalog;
pub mod changes;
pub mod check;
mod compress;
pub mod condemned;
pub mod config;
pub mod damaged;
mod durable;
mod failure;
pub mod forget;
pub mod gc;
pub mod hold;
pub mod index;
pub mod keys;
pub mod losses;
pub mod manifest;
pub mod pack;
pub mod packer;
pub mod points;
pub mod reader;
pub mod run;
mod salvage;
pub mod seal;
pub mod session;
pub mod store;
pub mod tree;
pub mod trust;
pub mod writer;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use catalog::{PointsOf, Summary, SummaryPages};
pub use changes::ChangedDisk;
pub use check::{BaseDamage, CheckOptions, CheckReport, Depth, Repair};
pub use durable::Durability;
pub use gc::{CollectOptions, CollectReport};
pub use hold::Hold;
pub use index::is_of_index;
pub use losses::{Loss, Losses};
pub use manifest::{Manifest, ManifestArtifact, ManifestDisk, ManifestDraft};
use points::Domains;
pub use points::PointName;
pub use reader::DiskReader;
pub use run::Lease;
pub use session::{ARTIFACT_BYTES_MAX, Run};
pub use writer::{DiskWriter, StoredChunk, StoredDisk, WriteStats};

use blobs::Blobs;
use index::Index;
use keys::{Credentials, InitOptions, Unlocked};
use run::RunKind;
use store::ObjectStore;

use crate::block;
use crate::control::Control;
use crate::error::Result;
use crate::vm::{PointId, Uuid};
use crate::workers::Workers;

/// An open repository.
pub struct Repository {
    blobs: Arc<Blobs>,
    unlocked: Unlocked,
}

impl Repository {
    /// Opens the repository in `store`.
    pub async fn open(
        store: Arc<dyn ObjectStore>,
        credentials: &Credentials,
        workers: Workers,
    ) -> Result<Self> {
        let unlocked = keys::open(&*store, credentials).await?;
        Self::with_keys(store, unlocked, workers).await
    }

    /// Makes a repository in `store`, which is empty, and opens it.
    pub async fn init(
        store: Arc<dyn ObjectStore>,
        credentials: &Credentials,
        options: InitOptions,
        workers: Workers,
    ) -> Result<Self> {
        let unlocked = keys::init(&*store, credentials, options).await?;
        Self::with_keys(store, unlocked, workers).await
    }

    async fn with_keys(
        store: Arc<dyn ObjectStore>,
        unlocked: Unlocked,
        workers: Workers,
    ) -> Result<Self> {
        let keys = Arc::clone(&unlocked.keys);
        let index = Arc::new(Index::open(Arc::clone(&store), Arc::clone(&keys)).await?);
        let blobs = Arc::new(Blobs::new(store, keys, index, workers));
        blobs.damaged.load().await?;
        Ok(Self { blobs, unlocked })
    }

    /// The repository's id: 32 hex digits.
    pub fn id(&self) -> String {
        self.unlocked.config.id.to_string()
    }

    /// Its configuration, its keys and the slot that opened: what [`keys::add`] needs.
    pub fn unlocked(&self) -> &Unlocked {
        &self.unlocked
    }

    /// Where it is.
    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.blobs.store
    }

    /// Whether a password or key file is needed to open it.
    pub fn has_key(&self) -> bool {
        self.unlocked.has_key()
    }

    /// Size of a chunk.
    pub fn chunk_bytes(&self) -> u64 {
        self.unlocked.config.chunk.bytes()
    }

    /// The names of the points of `domain`, or of all, in their order.
    pub async fn point_names(&self, domain: Option<Uuid>) -> Result<Vec<PointName>> {
        let of = domain.as_slice();
        let domains = if domain.is_some() { Domains::Of(of) } else { Domains::All };
        points::names(&*self.blobs.store, domains).await
    }

    /// The manifest of a point.
    pub async fn manifest(&self, name: &PointName) -> Result<Manifest> {
        points::manifest(&*self.blobs.store, &self.blobs.keys, name).await
    }

    /// The manifests of the points of `domain`, or of all, in their order. Those that are damaged are
    /// left out with a warning.
    pub async fn manifests(&self, domain: Option<Uuid>) -> Result<Vec<Manifest>> {
        let names = self.point_names(domain).await?;
        points::readable(&self.blobs.store, &self.blobs.keys, &names).await
    }

    /// What lists and choices need of points, in their order. Those whose manifests have to be read
    /// for it and are damaged are left out with a warning.
    pub async fn summaries(&self, of: PointsOf<'_>) -> Result<Vec<Summary>> {
        catalog::summaries(&self.blobs, of).await
    }

    /// The same a page at a time, for very many points.
    pub async fn summary_pages(&self, of: PointsOf<'_>) -> Result<SummaryPages> {
        SummaryPages::open(&self.blobs, of).await
    }

    /// Begins a backup. Everything it relies on is looked at after its lease is visible, so choose
    /// bases after this.
    pub async fn begin_run(&self) -> Result<Run> {
        let Blobs { store, keys, index, .. } = &*self.blobs;
        let lease = Lease::begin(store, keys, RunKind::Backup).await?;
        let condemned = condemned::packs(&**store, keys).await?;
        index.refresh().await?;
        self.blobs.damaged.load().await?;
        Ok(Run::new(Arc::clone(&self.blobs), self.chunk_bytes(), lease, condemned))
    }

    /// Keeps every point that is there now readable until the hold ends, also those that are
    /// forgotten meanwhile: the collector deletes nothing that it condemns while this lives. Look the
    /// points up after it.
    pub async fn hold(&self) -> Result<Lease> {
        let Blobs { store, keys, index, .. } = &*self.blobs;
        let lease = Lease::begin(store, keys, RunKind::Read).await?;
        index.refresh().await?;
        Ok(lease)
    }

    /// Does `work`, which reads points that it looks up itself, under a hold as far as one can be
    /// had.
    pub async fn while_held<T>(
        &self,
        control: &Control,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let hold = Hold::begin(self, control).await?;
        hold.end(work.await).await
    }

    /// Forgets a point: it is not listed any more, and the next collection frees its space.
    pub async fn forget(&self, point: PointId) -> Result<()> {
        forget::forget(&*self.blobs.store, &self.blobs.keys, point).await
    }

    /// Frees what no point needs.
    pub async fn collect(
        &self,
        options: CollectOptions,
        control: &Control,
    ) -> Result<CollectReport> {
        gc::collect(&self.blobs, self.unlocked.config.chunk.levels(), options, control).await
    }

    /// Looks for damage, and names what it affects.
    pub async fn check(&self, options: CheckOptions, control: &Control) -> Result<CheckReport> {
        check::check(&self.blobs, self.unlocked.config.chunk.levels(), options, control).await
    }

    /// Opens a stored disk for reading.
    pub async fn open_disk(&self, stored: &StoredDisk) -> Result<DiskReader> {
        let levels = self.unlocked.config.chunk.levels();
        DiskReader::open(Arc::clone(&self.blobs), levels, stored).await
    }

    /// Opens a stored disk to read what can be read of it: what is proven to be damaged reads as
    /// zeroes and is noted.
    pub async fn open_disk_salvaging(
        &self,
        stored: &StoredDisk,
    ) -> Result<(DiskReader, Arc<Losses>)> {
        let levels = self.unlocked.config.chunk.levels();
        DiskReader::open_salvaging(Arc::clone(&self.blobs), levels, stored).await
    }

    /// Reads a stored artefact.
    pub async fn read_bytes(&self, stored: &StoredDisk) -> Result<Vec<u8>> {
        block::read_all(&self.open_disk(stored).await?, ARTIFACT_BYTES_MAX).await
    }
}
