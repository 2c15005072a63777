//! The catalog: what lists, choices and retention need of points, without reading their manifests.
//!
//! It is a set of immutable sorted [`segment`]s of summaries. A run adds one of a single point just
//! before its manifest and merges them as they pile up; the collector drops what is forgotten.
//!
//! Never authoritative. Which points there are is said by the names of the manifests and by the
//! tombstones alone; the catalog only saves reading them. A summary it lacks is read from its
//! manifest, one of no point is ignored, and so is a segment that is damaged, with a warning, until
//! the collector replaces it. A summary is there before its manifest, so that the names a VM ever
//! had are known as long as every segment opens: that is how `foo@latest` looks at the points of the
//! VMs called foo and no others.

mod merge;
mod pages;
mod segment;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;

use tokio::task::JoinSet;

pub(super) use merge::{merge_tier, tidy};
pub use pages::SummaryPages;

use super::blobs::Blobs;
use super::manifest::Manifest;
use super::points::{self, Domains, PointName};
use super::seal::random;
use super::store::{Folder, for_each, from_hex};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use crate::vm::{FullReason, PointId, Quiescence, ReadMode, Uuid, VmIdentity};
use segment::{Segment, SegmentWriter};

/// Groups of blocks that are read and decoded at once: a few megabytes.
const GROUPS_IN_FLIGHT: usize = 4;

/// Manifests that are read at a time and held.
const MANIFESTS_AT_ONCE: usize = 64;

/// Fewest digits of a UUID that name a VM.
const UUID_DIGITS_MIN: usize = 8;

/// The id of a segment.
pub(super) type SegmentId = [u8; 16];

/// What lists and choices need of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Which VM.
    pub vm: Arc<VmIdentity>,
    /// The point's id.
    pub point: PointId,
    /// Its place among the points of its domain.
    pub sequence: u64,
    /// When it was taken.
    pub taken: Timestamp,
    /// Consistency achieved.
    pub quiescence: Quiescence,
    /// How many disks it holds.
    pub disks: usize,
    /// How many of them were read incrementally.
    pub incremental: usize,
    /// Why the others were read in full, each reason once. None of a point that was listed by a version
    /// that noted none.
    pub reasons: Vec<FullReason>,
    /// Their virtual sizes.
    pub size_bytes: u64,
    /// Bytes read from the VM.
    pub read_bytes: u64,
    /// Bytes it added to the repository.
    pub stored_bytes: u64,
}

impl Summary {
    /// The summary of a manifest.
    pub fn of(manifest: &Manifest) -> Self {
        let disks = &manifest.body.disks;
        let incremental = |mode: &ReadMode| matches!(mode, ReadMode::Incremental { .. });
        let mut reasons = Vec::new();
        for disk in disks {
            if let ReadMode::Full { reason } = disk.read
                && !reasons.contains(&reason)
            {
                reasons.push(reason);
            }
        }
        Self {
            vm: Arc::new(manifest.body.vm.clone()),
            point: manifest.point,
            sequence: manifest.sequence,
            taken: manifest.body.taken,
            quiescence: manifest.body.quiescence.clone(),
            disks: disks.len(),
            incremental: disks.iter().filter(|disk| incremental(&disk.read)).count(),
            reasons,
            size_bytes: disks.iter().map(|disk| disk.description.size_bytes).sum(),
            read_bytes: disks.iter().map(|disk| disk.read_bytes).sum(),
            stored_bytes: disks.iter().map(|disk| disk.stats.stored_bytes).sum(),
        }
    }

    /// The point's name.
    pub fn name(&self) -> PointName {
        PointName { domain: self.vm.uuid, sequence: self.sequence, point: self.point }
    }
}

/// Of which points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointsOf<'a> {
    /// All.
    All,
    /// Those of every VM that may have had this name at one of its points, or whose UUID begins
    /// with it: all that can be meant, and seldom others.
    Called(&'a str),
}

/// Adds a summary, as a segment of its own.
pub(super) async fn add(blobs: &Blobs, summary: &Summary) -> Result<()> {
    let mut writer = SegmentWriter::create(&*blobs.store, &blobs.keys, &random::<16>()).await?;
    writer.push(summary.clone()).await?;
    writer.finish(&[]).await
}

/// The summaries of points, in the repository's order. Cancel-safe.
pub(super) async fn summaries(blobs: &Arc<Blobs>, of: PointsOf<'_>) -> Result<Vec<Summary>> {
    match Catalog::open(blobs).await?.points(of).await {
        // The collector merged a segment away under us.
        Err(error) if error.kind() == Kind::NotFound => {
            Catalog::open(blobs).await?.points(of).await
        }
        found => found,
    }
}

/// The segments of the moment.
struct Catalog {
    blobs: Arc<Blobs>,
    segments: Vec<Arc<Segment>>,
    /// Segments that are still stored but replaced by others.
    superseded: HashSet<SegmentId>,
    /// Segments that do not open, and since when they are there.
    damaged: Vec<(SegmentId, Timestamp)>,
    /// Whether what does not open may hold points that nothing else here knows.
    is_partial: bool,
}

