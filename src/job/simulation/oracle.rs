//! What points must hold, and what must be true of the world in the end.

use std::path::Path;

use super::steps::request;
use super::world::{DEPOTS, Fate, World};
use crate::block::{BlockSource, Buffer};
use crate::error::Result;
use crate::platform::simulated::guest::{Instant, Pace};
use crate::platform::simulated::image::Content;
use crate::platform::{BackupMode, Quiesce};
use crate::repo::{Manifest, Repository};

/// Bytes compared at once.
const PIECE_BYTES: u64 = 1 << 20;

impl World<'_> {
    /// Whether nothing of any run is left on the VM, but for bitmaps.
    pub(super) fn is_clean(&self) -> bool {
        let guest = self.guest.lock();
        let open = &guest.open;
        let none = open.jobs.is_empty() && open.exports.is_empty() && open.scratch.is_empty();
        let runs = !guest.is_frozen(self.time.now_ms()) && guest.pace != Pace::PausedByUs;
        none && open.server.is_none() && runs
    }

    /// The next backups find and undo what is left, and succeed; all points restore.
    pub(super) fn end(&mut self) {
        for depot in 0..DEPOTS {
            self.recover_from(depot, vec![]);
            self.look(depot);
        }
        self.assert_only_bitmaps_of_points();
        for depot in 0..DEPOTS {
            if self.depots[depot].points.is_empty() {
                continue;
            }
            self.look(depot);
            if self.depots[depot].is_damaged {
                // Before anything is healed.
                self.read_all(depot);
            }
            let made = self.back_up_to(depot, &request(BackupMode::Auto, Quiesce::Auto), vec![]);
            assert!(made.is_some() || self.depots[depot].is_damaged, "the last backup failed");
            assert!(self.is_clean(), "{:?}", self.guest.lock());
            if let Some(made) = made {
                self.assert_only_bitmaps_of(depot, made);
            }
            self.read_all(depot);
        }
    }

    /// A bitmap is kept if and only if its point exists.
    fn assert_only_bitmaps_of_points(&self) {
        let guest = self.guest.lock();
        let names = guest.disks.iter().flat_map(|disk| disk.image.bitmaps.keys());
        for name in names {
            let depot = self.depots.iter().find(|depot| depot.id == name.repository);
            let depot = depot.expect("one of these");
            let is_there = depot.points.get(&name.point) == Some(&Fate::There);
            assert!(is_there || depot.is_damaged, "a bitmap of no point: {name:?}");
        }
    }

    fn assert_only_bitmaps_of(&self, depot: usize, point: crate::vm::PointId) {
        let Self { depots, guest, .. } = self;
        assert_eq!(depots[depot].points[&point], Fate::There);
        let guest = guest.lock();
        for disk in &guest.disks {
            let ours = disk.image.bitmaps.keys().filter(|name| name.repository == depots[depot].id);
            let points: Vec<_> = ours.map(|name| name.point).collect();
            assert_eq!(points, [point], "bitmaps of {}", disk.name);
        }
    }
}

/// The disks of a point are those of the instant, byte for byte. An error if one cannot be read;
/// panics if something else is read.
pub(super) async fn assert_holds(
    repository: &Repository,
    manifest: &Manifest,
    instant: &Instant,
) -> Result<()> {
    let names = manifest.body.disks.iter().map(|disk| &disk.description.name);
    let expected: Vec<_> = instant.disks.iter().map(|(name, _)| name).collect();
    assert_eq!(names.collect::<Vec<_>>(), expected, "disks of {}", manifest.point);
    let mut unread = Ok(());
    for (disk, (name, content)) in manifest.body.disks.iter().zip(&instant.disks) {
        assert_eq!(disk.stored.size_bytes, content.size_bytes(), "size of {name}");
        let reader = match repository.open_disk(&disk.stored).await {
            Ok(reader) => reader,
            Err(error) => {
                unread = Err(error);
                continue;
            }
        };
        for piece in reader.geometry().range().pieces(PIECE_BYTES) {
            let len = usize::try_from(piece.len()).unwrap();
            let mut expected = vec![0; len];
            content.read(piece.offset(), &mut expected);
            match reader.read(piece.offset(), Buffer::unbudgeted(vec![0xee; len])).await {
                Ok(read) => assert!(
                    read[..] == expected[..],
                    "{name} of {} differs in {piece}",
                    manifest.point
                ),
                Err(error) => unread = Err(error),
            }
        }
    }
    unread
}

/// A restored file is the disk at the instant.
pub(super) fn assert_file_holds(path: &Path, content: &Content) {
    let read = std::fs::read(path).unwrap();
    assert_eq!(read.len() as u64, content.size_bytes(), "{}", path.display());
    let mut expected = vec![0; read.len()];
    content.read(0, &mut expected);
    assert!(read == expected, "{} differs", path.display());
}
