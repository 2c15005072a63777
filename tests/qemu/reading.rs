//! Reading a snapshot the way a repository does: a full disk replaces what is held, an incremental
//! one is applied to what the base point holds.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use vmbackup::block::{BlockSource, Buffer, ByteRange, ExtentKind};
use vmbackup::control::Control;
use vmbackup::error::Result;
use vmbackup::platform::qemu::Qemu;
use vmbackup::platform::{BackupMode, KnownPoint, Platform, Quiesce, SnapshotRequest, VmSnapshot};
use vmbackup::vm::{DiskDescription, DiskLayer, PointId, ReadMode};

use crate::machine::Machine;

/// The points taken so far, and what each of their disks held: a repository in memory.
#[derive(Default)]
pub(crate) struct Points {
    held: HashMap<PointId, Vec<(String, Vec<u8>)>>,
    newest_first: Vec<PointId>,
}

/// What was read for a disk.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) mode: ReadMode,
    pub(crate) content: Vec<u8>,
    /// Bytes whose content travelled.
    pub(crate) data_bytes: u64,
}

impl Points {
    pub(crate) fn request(&self, machine: &Machine, point: PointId) -> SnapshotRequest {
        let known = self.newest_first.iter().map(|id| KnownPoint {
            id: *id,
            disks: self.held[id].iter().map(|(name, content)| disk(name, content)).collect(),
            checkpoint_xml: None,
        });
        request(&machine.path("scratch"), point, known.collect())
    }

    /// Takes, reads, checks and commits a snapshot; `meanwhile` runs once it is open.
    pub(crate) async fn back_up(
        &mut self,
        machine: &mut Machine,
        mode: BackupMode,
        meanwhile: &[(&str, &str)],
    ) -> (PointId, Vec<Read>) {
        let point = machine.next_point();
        let request = SnapshotRequest { mode, ..self.request(machine, point) };
        (point, self.back_up_as(machine, &request, meanwhile).await)
    }

    /// The same as asked for.
    pub(crate) async fn back_up_as(
        &mut self,
        machine: &mut Machine,
        request: &SnapshotRequest,
        meanwhile: &[(&str, &str)],
    ) -> Vec<Read> {
        let point = request.point;
        let platform = machine.platform().await;
        let mut snapshot = platform.open_snapshot(request, &Control::new()).await.unwrap();
        for (disk, what) in meanwhile {
            machine.guest(disk, what).await;
        }
        let reads = self.read_all(snapshot.as_mut()).await.unwrap();
        snapshot.still_valid().await.unwrap();
        let named = snapshot.disks().iter().zip(&reads);
        let held = named.map(|(d, read)| (d.description.name.clone(), read.content.clone()));
        self.held.insert(point, held.collect());
        self.newest_first.insert(0, point);
        snapshot.commit().await.unwrap();
        reads
    }

    pub(crate) async fn read_all(&self, snapshot: &mut dyn VmSnapshot) -> Result<Vec<Read>> {
        let mut reads = Vec::new();
        for index in 0..snapshot.disks().len() {
            let disk = snapshot.disks()[index].clone();
            let base = match disk.read {
                ReadMode::Full { .. } => None,
                ReadMode::Incremental { base } => {
                    let disks = &self.held[&base];
                    disks.iter().find(|(name, _)| *name == disk.description.name)
                }
            };
            let source = snapshot.source(index).await?;
            let base = base.map(|(_, content)| content.as_slice());
            let (content, data_bytes) = read(source.as_ref(), base).await?;
            reads.push(Read { mode: disk.read, content, data_bytes });
        }
        Ok(reads)
    }
}

fn disk(name: &str, content: &[u8]) -> DiskDescription {
    DiskDescription {
        name: name.to_owned(),
        size_bytes: content.len() as u64,
        format: "qcow2".to_owned(),
        origin: format!("{name}.qcow2"),
        layer: DiskLayer::Plain,
        file: None,
    }
}

pub(crate) fn request(
    scratch: &Path,
    point: PointId,
    known_points: Vec<KnownPoint>,
) -> SnapshotRequest {
    SnapshotRequest {
        mode: BackupMode::Auto,
        point,
        repository: "0123456789abcdef".into(),
        known_points,
        point_ids: HashSet::new(),
        repository_has_key: false,
        quiesce: Quiesce::Auto,
        freeze_budget: Duration::from_secs(10),
        scratch_dir: Some(scratch.to_owned()),
        exclude_disks: Vec::new(),
        insecure_tcp: false,
        guest_first: false,
        guardian: None,
        clock: std::sync::Arc::new(vmbackup::clock::SystemClock),
    }
}

/// The disk's content, with what is Unchanged taken from `base`.
async fn read(source: &dyn BlockSource, base: Option<&[u8]>) -> Result<(Vec<u8>, u64)> {
    let geometry = source.geometry();
    let mut content = vec![0xee; usize::try_from(geometry.size_bytes).unwrap()];
    let (mut at, mut data_bytes) = (0, 0);
    while at < geometry.size_bytes {
        let map = source.extents(ByteRange::new(at, geometry.size_bytes - at)).await?;
        for extent in map.iter() {
            for piece in extent.range.pieces(geometry.request_bytes_max.min(1 << 20)) {
                let start = usize::try_from(piece.offset()).unwrap();
                let len = usize::try_from(piece.len()).unwrap();
                let window = start..start + len;
                match extent.kind {
                    ExtentKind::Zero => content[window].fill(0),
                    ExtentKind::Unchanged => {
                        let base = base.expect("only a disk with a base has unchanged ranges");
                        content[window.clone()].copy_from_slice(&base[window]);
                    }
                    ExtentKind::Data => {
                        let buffer = Buffer::unbudgeted(vec![0; len]);
                        let buffer = source.read(piece.offset(), buffer).await?;
                        content[window].copy_from_slice(&buffer[..]);
                        data_bytes += piece.len();
                    }
                }
            }
            at = extent.range.end();
        }
    }
    Ok((content, data_bytes))
}

/// Opens a snapshot that is expected to open.
pub(crate) async fn open(platform: &Qemu, request: &SnapshotRequest) -> Box<dyn VmSnapshot> {
    platform.open_snapshot(request, &Control::new()).await.unwrap()
}
