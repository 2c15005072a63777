//! A run: everything one backup writes, up to the manifest that makes it a restore point.
//!
//! ```text
//!                    make_point                                 end
//!  Writing ──► manifest is being stored ──► Committed  ──► indexes are merged, lease ends
//!     │                   └ failed, or late ───► Unsure ──► point is forgotten, lease lapses
//!     └ error, or given up ───────────────────────────────► packs are given up, lease ends
//! ```
//!
//! *Commit order*: chunks and tree nodes durable → index durable → lease re-checked → manifest (the
//! commit point). A crash before the manifest leaves garbage for the collector, never a point that
//! cannot be restored; an error of any write surfaces at the latest in [`Run::make_point`].
//!
//! A run holds a lease from before it looks at anything until its manifest is there, and dedups
//! against no pack that was condemned when it began; `gc` waits for it. Its bases must still be
//! points when it commits. While a manifest of which nobody knows may appear, the lease has to hold:
//! it is not ended then.
//!
//! Chunks are known when the index knows them, or when this run has claimed them: a claim is made
//! before the blob is stored, and a run with a failed write never commits. What the index knows is
//! durable; what was claimed is once its pack is ([`super::durable`]).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use super::blobs::Blobs;
use super::catalog;
use super::check::BaseDamage;
use super::compress::{Search, compress};
use super::condemned::Condemned;
use super::durable::Durability;
use super::failure::Failure;
use super::forget;
use super::index::{Index, IndexEntry, Location};
use super::manifest::{Manifest, ManifestDraft};
use super::pack::Encoding;
use super::packer::{BlobBytes, DurableSink, EncodedBlob, Packer, Sealed, Target};
use super::points::{self, Domains};
use super::run::{LEASE_OF_WRITER, Lease};
use super::seal::{BlobId, BlobKind, ObjectType};
use super::trust::Trust;
use super::writer::{DiskWriter, StoredDisk};
use crate::block::{BlockSink, Buffer, ByteRange, ZeroMode};
use crate::content;
use crate::error::{Error, Kind, Result};
use crate::vm::{PointId, ReadMode};

/// Entries of durable packs that are gathered before they become an index segment: about 24 MiB.
const SPILL_ENTRIES: usize = 250_000;

/// Largest artefact: a direct-boot initrd is the biggest thing anybody has.
pub const ARTIFACT_BYTES_MAX: usize = 1 << 30;

/// Whether a chunk has to be stored.
#[derive(Debug)]
pub(super) enum Known {
    Yes(Durability),
    New(Claim),
}

/// The duty to store a blob that others already rely on. Dropped before the blob is with its pack
/// (an error, a write that was given up), it fails the run.
#[derive(Debug)]
pub(super) struct Claim {
    id: BlobId,
    failure: Failure,
    state: ClaimState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClaimState {
    Open,
    Kept,
}

impl Claim {
    /// The blob is with its pack, whose own failures are kept from here on.
    fn kept(mut self) {
        self.state = ClaimState::Kept;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.state == ClaimState::Open {
            let what = format!("the write of blob {} was given up half-way", self.id);
            self.failure.set(Error::new(Kind::Cancelled, what));
        }
    }
}

/// A sealed blob on its way to its pack.
pub(super) struct SealedBlob {
    sealed: Sealed,
    kind: BlobKind,
    stored_bytes: u64,
    claim: Claim,
}

/// What became of a blob that is with its pack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    /// What it takes there.
    pub(super) stored_bytes: u64,
    pub(super) durability: Durability,
}

/// What the disks of a run share.
pub(super) struct RunShared {
    trust: Trust,
    pub(super) blobs: Arc<Blobs>,
    pub(super) chunk_levels: u32,
    chunks: Packer,
    nodes: Packer,
    durable: Arc<Durable>,
    failure: Failure,
}

/// Gathers the entries of durable packs and spills them into index segments.
struct Durable {
    index: Arc<Index>,
    state: Mutex<Gathered>,
}

#[derive(Default)]
struct Gathered {
    entries: Vec<IndexEntry>,
    /// Blobs of this run that no segment lists yet, and the packs of chunks that have one.
    claimed: HashMap<BlobId, Option<u64>>,
}

