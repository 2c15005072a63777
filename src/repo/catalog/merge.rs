//! Merges segments of the catalog as they pile up, and puts it right when the collector runs.
//!
//! Eight segments of about one size become one; so a summary is rewritten once per factor of eight
//! by which the repository grows, and listing opens a few dozen segments. The merge streams. What a
//! merge writes names all it replaces, including what that had replaced and is still stored; the
//! collector alone deletes. Two merges of the same segments at once leave each summary twice, which
//! readers do not mind.
//!
//! A summary comes before its manifest. So the collector may drop one without a manifest only from a
//! segment that was stored before every run that is still at work began: as with packs.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::segment::{Segment, SegmentWriter, segment_name};
use super::{Blobs, Catalog, MANIFESTS_AT_ONCE, SegmentId, Summary, read};
use crate::clock::Timestamp;
use crate::control::Control;
use crate::error::Result;
use crate::repo::points::{self, PointName};
use crate::repo::seal::random;
use crate::repo::store::StoreError;
use crate::vm::PointId;

/// Segments of one tier that become one of the next.
const FAN_IN: usize = 8;

/// Most summaries that a run merges, about 15 MB: it is not held up for longer than a second.
const MERGE_POINTS_MAX: u64 = 100_000;

/// One run in so many looks whether there is something to merge: looking opens every segment.
const MERGE_ONE_IN: u8 = 8;

/// The collector merges all into one when there are more segments than this, or when more than a
/// quarter of the summaries are of no point.
const SEGMENTS_MAX: usize = 16;

/// Which of segments with so many points to merge: the smallest tier that is full.
fn choose(points: &[u64]) -> Option<Vec<usize>> {
    let tier = |points: u64| points.max(1).ilog(FAN_IN as u64);
    let highest = points.iter().map(|n| tier(*n)).max()?;
    (0..=highest).find_map(|wanted| {
        let mut full = Vec::new();
        let mut sum: u64 = 0;
        for (at, count) in points.iter().enumerate().filter(|(_, n)| tier(**n) == wanted) {
            if sum + count <= MERGE_POINTS_MAX {
                full.push(at);
                sum += count;
            }
        }
        (full.len() >= FAN_IN).then_some(full)
    })
}

/// Merges the segments of a tier that is full, if it is the turn of the run that made `point`.
/// Cancel-safe: a merge that is given up leaves nothing.
pub(in crate::repo) async fn merge_tier(blobs: &Arc<Blobs>, point: PointId) -> Result<()> {
    if !point.0[15].is_multiple_of(MERGE_ONE_IN) {
        return Ok(());
    }
    let catalog = Catalog::open(blobs).await?;
    let points: Vec<u64> = catalog.segments.iter().map(|segment| segment.points()).collect();
    let Some(chosen) = choose(&points) else { return Ok(()) };
    let sources: Vec<_> = chosen.iter().map(|at| Arc::clone(&catalog.segments[*at])).collect();
    catalog.merge(&sources, |_| true).await?;
    tracing::debug!(segments = sources.len(), "merged catalog segments");
    Ok(())
}