impl Catalog {
    /// Opens the segments that count. A large one is opened before the small ones it replaces.
    async fn open(blobs: &Arc<Blobs>) -> Result<Self> {
        let mut listed = Vec::new();
        for_each(&*blobs.store, Folder::Catalog.prefix(), |object| {
            let id = from_hex::<16>(object.name.last());
            listed.extend(id.map(|id| (object.size_bytes, id, object.stored)));
        })
        .await?;
        listed.sort_unstable_by(|a, b| b.cmp(a));
        let mut catalog = Self {
            blobs: Arc::clone(blobs),
            segments: Vec::new(),
            superseded: HashSet::new(),
            damaged: Vec::new(),
            is_partial: false,
        };
        for (_, id, stored) in &listed {
            if catalog.superseded.contains(id) {
                continue;
            }
            match Segment::open(&*blobs.store, &blobs.keys, (*id, *stored)).await {
                Ok(segment) => {
                    catalog.superseded.extend(segment.supersedes());
                    catalog.segments.push(Arc::new(segment));
                }
                // Collected since it was listed: what it knew is elsewhere, maybe not listed yet.
                Err(error) if error.kind() == Kind::NotFound => catalog.is_partial = true,
                Err(error) if error.kind() == Kind::Corrupt => {
                    tracing::warn!(%error, "a segment of the catalog cannot be read: listing is slow");
                    catalog.is_partial = true;
                    if error.kind() == Kind::Corrupt {
                        catalog.damaged.push((*id, *stored));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        let Self { segments, superseded, damaged, .. } = &mut catalog;
        segments.retain(|segment| !superseded.contains(&segment.id));
        damaged.retain(|(id, _)| !superseded.contains(id));
        let there: HashSet<SegmentId> = listed.iter().map(|(_, id, _)| *id).collect();
        superseded.retain(|id| there.contains(id));
        Ok(catalog)
    }

    async fn points(&self, of: PointsOf<'_>) -> Result<Vec<Summary>> {
        self.summaries(&self.names(of).await?).await
    }

    /// The names of the points, in their order.
    async fn names(&self, of: PointsOf<'_>) -> Result<Vec<PointName>> {
        let store = &*self.blobs.store;
        match of {
            PointsOf::All => points::names(store, Domains::All).await,
            PointsOf::Called(text) => {
                let domains = self.domains(text).await?;
                points::names(store, Domains::Of(&domains)).await
            }
        }
    }

    /// The domains with points that may be called `text`.
    async fn domains(&self, text: &str) -> Result<Vec<Uuid>> {
        let (mut known, mut called) = (BTreeSet::new(), BTreeSet::new());
        for (uuid, names) in self.segments.iter().flat_map(|segment| segment.vms()) {
            known.insert(*uuid);
            if names.contains(text) {
                called.insert(*uuid);
            }
        }
        let begins =
            |uuid: &Uuid| text.len() >= UUID_DIGITS_MIN && uuid.to_string().starts_with(text);
        // A domain that no segment knows may be called anything.
        let maybe = |uuid: &Uuid| {
            self.is_partial || called.contains(uuid) || !known.contains(uuid) || begins(uuid)
        };
        let there = self.blobs.store.parts(Folder::Points).await?;
        Ok(there.iter().filter_map(|part| part.parse().ok()).filter(maybe).collect())
    }

    /// The summaries of the points `names` (sorted), in that order; without those that were
    /// collected meanwhile, and those whose manifests would have to be read and are damaged.
    async fn summaries(&self, names: &[PointName]) -> Result<Vec<Summary>> {
        let mut found: Vec<Option<Summary>> = vec![None; names.len()];
        let missing = self.find(names, |at, summary| found[at] = Some(summary)).await?.missing;
        let blobs = &self.blobs;
        for some in missing.chunks(MANIFESTS_AT_ONCE) {
            for manifest in points::readable(&blobs.store, &blobs.keys, some).await? {
                let summary = Summary::of(&manifest);
                if let Ok(at) = names.binary_search(&summary.name()) {
                    found[at] = Some(summary);
                }
            }
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Hands over what the catalog knows of `names` (sorted), each at least once, with its place.
    async fn find(
        &self,
        names: &[PointName],
        mut take: impl FnMut(usize, Summary),
    ) -> Result<Found> {
        let mut known = vec![false; names.len()];
        let mut broken = HashSet::new();
        let mut place = |group: Group| match group {
            Group::Read(summaries) => {
                for summary in summaries {
                    if let Ok(at) = names.binary_search(&summary.name()) {
                        known[at] = true;
                        take(at, summary);
                    }
                }
            }
            Group::Broken(id) => drop(broken.insert(id)),
        };
        let mut tasks = JoinSet::new();
        for segment in &self.segments {
            for group in segment.groups(names) {
                if tasks.len() >= GROUPS_IN_FLIGHT {
                    tasks.join_next().await.map(joined).transpose()?.map(&mut place);
                }
                let (blobs, segment) = (Arc::clone(&self.blobs), Arc::clone(segment));
                tasks.spawn(async move {
                    match read(&blobs, &segment, group).await {
                        Err(error) if error.kind() == Kind::Corrupt => {
                            tracing::warn!(%error, "a part of the catalog is damaged: listing is slow");
                            Ok(Group::Broken(segment.id))
                        }
                        read => read.map(Group::Read),
                    }
                });
            }
        }
        while let Some(done) = tasks.join_next().await {
            place(joined(done)?);
        }
        let missing = names.iter().zip(known).filter(|(_, known)| !known);
        Ok(Found { missing: missing.map(|(name, _)| *name).collect(), broken })
    }
}

/// What a search did not find.
struct Found {
    /// The names the catalog does not know, sorted.
    missing: Vec<PointName>,
    /// Segments with damaged blocks.
    broken: HashSet<SegmentId>,
}

/// A group of blocks.
enum Group {
    Read(Vec<Summary>),
    Broken(SegmentId),
}

async fn read(blobs: &Blobs, segment: &Arc<Segment>, group: Range<usize>) -> Result<Vec<Summary>> {
    let bytes = segment.read(&*blobs.store, group.clone()).await?;
    let segment = Arc::clone(segment);
    blobs.workers.run(move || segment.decode(group, bytes)).await?
}

fn joined(done: Result<Result<Group>, tokio::task::JoinError>) -> Result<Group> {
    done.map_err(|e| Error::new(Kind::Internal, "reading the catalog died").source(e))?
}
