//! Checking a repository: is everything that the points need there, and is it what it should be?
//!
//! ```text
//!  index: every segment and block opens          ┐
//!  data (all of it, if asked for): every blob of  ├─► what is wrong with which object
//!        every pack opens, decodes, has its id    ┘
//!  points: every manifest opens; every tree node proves itself; every chunk is in the index and
//!        its pack there and long enough           ──► which ranges of which disks of which points
//! ```
//!
//! Nothing is changed unless the index is to be rebuilt ([`rebuild`]). Damage is a finding, not an
//! error: the check goes on and names everything affected. Errors are what keeps it from looking
//! (no permission, store gone, cancelled).
//!
//! Memory: some 150 bytes per pack of 64 MiB (80 MB for 50 TiB), 64 MiB of subtrees that were found
//! whole ([`trees`]), 16 MiB of blobs being read ([`data`]) and what the index itself keeps. Findings
//! beyond [`FINDINGS_MAX`] of a sort are counted only.

mod data;
mod disk;
mod rebuild;
#[cfg(test)]
mod tests;
mod trees;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde::Serialize;

use super::blobs::Blobs;
use super::condemned::PackId;
use super::index::segment::segment_name;
use super::index::{IndexEntry, Location};
use super::pack;
use super::points::{self, Domains};
use super::store::{Folder, ObjectName, for_each, from_hex};
use crate::block::ByteRange;
use crate::control::Control;
use crate::error::{Error, Kind, Result, with_causes};
use crate::vm::{PointId, Uuid};
pub use disk::BaseDamage;
use trees::Walker;

/// Findings of each sort that are listed.
pub const FINDINGS_MAX: usize = 10_000;

/// Index blocks read at once.
const BLOCKS_AT_ONCE: usize = 64;

/// How deep to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Index, manifests and trees: every chunk is where it should be, as far as sizes tell.
    Structure,
    /// Also read, open and hash every blob.
    Data,
    /// The same for part `number` (from 1) of `of` parts into which the packs fall by their ids.
    Part {
        /// Which part.
        number: u32,
        /// How many parts there are.
        of: u32,
    },
}

impl Depth {
    /// Whether the blobs of pack `id` are read.
    fn reads(self, id: &PackId) -> bool {
        match self {
            Self::Structure => false,
            Self::Data => true,
            Self::Part { number, of } => {
                let id = u32::from_be_bytes(id[..4].try_into().expect("four bytes"));
                id % of.max(1) == number.saturating_sub(1)
            }
        }
    }
}

/// What to do about an index that lost entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Report it.
    Nothing,
    /// Put back what the trailers of the packs tell.
    RebuildIndex,
}

/// How to check.
#[derive(Clone, Copy, Debug)]
pub struct CheckOptions {
    /// How deep to look.
    pub depth: Depth,
    /// What to repair first.
    pub repair: Repair,
}

/// Something that is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object's name.
    pub object: String,
    /// What is wrong with it.
    pub what: String,
}

/// Parts of a disk that do not restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AffectedDisk {
    /// The point.
    pub point: PointId,
    /// Its VM.
    pub vm: String,
    /// UUID of its VM: two may have one name.
    pub vm_uuid: Uuid,
    /// The disk, or the artefact.
    pub disk: String,
    /// The ranges, sorted and merged.
    pub ranges: Vec<AffectedRange>,
    /// Why the first of them does not.
    pub reason: String,
}

/// A range of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AffectedRange {
    /// Where it begins.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Points looked at.
    pub points: usize,
    /// Packs there are.
    pub packs: usize,
    /// Packs that no segment of the index names: left behind by backups that were given up, or being
    /// written now. Not damage.
    pub packs_unindexed: usize,
    /// Blobs that were read.
    pub blobs_read: u64,
    /// Bytes that were read for that.
    pub bytes_read: u64,
    /// Entries that the index got back: of packs that no segment listed.
    pub entries_rebuilt: u64,
    /// Objects that are damaged.
    pub damages: Vec<Damage>,
    /// Points whose manifests are damaged: nothing is known of their disks.
    pub unreadable_points: Vec<PointId>,
    /// Objects that the storage failed to read: that may pass, so nothing is recorded.
    pub unreadable: Vec<Damage>,
    /// What does not restore because of it.
    pub affected: Vec<AffectedDisk>,
    /// Findings that were not listed.
    pub unlisted: u64,
}

