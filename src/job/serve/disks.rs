//! From what was named to disks that can be served.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;

use super::{Access, Changes, ExportReport, Request, Served, no_repository};
use crate::block::layer::cache::CachedSource;
use crate::block::layer::grown::GrownSource;
use crate::block::overlay::{Overlay, Written};
use crate::block::{BlockSink, BlockSource};
use crate::error::{Error, Kind, Result};
use crate::image::{OddEnd, WritableImage};
use crate::job::source::{DiskSpec, ImageSpec, open_disk};
use crate::job::{Env, Repository, points};
use crate::nbd::server::{Export, Grown, Growth};
use crate::nbd::wire::DIRTY_BITMAP_PREFIX;
use crate::repo::{ChangedDisk, Manifest, ManifestDisk};

/// A disk to be served.
pub(super) struct Disk {
    pub(super) name: String,
    description: String,
    source: Arc<dyn BlockSource>,
    pub(super) sink: Option<Arc<dyn BlockSink>>,
    /// Where its bytes are, the topmost layer first; empty if unknown.
    layers: Vec<Arc<dyn BlockSource>>,
    changes: Vec<(Changes, Arc<dyn BlockSource>)>,
    growth: Option<Arc<dyn Growth>>,
}

impl Disk {
    fn new((name, description): (String, String), source: Arc<dyn BlockSource>) -> Self {
        let (layers, changes) = (Vec::new(), Vec::new());
        Self { name, description, source, sink: None, layers, changes, growth: None }
    }

    /// One that is written, and may grow.
    fn growing(names: (String, String), disk: Grown, growth: Arc<dyn Growth>) -> Self {
        let Grown { source, sink, layers } = disk;
        Self { sink: Some(sink), layers, growth: Some(growth), ..Self::new(names, source) }
    }

    pub(super) fn report(&self) -> ExportReport {
        ExportReport {
            name: self.name.clone(),
            description: self.description.clone(),
            uri: None,
            size_bytes: self.source.geometry().size_bytes,
            changes: self.changes.iter().map(|(changes, _)| changes.clone()).collect(),
            writable: self.sink.is_some(),
        }
    }

    pub(super) fn into_export(self) -> Export {
        let export = match self.sink {
            Some(sink) => Export::writable(self.name, self.source, sink),
            None => Export::read_only(self.name, self.source),
        };
        let export = export.described(self.description).with_layers(self.layers);
        let export = match self.growth {
            Some(growth) => export.growing(growth),
            None => export,
        };
        self.changes.into_iter().fold(export, |export, (Changes { since, .. }, map)| {
            export.with_changes(since.short(), map)
        })
    }
}

/// A disk of a point before it is opened.
struct Stored<'a> {
    name: String,
    description: String,
    disk: &'a ManifestDisk,
}

/// Opens everything that was named.
pub(super) async fn open(
    repository: Option<&Repository>,
    request: &Request,
    env: &Env,
) -> Result<Vec<Disk>> {
    let mut manifests = Vec::new();
    let mut images = Vec::new();
    for served in &request.what {
        match served {
            Served::Point(name) => {
                let repository = repository.ok_or_else(|| no_repository(name))?;
                manifests.push(points::manifest(repository, name, env).await?);
            }
            Served::Disk(spec) => images.push(spec),
        }
    }
    let stored = stored_disks(&manifests, &request.disks)?;
    let bases = bases(repository, request, env).await?;
    if let Access::Writable { size_bytes: Some(size_bytes), .. } = &request.access
        && stored.len() != 1
    {
        let message = format!("one size, {size_bytes}, for {} disks of points", stored.len());
        return Err(Error::new(Kind::Usage, message).hint("choose the disk with --disk"));
    }
    if let Access::Writable { overlay: Some(file), .. } = &request.access
        && stored.len() != 1
    {
        let message =
            format!("one overlay file, {}, for {} disks of points", file.display(), stored.len());
        return Err(Error::new(Kind::Usage, message).hint("choose the disk with --disk"));
    }
    let cache_bytes = request.cache_bytes / stored.len().max(1) as u64;
    let mut disks = Vec::new();
    for stored in stored {
        let repository = repository.ok_or_else(|| no_repository(&stored.name))?;
        let changes = changes(repository, stored.disk, &bases).await?;
        let disk = open_stored(repository, stored, &request.access, cache_bytes).await?;
        disks.push(Disk { changes, ..disk });
    }
    let told = |base: &&Manifest| {
        let since = |(changes, _): &(Changes, _)| changes.since == base.point;
        disks.iter().any(|disk| disk.changes.iter().any(since))
    };
    if let Some(base) = bases.iter().find(|base| !told(base)) {
        let message = format!("point {} has none of the disks to be served", base.point.short());
        return Err(Error::new(Kind::NotFound, message));
    }
    for spec in images {
        disks.push(open_image(spec, &request.access).await?);
    }
    Ok(disks)
}

/// The disks of the points. One point's are named as in its VM; those of several carry VM and point
/// in their names.
fn stored_disks<'a>(manifests: &'a [Manifest], names: &[String]) -> Result<Vec<Stored<'a>>> {
    let mut stored = Vec::new();
    for manifest in manifests {
        let (vm, point) = (&manifest.body.vm.name, manifest.point.short());
        for disk in points::choose_disks(manifest, names)? {
            let name = &disk.description.name;
            stored.push(Stored {
                name: if manifests.len() == 1 {
                    name.clone()
                } else {
                    format!("{vm}@{point}/{name}")
                },
                description: format!("{name} of {vm}, point {point}, {}", manifest.body.taken),
                disk,
            });
        }
    }
    Ok(stored)
}