impl Durable {
    fn lock(&self) -> std::sync::MutexGuard<'_, Gathered> {
        // Held for set operations, never across an await.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn spill(&self, entries: Vec<IndexEntry>) -> Result<()> {
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        self.index.add(entries).await?;
        let mut state = self.lock();
        for id in &ids {
            state.claimed.remove(id);
        }
        Ok(())
    }
}

#[async_trait]
impl DurableSink for Durable {
    async fn durable(&self, entries: Vec<IndexEntry>) -> Result<()> {
        let full = {
            let mut state = self.lock();
            state.entries.extend(entries);
            (state.entries.len() >= SPILL_ENTRIES).then(|| std::mem::take(&mut state.entries))
        };
        match full {
            Some(entries) => self.spill(entries).await,
            None => Ok(()),
        }
    }
}

impl RunShared {
    /// Whether the blob is stored already, or claimed by this run; claims it if not.
    pub(super) async fn known(&self, id: &BlobId) -> Result<Known> {
        if let Some(known) = self.known_at_once(id) {
            return Ok(known);
        }
        let may_rely_on = |location: &Location| self.trust.may_rely_on(&location.pack.id);
        // Ends: a pack that is not there, or damaged, is not found again.
        while let Some(found) = self.blobs.index.lookup(id, &may_rely_on).await? {
            if self.trust.is_there(&found).await? {
                return Ok(Known::Yes(Durability::Now));
            }
        }
        // Another task may have claimed it while the index was asked.
        Ok(self.known_or_claimed(id, &mut self.durable.lock().claimed))
    }

    /// The same as far as it can be said without reading the index; a worker may ask.
    pub(super) fn known_at_once(&self, id: &BlobId) -> Option<Known> {
        let mut state = self.durable.lock();
        if !state.claimed.contains_key(id) && self.blobs.index.may_contain(id) {
            return None;
        }
        Some(self.known_or_claimed(id, &mut state.claimed))
    }

    fn known_or_claimed(&self, id: &BlobId, claimed: &mut HashMap<BlobId, Option<u64>>) -> Known {
        match claimed.entry(*id) {
            Entry::Occupied(pack) => {
                Known::Yes((*pack.get()).map_or(Durability::Commit, with_pack))
            }
            Entry::Vacant(place) => {
                place.insert(None);
                Known::New(self.claim(*id))
            }
        }
    }

    fn claim(&self, id: BlobId) -> Claim {
        Claim { id, failure: self.failure.clone(), state: ClaimState::Open }
    }

    /// Stores a blob that was claimed.
    pub(super) async fn store_new(
        self: &Arc<Self>,
        claim: Claim,
        kind: BlobKind,
        plain: Buffer,
    ) -> Result<Sent> {
        let run = Arc::clone(self);
        let blob = self.blobs.workers.run(move || run.seal(claim, kind, plain)).await??;
        self.send(blob).await
    }

    /// Encodes and seals a blob that was claimed: CPU work, for a worker.
    pub(super) fn seal(&self, claim: Claim, kind: BlobKind, plain: Buffer) -> Result<SealedBlob> {
        let plain_bytes = u32::try_from(plain.len()).expect("a blob is at most 4 MiB");
        let search = if self.blobs.workers.is_behind() { Search::Coarse } else { Search::Thorough };
        let (encoding, bytes) = match compress(&plain, search)? {
            Some(compressed) => {
                let share = plain.into_share(compressed.len());
                (Encoding::Zstd, BlobBytes::Owned(compressed, share))
            }
            None => (Encoding::Raw, BlobBytes::AsRead(plain)),
        };
        let stored_bytes = bytes.len() as u64;
        let blob = EncodedBlob { id: claim.id, kind, encoding, plain_bytes, bytes };
        let sealed = self.packer(kind).seal(blob);
        if kind == BlobKind::Chunk
            && let Some(pack) = self.durable.lock().claimed.get_mut(&claim.id)
        {
            *pack = Some(sealed.pack);
        }
        Ok(SealedBlob { sealed, kind, stored_bytes, claim })
    }