impl CheckReport {
    /// Whether everything is as it should be.
    pub fn is_fine(&self) -> bool {
        self.damages.is_empty()
            && self.unreadable.is_empty()
            && self.affected.is_empty()
            && self.unlisted == 0
    }

    fn fault(&mut self, object: &ObjectName, fault: Fault) {
        let list = if fault.is_passing { &mut self.unreadable } else { &mut self.damages };
        if list.len() < FINDINGS_MAX {
            list.push(Damage { object: object.to_string(), what: fault.what });
        } else {
            self.unlisted += 1;
        }
    }

    fn affected(&mut self, disk: AffectedDisk) {
        if self.affected.len() < FINDINGS_MAX {
            self.affected.push(disk);
        } else {
            self.unlisted += 1;
        }
    }
}

/// What is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fault {
    what: String,
    /// An error of the storage, which may pass, as opposed to proven damage.
    is_passing: bool,
}

impl Fault {
    fn of(error: &Error) -> Self {
        Self { what: with_causes(error), is_passing: error.kind() == Kind::Io }
    }

    fn damage(what: impl Into<String>) -> Self {
        Self { what: what.into(), is_passing: false }
    }
}

/// What the data of the packs was found to be.
#[derive(Debug, Default)]
struct Findings {
    /// Size of every pack there is.
    packs: HashMap<PackId, u64>,
    /// Blobs that were read and are not what they should be, by pack and counter.
    bad: HashSet<(PackId, u32)>,
    /// Packs of which it is not known which blobs are bad: those are read where they are needed.
    doubtful: HashSet<PackId>,
}

/// Checks the repository.
pub async fn check(
    blobs: &Arc<Blobs>,
    chunk_levels: u32,
    options: CheckOptions,
    control: &Control,
) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    blobs.damaged.load().await?;
    if options.repair == Repair::RebuildIndex {
        control.set_phase("rebuilding the index");
        rebuild::rebuild(blobs, &mut report, control).await?;
    }
    control.set_phase("checking the index");
    let needed = check_index(blobs, &mut report, control).await?;
    let mut findings = Findings::default();
    for_each(&*blobs.store, Folder::Packs.prefix(), |object| {
        if let Some(id) = from_hex::<16>(object.name.last()) {
            findings.packs.insert(id, object.size_bytes);
        }
    })
    .await?;
    // Who reads a pack sees for himself, and what is known of one is told where something misses it.
    let is_asked = |id: &PackId| !options.depth.reads(id) && !blobs.damaged.contains(id);
    for (id, needed_bytes) in needed.into_iter().filter(|(id, _)| is_asked(id)) {
        if let Some(size_bytes) = findings.packs.get(&id).filter(|size| **size < needed_bytes) {
            let what = format!("it is cut off: {size_bytes} bytes, at least {needed_bytes} needed");
            report.fault(&ObjectName::pack(&id), Fault::damage(what));
        }
    }
    report.packs = findings.packs.len();
    report.packs_unindexed = unindexed(blobs, &findings);
    let chosen = findings.packs.keys().copied().filter(|id| options.depth.reads(id));
    let chosen: Vec<PackId> = chosen.collect();
    if !chosen.is_empty() {
        control.set_phase("reading the data");
        let reading = data::Reading { blobs, chunk_levels, control };
        reading.check(chosen, &mut findings, &mut report).await?;
    }
    let recorded = blobs.damaged.packs().into_iter().filter(|id| !options.depth.reads(id));
    findings.doubtful.extend(recorded);
    control.set_phase("checking the points");
    check_points(blobs, chunk_levels, (&findings, options.repair), &mut report, control).await?;
    Ok(report)
}

/// How many packs no segment names.
fn unindexed(blobs: &Blobs, findings: &Findings) -> usize {
    let segments = blobs.index.segments();
    let named: HashSet<PackId> =
        segments.iter().flat_map(|s| s.packs().iter().map(|pack| pack.id)).collect();
    findings.packs.keys().filter(|id| !named.contains(*id)).count()
}

/// Whether an error is a finding about the object, as opposed to something that keeps us from
/// looking. An error of the storage is one ([`Fault::is_passing`]): other objects are looked at.
fn is_finding(error: &Error) -> bool {
    matches!(error.kind(), Kind::Corrupt | Kind::Io | Kind::NotFound)
}

