//! The points of a repository: listing, finding, storing their manifests.
//!
//! A manifest's name says domain, sequence and point, so that order and ids are known from a
//! listing alone; tombstones hide forgotten points. Manifests are read several at a time.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tokio::task::JoinSet;

use super::blobs::Blobs;
use super::catalog::{self, Summary};
use super::manifest::{Manifest, ManifestDraft};
use super::seal::{Keys, ObjectType};
use super::store::{Folder, ObjectName, ObjectStore, ReadRange, for_each_name};
use crate::error::{Error, Kind, Result, with_causes};
use crate::vm::{PointId, Uuid};

/// Largest manifest: thousands of disks.
const MANIFEST_BYTES_MAX: u64 = 16 << 20;

/// Manifests read at once.
const READS_IN_FLIGHT: usize = 16;

/// A point as its name tells it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct PointName {
    /// The domain.
    pub domain: Uuid,
    /// Its place among the points of the domain.
    pub sequence: u64,
    /// Its id.
    pub point: PointId,
}

impl PointName {
    /// The object that holds its manifest.
    pub fn object(&self) -> ObjectName {
        ObjectName::point(self.domain, self.sequence, self.point)
    }

    /// What the name of a manifest says; `None` when it is not one.
    pub fn parse(name: &ObjectName) -> Option<Self> {
        let rest = name.as_str().strip_prefix(Folder::Points.prefix())?;
        let (domain, rest) = rest.split_once('/')?;
        let (sequence, point) = rest.split_once('-')?;
        Some(Self {
            domain: domain.parse().ok()?,
            sequence: u64::from_str_radix(sequence, 16).ok().filter(|_| sequence.len() == 16)?,
            point: point.parse().ok()?,
        })
    }
}

/// Whose points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domains<'a> {
    /// Everybody's.
    All,
    /// Those of these domains.
    Of(&'a [Uuid]),
}

/// The names of the points that are not forgotten, by domain and sequence.
pub async fn names(store: &dyn ObjectStore, domains: Domains<'_>) -> Result<Vec<PointName>> {
    let mut forgotten = HashSet::new();
    for_each_name(store, Folder::Tombstones.prefix(), |name| {
        forgotten.extend(name.last().parse::<PointId>().ok());
    })
    .await?;
    let prefixes: Vec<String> = match domains {
        Domains::All => vec![Folder::Points.prefix().to_owned()],
        Domains::Of(domains) => domains.iter().map(|d| ObjectName::points_of(*d)).collect(),
    };
    let mut names = Vec::new();
    for prefix in prefixes {
        for_each_name(store, &prefix, |name| names.extend(PointName::parse(&name))).await?;
    }
    names.retain(|name| !forgotten.contains(&name.point));
    names.sort_unstable();
    Ok(names)
}

/// Reads one manifest.
pub async fn manifest(store: &dyn ObjectStore, keys: &Keys, name: &PointName) -> Result<Manifest> {
    let object = name.object();
    let bytes = store.read(&object, ReadRange::Whole { bytes_max: MANIFEST_BYTES_MAX }).await?;
    let bytes = keys.open_object(ObjectType::Point, &object, bytes)?;
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| {
        Error::new(Kind::Corrupt, format!("manifest {object} is malformed"))
            .hint("it may be of a newer version of this program")
            .source(error)
    })?;
    let is_its_own = manifest.point == name.point
        && manifest.sequence == name.sequence
        && manifest.body.vm.uuid == name.domain;
    if !is_its_own {
        return Err(Error::new(Kind::Corrupt, format!("manifest {object} is of another point")));
    }
    Ok(manifest)
}

/// Reads many manifests, in the order of `names`. One that was collected meanwhile is left out; one
/// that is damaged is an error: whoever decides what may be deleted must know every point.
pub async fn manifests(
    store: &Arc<dyn ObjectStore>,
    keys: &Arc<Keys>,
    names: &[PointName],
) -> Result<Vec<Manifest>> {
    read_many(store, keys, names, Damage::Fails).await
}

/// Like [`manifests`], for showing and choosing: a damaged one is left out with a warning, the
/// other points still list and restore.
pub async fn readable(
    store: &Arc<dyn ObjectStore>,
    keys: &Arc<Keys>,
    names: &[PointName],
) -> Result<Vec<Manifest>> {
    read_many(store, keys, names, Damage::LeavesOut).await
}

/// What a damaged manifest means to the reader of many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    Fails,
    LeavesOut,
}

async fn read_many(
    store: &Arc<dyn ObjectStore>,
    keys: &Arc<Keys>,
    names: &[PointName],
    damage: Damage,
) -> Result<Vec<Manifest>> {
    let mut read = BTreeMap::new();
    let mut tasks = JoinSet::new();
    let mut take = |done: Option<Result<(usize, Result<Manifest>), tokio::task::JoinError>>| {
        match done {
            None => return Ok(false),
            Some(Ok((at, Ok(manifest)))) => drop(read.insert(at, manifest)),
            Some(Ok((_, Err(error)))) if error.kind() == Kind::NotFound => {}
            Some(Ok((at, Err(error))))
                if damage == Damage::LeavesOut && error.kind() == Kind::Corrupt =>
            {
                let point = names[at].point;
                let reason = with_causes(&error);
                tracing::warn!(%point, reason, "left out: the manifest of a point is damaged");
            }
            Some(Ok((_, Err(error)))) => return Err(error),
            Some(Err(error)) => {
                return Err(Error::new(Kind::Internal, "reading a manifest died").source(error));
            }
        }
        Ok(true)
    };
    for (at, name) in names.iter().copied().enumerate() {
        if tasks.len() >= READS_IN_FLIGHT {
            take(tasks.join_next().await)?;
        }
        let (store, keys) = (Arc::clone(store), Arc::clone(keys));
        tasks.spawn(async move { (at, manifest(&*store, &keys, &name).await) });
    }
    while take(tasks.join_next().await)? {}
    Ok(read.into_values().collect())
}

/// A manifest behind the newest point of its domain, and the object it is: to be stored, which is the commit
/// point of a run. The catalog has it by then.
///
/// Two runs of one domain that commit at the same moment may take the same number; their order is
/// then that of their ids, the same for every reader.
pub async fn prepare_manifest(
    blobs: &Blobs,
    point: PointId,
    draft: ManifestDraft,
) -> Result<(Manifest, ObjectName, Vec<u8>)> {
    let domain = draft.vm.uuid;
    // Forgotten points count too: a number is not used again while its manifest is there.
    let mut last = 0;
    for_each_name(&*blobs.store, &ObjectName::points_of(domain), |name| {
        last = PointName::parse(&name).map_or(last, |name| last.max(name.sequence));
    })
    .await?;
    // A name nobody of ours made may say anything.
    let manifest = Manifest { point, sequence: last.saturating_add(1), body: draft };
    // Before the manifest: so whatever point there is, the catalog knows its VM's names.
    catalog::add(blobs, &Summary::of(&manifest)).await?;
    let name = PointName { domain, sequence: manifest.sequence, point }.object();
    let json = serde_json::to_vec(&manifest)
        .map_err(|e| Error::new(Kind::Internal, "a manifest cannot be written").source(e))?;
    let object = blobs.keys.seal_object(ObjectType::Point, &name, &json);
    Ok((manifest, name, object))
}