    /// Hands a sealed blob to its pack.
    pub(super) async fn send(&self, blob: SealedBlob) -> Result<Sent> {
        let durability = match blob.kind {
            BlobKind::Chunk => with_pack(blob.sealed.pack),
            BlobKind::Node { .. } => Durability::Commit,
        };
        self.packer(blob.kind).send(blob.sealed).await?;
        blob.claim.kept();
        Ok(Sent { stored_bytes: blob.stored_bytes, durability })
    }

    fn packer(&self, kind: BlobKind) -> &Packer {
        match kind {
            BlobKind::Chunk => &self.chunks,
            BlobKind::Node { .. } => &self.nodes,
        }
    }
}

/// When what is in a pack of chunks is durable.
fn with_pack(number: u64) -> Durability {
    Durability::Packs(number + 1)
}

/// A backup in progress in this repository. Ends with [`Run::end`], with or without
/// [`Run::make_point`] before it; dropping it leaves garbage for the collector.
pub struct Run {
    shared: Arc<RunShared>,
    lease: Lease,
    stage: Stage,
}

/// How far a run is.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// There is no manifest.
    Writing,
    /// There may be one, or it may appear yet.
    Unsure(PointId),
    /// The point exists.
    Committed(PointId),
}

impl Run {
    pub(super) fn new(
        blobs: Arc<Blobs>,
        chunk_bytes: u64,
        lease: Lease,
        condemned: Condemned,
    ) -> Self {
        let durable =
            Arc::new(Durable { index: Arc::clone(&blobs.index), state: Mutex::default() });
        let chunk = usize::try_from(chunk_bytes).expect("a chunk is at most 4 MiB");
        let failure = Failure::default();
        let target = Target {
            store: Arc::clone(&blobs.store),
            keys: Arc::clone(&blobs.keys),
            sink: Arc::clone(&durable) as Arc<dyn DurableSink>,
            failure: failure.clone(),
        };
        let shared = RunShared {
            trust: Trust::new(Arc::clone(&blobs), condemned),
            chunks: Packer::new(target.clone(), ObjectType::DataPack, chunk),
            nodes: Packer::new(target, ObjectType::TreePack, 16 << 10),
            chunk_levels: (chunk_bytes / content::LEAF_BYTES).trailing_zeros(),
            blobs,
            durable,
            failure,
        };
        Self { shared: Arc::new(shared), lease, stage: Stage::Writing }
    }

    /// What the lease does by itself every few minutes, for a test whose clock stands still.
    #[cfg(test)]
    pub(super) async fn renew(&self) -> Result<()> {
        self.lease.check().await.map(drop)
    }

    /// What of the disks it may build on does not restore, as far as that is known now or seen without
    /// reading all of it.
    pub async fn base_damage(&self) -> Result<BaseDamage> {
        BaseDamage::look(&self.shared.blobs, self.shared.chunk_levels).await
    }

    /// How many packs of chunks are durable, as that grows: what [`Durability::Packs`] waits for.
    pub fn durable_packs(&self) -> watch::Receiver<u64> {
        self.shared.chunks.durable_packs()
    }

    /// A disk to be written, against `base` if that has the same size.
    pub fn disk_writer(&self, size_bytes: u64, base: Option<&StoredDisk>) -> Arc<DiskWriter> {
        Arc::new(DiskWriter::new(Arc::clone(&self.shared), size_bytes, base.cloned()))
    }

    /// Stores an artefact the way disks are stored.
    pub async fn store_bytes(&self, bytes: &[u8]) -> Result<StoredDisk> {
        if bytes.len() > ARTIFACT_BYTES_MAX {
            let what = format!("an artefact of {} bytes is larger than 1 GiB", bytes.len());
            return Err(Error::new(Kind::Unsupported, what));
        }
        let writer = self.disk_writer(bytes.len() as u64, None);
        let chunk = writer.geometry().preferred_bytes;
        let mut offset = 0;
        for piece in bytes.chunks(usize::try_from(chunk).expect("a chunk is at most 4 MiB")) {
            if content::is_zero(piece) {
                let range = ByteRange::new(offset, piece.len() as u64);
                writer.zero(range, ZeroMode::Sparse).await?;
            } else {
                writer.write(offset, Buffer::unbudgeted(piece.to_vec())).await?;
            }
            offset += piece.len() as u64;
        }
        Ok(writer.finish().await?.0)
    }