/// The points since which changes are to be told.
async fn bases(
    repository: Option<&Repository>,
    request: &Request,
    env: &Env,
) -> Result<Vec<Manifest>> {
    let Some(first) = request.changes_since.first() else { return Ok(Vec::new()) };
    let refuse = |why: &str| {
        Err(Error::new(Kind::Usage, format!("cannot tell the changes since {first}: {why}")))
    };
    let Some(repository) = repository else { return refuse("no point is served") };
    if request.access != Access::ReadOnly {
        return refuse("the disks are writable");
    }
    let mut bases: Vec<Manifest> = Vec::new();
    for name in &request.changes_since {
        let base = points::manifest(repository, name, env).await?;
        if bases.iter().all(|other| other.point != base.point) {
            bases.push(base);
        }
    }
    Ok(bases)
}

/// What of `disk` is not as in `bases`. A base without such a disk has nothing to compare with.
async fn changes(
    repository: &Repository,
    disk: &ManifestDisk,
    bases: &[Manifest],
) -> Result<Vec<(Changes, Arc<dyn BlockSource>)>> {
    let mut changes = Vec::new();
    for base in bases {
        let named = |other: &&ManifestDisk| other.description.name == disk.description.name;
        let Some(older) = base.body.disks.iter().find(named) else { continue };
        let ours = Arc::new(repository.open_disk(&disk.stored).await?);
        let theirs = Arc::new(repository.open_disk(&older.stored).await?);
        let map: Arc<dyn BlockSource> = Arc::new(ChangedDisk::new(ours, theirs)?);
        let context = format!("{DIRTY_BITMAP_PREFIX}{}", base.point.short());
        changes.push((Changes { since: base.point, context }, map));
    }
    Ok(changes)
}

async fn open_stored(
    repository: &Repository,
    stored: Stored<'_>,
    access: &Access,
    cache_bytes: u64,
) -> Result<Disk> {
    let Stored { name, description, disk } = stored;
    let reader = Arc::new(repository.open_disk(&disk.stored).await?);
    let lowest = Arc::clone(&reader) as Arc<dyn BlockSource>;
    let source: Arc<dyn BlockSource> = Arc::new(CachedSource::new(reader, cache_bytes));
    let overlay = match access {
        Access::ReadOnly => {
            return Ok(Disk { layers: vec![lowest], ..Disk::new((name, description), source) });
        }
        Access::Writable { overlay: Some(file), size_bytes, .. } => {
            // The content root says what the disk is, whichever point or repository it comes from.
            Overlay::kept(source, *size_bytes, (file, &disk.stored.root.0))?
        }
        Access::Writable { scratch, size_bytes, .. } => {
            std::fs::create_dir_all(scratch)
                .map_err(|e| Error::io(format!("cannot make {}", scratch.display()), e))?;
            Overlay::temporary(source, *size_bytes, scratch)?
        }
    };
    let growing = GrowingOverlay { first: Arc::new(overlay), lowest };
    let disk = growing.of(Arc::clone(&growing.first));
    Ok(Disk::growing((name, description), disk, Arc::new(growing)))
}

/// An overlay that another process may wish to be larger.
struct GrowingOverlay {
    first: Arc<Overlay>,
    /// What its base is made of.
    lowest: Arc<dyn BlockSource>,
}

impl GrowingOverlay {
    fn of(&self, overlay: Arc<Overlay>) -> Grown {
        let size_bytes = BlockSource::geometry(&*overlay).size_bytes;
        let lowest = Arc::new(GrownSource::new(Arc::clone(&self.lowest), size_bytes));
        let layers = vec![Arc::new(Written::of(Arc::clone(&overlay))) as _, lowest as _];
        Grown { source: Arc::clone(&overlay) as _, sink: overlay, layers }
    }
}

#[async_trait]
impl Growth for GrowingOverlay {
    async fn grown(&self, size_bytes: u64) -> Result<Option<Grown>> {
        let now = self.first.grown(size_bytes).await?;
        Ok(now.map(|now| self.of(Arc::new(now))))
    }
}

/// A raw image that somebody may make larger.
struct GrowingImage(Arc<WritableImage>);

impl GrowingImage {
    fn of(image: Arc<WritableImage>) -> Grown {
        Grown { source: Arc::clone(&image) as _, sink: image, layers: Vec::new() }
    }
}

#[async_trait]
impl Growth for GrowingImage {
    async fn grown(&self, size_bytes: u64) -> Result<Option<Grown>> {
        let now = self.0.grown(size_bytes).await?;
        Ok(now.map(|now| Self::of(Arc::new(now))))
    }
}

async fn open_image(spec: &DiskSpec, access: &Access) -> Result<Disk> {
    let description = spec.to_string();
    let name = match spec {
        DiskSpec::Image(image) => file_name(&image.path),
        DiskSpec::Nbd(uri) => uri.export.clone(),
    };
    if *access == Access::ReadOnly {
        // As writable: an NBD export has any size. One of another server is not opened again when it is
        // lost: what is behind it by then may be another disk, and whoever reads would have half of each.
        let source = open_disk(spec, OddEnd::Kept).await?.source;
        return Ok(Disk::new((name, description), source));
    }
    let DiskSpec::Image(ImageSpec { path, format }) = spec else {
        let message = format!("cannot serve {spec} writable: it is served by another already");
        return Err(Error::new(Kind::Unsupported, message).hint("connect to it directly"));
    };
    if format != "raw" {
        let message = format!("cannot serve {spec} writable: its format is {format}");
        return Err(Error::new(Kind::Unsupported, message)
            .hint("only raw images are written in place; use qemu-nbd for others"));
    }
    let image = Arc::new(WritableImage::open(path)?);
    let growing = Arc::new(GrowingImage(Arc::clone(&image)));
    Ok(Disk::growing((name, description), GrowingImage::of(image), growing))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