/// Puts the catalog right for the points `names` (sorted), the only ones there are apart from those
/// of runs that began at `cutoff` or later: takes in what it lacks, drops what is forgotten, merges,
/// and deletes what was replaced. For the collector, which holds its lease.
pub(in crate::repo) async fn tidy(
    blobs: &Arc<Blobs>,
    names: &[PointName],
    (cutoff, control): (Timestamp, &Control),
) -> Result<()> {
    Catalog::open(blobs).await?.take_in(names, (cutoff, control)).await?;
    let mut catalog = Catalog::open(blobs).await?;
    let settled: Vec<_> =
        catalog.segments.iter().filter(|s| s.stored < cutoff).map(Arc::clone).collect();
    let stored: u64 = settled.iter().map(|segment| segment.points()).sum();
    let dead = stored.saturating_sub(names.len() as u64);
    if settled.len() > SEGMENTS_MAX || dead * 4 > stored {
        catalog.merge(&settled, |name| names.binary_search(name).is_ok()).await?;
        catalog = Catalog::open(blobs).await?;
    }
    for id in &catalog.superseded {
        control.check()?;
        match blobs.store.delete(&segment_name(id)).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Catalog {
    /// Adds what the catalog lacks of `names`, from the manifests, in a segment that replaces what
    /// is damaged and settled.
    async fn take_in(
        mut self,
        names: &[PointName],
        (cutoff, control): (Timestamp, &Control),
    ) -> Result<()> {
        let missing = loop {
            let found = self.find(names, |_, _| {}).await?;
            if found.broken.is_empty() {
                break found.missing;
            }
            // What else they hold is taken from the manifests, too.
            let is_broken = |segment: &Arc<Segment>| found.broken.contains(&segment.id);
            let broken = self.segments.iter().filter(|segment| is_broken(segment));
            self.damaged.extend(broken.map(|segment| (segment.id, segment.stored)));
            self.segments.retain(|segment| !is_broken(segment));
        };
        let damaged = self.damaged.iter().filter(|(_, stored)| *stored < cutoff);
        let replaced: Vec<SegmentId> = damaged.map(|(id, _)| *id).collect();
        if missing.is_empty() && replaced.is_empty() {
            return Ok(());
        }
        let Blobs { store, keys, .. } = &*self.blobs;
        let mut writer = SegmentWriter::create(&**store, keys, &random::<16>()).await?;
        for some in missing.chunks(MANIFESTS_AT_ONCE) {
            control.check()?;
            for manifest in points::readable(store, keys, some).await? {
                writer.push(Summary::of(&manifest)).await?;
            }
        }
        writer.finish(&replaced).await
    }

    /// Streams what `keep` agrees to into a new segment that replaces `sources`.
    async fn merge(
        &self,
        sources: &[Arc<Segment>],
        keep: impl Fn(&PointName) -> bool,
    ) -> Result<()> {
        let Blobs { store, keys, .. } = &*self.blobs;
        let mut writer = SegmentWriter::create(&**store, keys, &random::<16>()).await?;
        let mut cursors: Vec<Cursor> = sources.iter().map(|s| Cursor::new(Arc::clone(s))).collect();
        let mut heads = BinaryHeap::new();
        for (number, cursor) in cursors.iter_mut().enumerate() {
            heads.extend(cursor.peek(&self.blobs).await?.map(|name| Reverse((name, number))));
        }
        let mut last = None;
        while let Some(Reverse((name, number))) = heads.pop() {
            let cursor = &mut cursors[number];
            let summary = cursor.ahead.pop_front().expect("it was peeked at");
            if last != Some(name) && keep(&name) {
                writer.push(summary).await?;
            }
            last = Some(name);
            heads.extend(cursor.peek(&self.blobs).await?.map(|name| Reverse((name, number))));
        }
        // Whoever opens the new segment does not open the old ones to learn what they replaced.
        let inherited = sources.iter().flat_map(|segment| segment.supersedes());
        let inherited = inherited.filter(|id| self.superseded.contains(id));
        let replaced: HashSet<SegmentId> =
            sources.iter().map(|segment| segment.id).chain(inherited).collect();
        writer.finish(&replaced.into_iter().collect::<Vec<_>>()).await
    }
}

/// Reads a segment from its first summary to its last.
struct Cursor {
    segment: Arc<Segment>,
    groups: std::vec::IntoIter<Range<usize>>,
    ahead: VecDeque<Summary>,
}

impl Cursor {
    fn new(segment: Arc<Segment>) -> Self {
        let groups = segment.all_groups().into_iter();
        Self { segment, groups, ahead: VecDeque::new() }
    }

    /// The name of the next summary, read if need be. Damage is an error: a merge loses nothing.
    async fn peek(&mut self, blobs: &Blobs) -> Result<Option<PointName>> {
        while self.ahead.is_empty() {
            let Some(group) = self.groups.next() else { return Ok(None) };
            self.ahead = read(blobs, &self.segment, group).await?.into();
        }
        Ok(self.ahead.front().map(Summary::name))
    }
}