    /// Waits until all that was stored so far is durable, though not yet in the index. Cancel-safe; dropped,
    /// it may leave a run that makes no point.
    pub async fn flush(&self) -> Result<()> {
        self.shared.chunks.flush().await?;
        self.shared.nodes.flush().await
    }

    /// [`Run::make_point`] and [`Run::end`], where nothing waits for the point but for the run as well.
    pub async fn commit(mut self, point: PointId, draft: ManifestDraft) -> Result<Manifest> {
        let made = self.make_point(point, draft).await;
        if let Err(error) = self.end().await {
            tracing::warn!(%error, "cannot end the run");
        }
        made
    }

    /// Makes everything durable, then the manifest: afterwards the point exists, and whoever waits for
    /// that goes first, [`Run::end`] later. Once for a run.
    ///
    /// Fails with [`Kind::Timeout`] when the lease was lost, with [`Kind::NoBase`] when a point it
    /// builds on was forgotten meanwhile; then there is no point. Where the store does not answer there
    /// may be one, which [`Run::end`] sees to. Not cancel-safe.
    pub async fn make_point(&mut self, point: PointId, draft: ManifestDraft) -> Result<Manifest> {
        self.flush().await?;
        let entries = std::mem::take(&mut self.shared.durable.lock().entries);
        self.shared.durable.spill(entries).await?;
        // A claim may have been given up after its packer was flushed.
        self.shared.failure.check()?;
        let blobs = &self.shared.blobs;
        self.check_bases(&draft).await?;
        blobs.damaged.record_all().await?;
        let renewed = self.lease.check().await?;
        let (manifest, name, object) = points::prepare_manifest(blobs, point, draft).await?;
        // From here on it may appear, whatever the store says: a name that was given before what follows
        // failed, or by a server whose answer was lost. Not where there was no room for it.
        self.stage = Stage::Unsure(point);
        if let Err(error) = blobs.store.put(&name, object).await {
            let error = Error::from(error);
            // Room may have been short only for what follows the name.
            if error.kind() == Kind::NoSpace
                && blobs.store.stat(&name).await.is_err_and(|error| error.is_not_found())
            {
                self.stage = Stage::Writing;
            }
            return Err(error);
        }
        // The manifest is visible: was it in time?
        let late = blobs.store.now().await?.duration_since(renewed).unsigned_abs();
        if late > LEASE_OF_WRITER {
            let message = "storing the manifest took so long that its chunks may be gone";
            return Err(Error::new(Kind::Timeout, message).hint("run the backup again"));
        }
        self.stage = Stage::Committed(point);
        Ok(manifest)
    }

    /// Ends the run. A point that was made stays, whatever fails here. Without one, unfinished packs
    /// vanish and finished ones are garbage for the collector; a point of which nobody knows whether it
    /// is one is forgotten, and the collector waits until nothing of it can appear any more. Not
    /// cancel-safe.
    pub async fn end(self) -> Result<()> {
        let RunShared { blobs, chunks, nodes, .. } = &*self.shared;
        match self.stage {
            Stage::Writing => {
                tokio::join!(chunks.abort(), nodes.abort());
            }
            Stage::Unsure(point) => {
                let forgotten = forget::forget(&*blobs.store, &blobs.keys, point).await;
                return forgotten.map_err(|error| {
                    let point = point.short();
                    error.context(format!("point {point} may be listed, and need not be whole"))
                });
            }
            Stage::Committed(point) => {
                if let Err(error) = self.merge_index().await {
                    tracing::warn!(%error, "cannot merge small index segments");
                }
                if let Err(error) = catalog::merge_tier(blobs, point).await {
                    tracing::warn!(%error, "cannot merge small catalog segments");
                }
            }
        }
        // A run that cannot say that it is over lapses.
        self.lease.end().await
    }

    /// Keeps the number of index segments low. The point is there already: nothing depends on it.
    async fn merge_index(&self) -> Result<()> {
        let index = &self.shared.blobs.index;
        self.lease.check().await?;
        index.merge_tier(&|pack| self.shared.trust.may_stay(pack)).await?;
        Ok(())
    }

