//! Damage of every sort is found, and named as what it affects.

use std::sync::Arc;

use super::*;
use crate::block::{BlockSink, Buffer};
use crate::clock::{SystemClock, Timestamp};
use crate::content::LEAF_BYTES;
use crate::repo::config::ChunkSize;
use crate::repo::gc::tests::draft;
use crate::repo::keys::{Credentials, InitOptions, Kdf};
use crate::repo::store::memory::MemoryStore;
use crate::repo::store::{ObjectStore, ReadRange};
use crate::repo::{Repository, StoredDisk};
use crate::workers::Workers;

const STRUCTURE: CheckOptions = CheckOptions { depth: Depth::Structure, repair: Repair::Nothing };
const DATA: CheckOptions = CheckOptions { depth: Depth::Data, repair: Repair::Nothing };
const REBUILD: CheckOptions = CheckOptions { depth: Depth::Data, repair: Repair::RebuildIndex };

/// A repository with two points: the second shares the first half of the disk with the first.
async fn bed() -> (Arc<MemoryStore>, Vec<StoredDisk>) {
    let store = Arc::new(MemoryStore::new(Arc::new(SystemClock)));
    let options =
        InitOptions { chunk: ChunkSize::DEFAULT, kdf: Kdf::FOR_TESTS, now: Timestamp::UNIX_EPOCH };
    let as_store = Arc::clone(&store) as Arc<dyn ObjectStore>;
    let workers = Workers::new(2).unwrap();
    let repository =
        Repository::init(as_store, &Credentials::None, options, workers).await.unwrap();
    let mut disks = Vec::new();
    for (n, contents) in [(1, [1, 2, 3, 4]), (2, [1, 2, 5, 6])] {
        let run = repository.begin_run().await.unwrap();
        let writer = run.disk_writer(4 * LEAF_BYTES, None);
        for (at, content) in (0..).zip(contents) {
            let bytes = vec![content; usize::try_from(LEAF_BYTES).unwrap()];
            writer.write(at * LEAF_BYTES, Buffer::unbudgeted(bytes)).await.unwrap();
        }
        let stored = writer.finish().await.unwrap().0;
        run.commit(PointId([n; 16]), draft(&stored, None)).await.unwrap();
        disks.push(stored);
    }
    (store, disks)
}

async fn check(store: &Arc<MemoryStore>, options: CheckOptions) -> CheckReport {
    let store = Arc::clone(store) as Arc<dyn ObjectStore>;
    let workers = Workers::new(2).unwrap();
    let repository = Repository::open(store, &Credentials::None, workers).await.unwrap();
    repository.check(options, &Control::new()).await.unwrap()
}

fn names(store: &MemoryStore, folder: Folder) -> Vec<ObjectName> {
    let all = store.names().into_iter();
    all.filter(|name| name.as_str().starts_with(folder.prefix())).collect()
}

async fn bytes(store: &MemoryStore, name: &ObjectName) -> Vec<u8> {
    store.read(name, ReadRange::Whole { bytes_max: 1 << 30 }).await.unwrap()
}

/// The pack of chunks (or of nodes) that was stored first.
async fn first_pack(store: &MemoryStore, type_byte: u8) -> ObjectName {
    let mut found = Vec::new();
    for name in names(store, Folder::Packs) {
        if bytes(store, &name).await[6] == type_byte {
            found.push((store.stat(&name).await.unwrap().stored, name));
        }
    }
    found.into_iter().min().unwrap().1
}

