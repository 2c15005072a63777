//! The points of a repository, from its catalog alone: no manifest is read. They come a page at a
//! time, so that a list of a million points takes little memory.

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::{Repository, points};
use crate::clock::Timestamp;
use crate::error::Result;
use crate::repo::{PointsOf, Summary, SummaryPages};
use crate::vm::{FullReason, PointId, Quiescence, Uuid, VmIdentity};

/// Points by VM, each VM's oldest first.
pub struct List {
    pages: SummaryPages,
    /// Of this VM alone.
    vm: Option<Uuid>,
}

impl List {
    /// The next points; none after the last. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Vec<Line>>> {
        let Some(page) = self.pages.next().await? else { return Ok(None) };
        let wanted = |point: &Summary| self.vm.is_none_or(|vm| vm == point.vm.uuid);
        Ok(Some(page.into_iter().filter(wanted).map(Line::from).collect()))
    }

    /// Begins with the first points again: the same ones, but for those that are gone meanwhile.
    pub fn rewind(&mut self) {
        self.pages.rewind();
    }
}

/// A point in a list.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Its id.
    pub id: PointId,
    /// Its VM.
    #[serde(serialize_with = "shared")]
    pub vm: Arc<VmIdentity>,
    /// The instant.
    pub time: Timestamp,
    /// How its disks were read.
    pub kind: PointKind,
    /// What was achieved around the instant.
    pub quiescence: Quiescence,
    /// Why disks were read in full, each reason once.
    pub reasons: Vec<FullReason>,
    /// How many disks it holds.
    pub disks: usize,
    /// Their virtual sizes.
    pub size_bytes: u64,
    /// Bytes read from the VM.
    pub read_bytes: u64,
    /// Bytes it added to the repository.
    pub stored_bytes: u64,
}

/// How the disks of a point were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PointKind {
    /// All in full.
    Full,
    /// All incrementally.
    Incremental,
    /// Some in full; `show` has the reasons.
    Mixed,
}

impl PointKind {
    /// The kind of a point with so many disks, of which so many were read incrementally.
    pub fn of(disks: usize, incremental: usize) -> Self {
        match incremental {
            0 => Self::Full,
            n if n == disks => Self::Incremental,
            _ => Self::Mixed,
        }
    }
}

impl fmt::Display for PointKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Mixed => "mixed",
        })
    }
}

impl From<Summary> for Line {
    fn from(point: Summary) -> Self {
        Self {
            id: point.point,
            vm: point.vm,
            time: point.taken,
            kind: PointKind::of(point.disks, point.incremental),
            quiescence: point.quiescence,
            reasons: point.reasons,
            disks: point.disks,
            size_bytes: point.size_bytes,
            read_bytes: point.read_bytes,
            stored_bytes: point.stored_bytes,
        }
    }
}

/// Lists the points, of one VM (by name or UUID) if it is named.
pub async fn run(repository: &Repository, vm: Option<&str>) -> Result<List> {
    let Some(name) = vm else {
        return Ok(List { pages: repository.summary_pages(PointsOf::All).await?, vm: None });
    };
    let vm = Some(points::vm(repository, name).await?);
    Ok(List { pages: repository.summary_pages(PointsOf::Called(name)).await?, vm })
}

/// Points share what they say of their VM.
fn shared<S: Serializer>(vm: &Arc<VmIdentity>, serializer: S) -> Result<S::Ok, S::Error> {
    vm.serialize(serializer)
}