/// Reads all of the index; the least size that each pack has by what it says.
async fn check_index(
    blobs: &Arc<Blobs>,
    report: &mut CheckReport,
    control: &Control,
) -> Result<HashMap<PackId, u64>> {
    let mut needed: HashMap<PackId, u64> = HashMap::new();
    blobs.index.refresh().await?;
    for damaged in blobs.index.damaged() {
        let fault = Fault { what: damaged.what, is_passing: damaged.is_passing };
        report.fault(&segment_name(&damaged.id), fault);
    }
    for segment in blobs.index.segments().iter() {
        let mut take = |entry: &IndexEntry| {
            let Location { pack, counter, offset, stored_bytes, .. } = &entry.location;
            let end = u64::from(*offset) + u64::from(*stored_bytes);
            let least = needed.entry(pack.id).or_default();
            *least = (*least).max(pack::whole_bytes_min(*counter, end));
        };
        if let Err(error) = read_segment(blobs, segment, control, &mut take).await {
            report.fault(&segment_name(&segment.id), Fault::of(&error));
        }
    }
    Ok(needed)
}

/// Reads all of a segment; fails with what is wrong with it.
async fn read_segment(
    blobs: &Blobs,
    segment: &super::index::Segment,
    control: &Control,
    take: &mut (dyn FnMut(&IndexEntry) + Send),
) -> Result<()> {
    let mut from = 0;
    while from < segment.blocks() {
        control.check()?;
        let end = (from + BLOCKS_AT_ONCE).min(segment.blocks());
        match segment.read_blocks(&*blobs.store, from..end).await {
            Ok(entries) if entries.is_sorted_by_key(|entry| entry.id) => {
                entries.iter().for_each(&mut *take);
            }
            Ok(_) => return Err(Error::new(Kind::Corrupt, "its entries are not sorted")),
            // Merged away meanwhile.
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        from = end;
    }
    Ok(())
}

async fn check_points(
    blobs: &Arc<Blobs>,
    chunk_levels: u32,
    (findings, repair): (&Findings, Repair),
    report: &mut CheckReport,
    control: &Control,
) -> Result<()> {
    let names = points::names(&*blobs.store, Domains::All).await?;
    let mut walker = Walker::new(blobs, chunk_levels, findings, control);
    for name in names {
        control.check()?;
        report.points += 1;
        let manifest = match points::manifest(&*blobs.store, &blobs.keys, &name).await {
            Ok(manifest) => manifest,
            // Forgotten and collected since the names were listed.
            Err(error) if error.kind() == Kind::NotFound => {
                report.points -= 1;
                continue;
            }
            Err(error) if is_finding(&error) => {
                report.unreadable_points.push(name.point);
                report.fault(&name.object(), Fault::of(&error));
                continue;
            }
            Err(error) => return Err(error),
        };
        let disks = manifest.body.disks.iter().map(|d| (d.description.name.clone(), &d.stored));
        let artifacts = manifest.body.artifacts.iter().map(|a| (a.kind.to_string(), &a.stored));
        for (disk, stored) in disks.chain(artifacts) {
            let Some((ranges, reason)) = walker.bad_ranges(stored).await? else {
                continue;
            };
            let ranges = ranges.iter().map(AffectedRange::from).collect();
            let point = manifest.point;
            let (vm, vm_uuid) = (manifest.body.vm.name.clone(), manifest.body.vm.uuid);
            report.affected(AffectedDisk { point, vm, vm_uuid, disk, ranges, reason });
        }
    }
    let told: HashSet<String> = [&report.damages, &report.unreadable]
        .into_iter()
        .flat_map(|list| list.iter().map(|damage| damage.object.clone()))
        .collect();
    if let Some(what) = walker.unlisted(repair) {
        report.damages.push(Damage { object: "index".to_owned(), what });
    }
    for (object, fault) in walker.into_faults() {
        if !told.contains(object.as_str()) {
            report.fault(&object, fault);
        }
    }
    Ok(())
}

impl From<&ByteRange> for AffectedRange {
    fn from(range: &ByteRange) -> Self {
        Self { offset: range.offset(), bytes: range.len() }
    }
}