fn points(report: &CheckReport) -> Vec<u8> {
    report.affected.iter().map(|disk| disk.point.0[0]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_repository_is_fine_at_every_depth() {
    let (store, _) = bed().await;
    for options in [STRUCTURE, DATA, REBUILD] {
        let report = check(&store, options).await;
        assert!(report.is_fine(), "{report:?}");
        assert_eq!((report.points, report.entries_rebuilt), (2, 0));
    }
    assert_eq!(check(&store, DATA).await.blobs_read, 6 + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_by_reading_and_its_ranges_are_named() {
    let (store, _) = bed().await;
    let name = first_pack(&store, 2).await;
    let mut damaged = bytes(&store, &name).await;
    // Within blob 0, the first chunk stored: shared by both points.
    damaged[60] ^= 1;
    store.overwrite(&name, damaged);
    assert!(check(&store, STRUCTURE).await.is_fine());
    let report = check(&store, DATA).await;
    assert_eq!(report.damages.len(), 1, "{report:?}");
    assert_eq!(points(&report), [1, 2]);
    for disk in &report.affected {
        assert_eq!((disk.vm.as_str(), disk.disk.as_str()), ("foo", "vda"));
        assert_eq!(disk.ranges.len(), 1);
        assert_eq!(disk.ranges[0].bytes, LEAF_BYTES);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_pack_is_found_by_structure_alone() {
    let (store, _) = bed().await;
    store.delete(&first_pack(&store, 2).await).await.unwrap();
    let report = check(&store, STRUCTURE).await;
    assert_eq!(points(&report), [1, 2]);
    let range = |offset, bytes| AffectedRange { offset, bytes };
    assert_eq!(report.affected[0].ranges, [range(0, 4 * LEAF_BYTES)]);
    assert_eq!(report.affected[1].ranges, [range(0, 2 * LEAF_BYTES)]);
    assert!(report.affected[0].reason.contains("missing"), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_off_pack_is_found_by_structure_alone() {
    let (store, _) = bed().await;
    let name = first_pack(&store, 2).await;
    let half = bytes(&store, &name).await[..100].to_vec();
    store.overwrite(&name, half);
    assert_eq!(points(&check(&store, STRUCTURE).await), [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_tree_node_affects_all_below_it() {
    let (store, _) = bed().await;
    let name = first_pack(&store, 3).await;
    let mut damaged = bytes(&store, &name).await;
    damaged[50] ^= 1;
    store.overwrite(&name, damaged);
    let report = check(&store, STRUCTURE).await;
    assert_eq!(points(&report), [1]);
    assert_eq!(report.affected[0].ranges[0].bytes, 4 * LEAF_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_manifest_is_named_and_the_others_are_checked() {
    let (store, _) = bed().await;
    let name = names(&store, Folder::Points).remove(0);
    store.overwrite(&name, vec![0; 200]);
    let report = check(&store, STRUCTURE).await;
    assert_eq!((report.damages.len(), report.points), (1, 2));
    assert_eq!(report.damages[0].object, name.as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_or_damaged_index_is_rebuilt_from_the_packs() {
    for damage in 0..3 {
        let (store, disks) = bed().await;
        for name in names(&store, Folder::Index) {
            let mut whole = bytes(&store, &name).await;
            match damage {
                0 => store.delete(&name).await.unwrap(),
                1 => store.overwrite(&name, vec![1; 300]),
                // Within a block: the directory still opens.
                _ => {
                    whole[70] ^= 1;
                    store.overwrite(&name, whole);
                }
            }
        }
        assert!(!check(&store, STRUCTURE).await.is_fine(), "damage {damage}");
        let report = check(&store, REBUILD).await;
        assert!(report.is_fine() && report.entries_rebuilt == 8, "damage {damage}: {report:?}");
        assert!(check(&store, DATA).await.is_fine(), "damage {damage}");
        let as_store = Arc::clone(&store) as Arc<dyn ObjectStore>;
        let workers = Workers::new(2).unwrap();
        let repository = Repository::open(as_store, &Credentials::None, workers).await.unwrap();
        let read = repository.read_bytes(&disks[1]).await.unwrap();
        assert_eq!((read[0], read[read.len() - 1]), (1, 6), "damage {damage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_a_pack_without_a_trailer_are_read_one_by_one() {
    let (store, _) = bed().await;
    let name = first_pack(&store, 2).await;
    let mut damaged = bytes(&store, &name).await;
    let end = damaged.len();
    damaged[end - 1] ^= 1;
    store.overwrite(&name, damaged);
    let report = check(&store, DATA).await;
    assert_eq!(report.damages.len(), 1, "{report:?}");
    assert!(report.affected.is_empty(), "every chunk is still there: {report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_parts_of_the_data_make_a_whole() {
    let (store, _) = bed().await;
    let mut blobs = 0;
    for number in 1..=3 {
        let depth = Depth::Part { number, of: 3 };
        let report = check(&store, CheckOptions { depth, repair: Repair::Nothing }).await;
        assert!(report.is_fine(), "{report:?}");
        blobs += report.blobs_read;
    }
    assert_eq!(blobs, 6 + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_deletes_nothing_and_leaves_damaged_segments_to_the_collector() {
    let (store, _) = bed().await;
    let before = store.names();
    for name in names(&store, Folder::Index) {
        store.overwrite(&name, vec![1; 300]);
    }
    assert!(check(&store, REBUILD).await.is_fine());
    let after = store.names();
    let kept = |name: &&ObjectName| !name.as_str().starts_with(Folder::Runs.prefix());
    assert!(before.iter().filter(kept).all(|name| after.contains(name)), "{before:?} {after:?}");
    let again = check(&store, REBUILD).await;
    assert_eq!(again.entries_rebuilt, 0, "{again:?}");
    let as_store = Arc::clone(&store) as Arc<dyn ObjectStore>;
    let workers = Workers::new(2).unwrap();
    let repository = Repository::open(as_store, &Credentials::None, workers).await.unwrap();
    repository.collect(crate::repo::CollectOptions::default(), &Control::new()).await.unwrap();
    assert_eq!(names(&store, Folder::Index).len(), 1, "the damaged ones are gone");
    assert!(check(&store, DATA).await.is_fine());
}

/// Whether all of a disk reads, told by the reader alone.
async fn restores(store: &Arc<MemoryStore>, stored: &StoredDisk) -> bool {
    let store = Arc::clone(store) as Arc<dyn ObjectStore>;
    let workers = Workers::new(1).unwrap();
    let repository = Repository::open(store, &Credentials::None, workers).await.unwrap();
    repository.read_bytes(stored).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_object_is_damaged_check_names_exactly_the_points_that_do_not_restore() {
    let (pristine, _) = bed().await;
    let objects = pristine.names().len();
    for number in 0..objects * 3 {
        let (store, disks) = bed().await;
        let name = store.names().swap_remove(number / 3);
        let damageable = ["packs/", "index/"].iter().any(|f| name.as_str().starts_with(f));
        if !damageable {
            continue;
        }
        let mut whole = bytes(&store, &name).await;
        let middle = whole.len() / 2;
        match number % 3 {
            0 => store.delete(&name).await.unwrap(),
            1 => whole.truncate(middle),
            _ => whole[middle] ^= 1,
        }
        if number % 3 > 0 {
            store.overwrite(&name, whole);
        }
        let report = check(&store, DATA).await;
        for (point, disk) in (1..).zip(&disks) {
            let named = points(&report).contains(&point);
            let whole = restores(&store, disk).await;
            assert_eq!(named, !whole, "damage {number} of {name}, point {point}: {report:?}");
        }
    }
}