    /// What was kept from a base is there as long as the base is a point. Seen while our lease
    /// holds, that covers the rest of the run: a collector that begins later waits for us.
    async fn check_bases(&self, draft: &ManifestDraft) -> Result<()> {
        let bases: HashSet<PointId> = draft
            .disks
            .iter()
            .filter_map(|disk| match disk.read {
                ReadMode::Incremental { base } => Some(base),
                ReadMode::Full { .. } => None,
            })
            .collect();
        if bases.is_empty() {
            return Ok(());
        }
        let names = points::names(&*self.shared.blobs.store, Domains::Of(&[draft.vm.uuid])).await?;
        for base in bases {
            if !names.iter().any(|name| name.point == base) {
                let message = format!("point {} was forgotten during the backup", base.short());
                return Err(Error::new(Kind::NoBase, message).hint("run the backup again"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Repository;
    use super::super::run::Survey;
    use super::super::store::memory::{Fault, MemoryStore, Operation};
    use super::super::store::{Folder, ObjectName};
    use super::super::tests::{draft, open, point, store};
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_run_with_a_write_given_up_half_way_never_commits() {
        let repository = open(&store(), content::LEAF_BYTES).await;
        let run = repository.begin_run().await.unwrap();
        let id = BlobId([7; 32]);
        let Known::New(claim) = run.shared.known(&id).await.unwrap() else { panic!("it is new") };
        assert!(matches!(run.shared.known(&id).await.unwrap(), Known::Yes(_)), "others rely on it");
        drop(claim);
        let error = run.commit(point(1), draft()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Cancelled, "{error:?}");
    }

    fn is_of(operation: &Operation, folder: Folder) -> bool {
        matches!(operation, Operation::Finish(name) if name.as_str().starts_with(folder.prefix()))
    }

    /// Whether the collector waits for a run.
    async fn is_waited_for(store: &MemoryStore) -> bool {
        Survey::take(store).await.unwrap().live().next().is_some()
    }

    /// A run whose commit fails by a fault, which is over then: its store and repository, and the error.
    async fn failed(
        fault: impl Fn(&Operation) -> Option<Fault> + Send + Sync + 'static,
    ) -> (Arc<MemoryStore>, Repository, Error) {
        let store = store();
        let repository = open(&store, content::LEAF_BYTES).await;
        let run = repository.begin_run().await.unwrap();
        store.set_fault_hook(fault);
        let error = run.commit(point(1), draft()).await.unwrap_err();
        store.clear_fault_hook();
        (store, repository, error)
    }

    /// The run was over for the collector, which freed what the point needed before it appeared.
    #[tokio::test(flavor = "multi_thread")]
    async fn while_a_manifest_may_yet_appear_the_collector_waits_and_the_point_is_forgotten() {
        let silent = |op: &Operation| is_of(op, Folder::Points).then_some(Fault::Silent);
        let (store, _, error) = failed(silent).await;
        assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
        assert!(is_waited_for(&store).await);
        assert!(store.names().contains(&forget::tombstone(point(1))));
    }

    /// Found in review: only where the store was silent it was forgotten.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_manifest_that_appears_although_the_store_said_otherwise_is_no_point() {
        let lost = |op: &Operation| is_of(op, Folder::Points).then_some(Fault::LoseAnswer);
        let (store, repository, _) = failed(lost).await;
        let is_manifest = |name: &ObjectName| name.as_str().starts_with(Folder::Points.prefix());
        assert!(store.names().iter().any(is_manifest));
        assert!(repository.point_names(None).await.unwrap().is_empty());
        assert!(is_waited_for(&store).await);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_manifest_of_which_nobody_knows_whether_it_was_in_time_is_no_point() {
        for fault in [Fault::Silent, Fault::Fail] {
            let late = move |op: &Operation| (*op == Operation::Now).then_some(fault);
            let (store, repository, _) = failed(late).await;
            assert!(repository.point_names(None).await.unwrap().is_empty(), "{fault:?}");
            assert!(is_waited_for(&store).await);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_run_that_fails_before_its_manifest_is_waited_for_by_nobody() {
        let full = |op: &Operation| is_of(op, Folder::Points).then_some(Fault::Full);
        let (store, _, error) = failed(full).await;
        assert_eq!(error.kind(), Kind::NoSpace);
        assert!(!is_waited_for(&store).await);
    }
}
