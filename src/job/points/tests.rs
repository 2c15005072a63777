//! What a backup may build on, and what it must not take for a leftover.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::repo::config::ChunkSize;
use crate::repo::keys::{Credentials, InitOptions, Kdf};
use crate::repo::store::ObjectStore;
use crate::repo::store::memory::MemoryStore;
use crate::vm::{DiskDescription, FullReason};
use crate::workers::Workers;

const VM: Uuid = Uuid::from_u128(7);

fn point(n: u8) -> PointId {
    PointId([n; 16])
}

/// As versions before the file of an image was recorded wrote it.
fn description() -> DiskDescription {
    serde_json::from_value(json!({
        "name": "vda", "size_bytes": 4096, "format": "qcow2", "origin": "/i/a", "layer": "plain",
    }))
    .unwrap()
}

fn draft(stored: &StoredDisk) -> ManifestDraft {
    serde_json::from_value(json!({
        "vm": {"uuid": VM, "name": "foo", "host": "h", "platform": "libvirt"},
        "taken": "2026-11-21T00:00:00Z", "finished": "2026-11-21T00:00:01Z",
        "quiescence": {"level": "stopped"}, "excluded": [], "not_captured": [], "artifacts": [],
        "program": "test",
        "disks": [{"description": description(), "stored": stored, "read_bytes": 0,
            "read": {"mode": "full", "reason": "requested"}, "stats": WriteStats::default()}],
    }))
    .unwrap()
}

async fn repository(store: &Arc<MemoryStore>) -> Repository {
    let options = InitOptions {
        chunk: ChunkSize::new(256 << 10).unwrap(),
        kdf: Kdf::FOR_TESTS,
        now: crate::clock::Timestamp::UNIX_EPOCH,
    };
    let store = Arc::clone(store) as Arc<dyn ObjectStore>;
    Repository::init(store, &Credentials::None, options, Workers::new(1).unwrap()).await.unwrap()
}

/// Points 1 to `count` of the VM.
async fn with_points(store: &Arc<MemoryStore>, count: u8) -> Repository {
    let repository = repository(store).await;
    for n in 1..=count {
        let run = repository.begin_run().await.unwrap();
        let stored = run.store_bytes(&[n; 4096]).await.unwrap();
        run.commit(point(n), draft(&stored)).await.unwrap();
    }
    repository
}

fn store() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new(Arc::new(crate::clock::SystemClock)))
}

/// A bitmap whose point exists was deleted as a leftover when the point's manifest could not be
/// read, or when more than [`BASES_MAX`] newer ones were there.
#[tokio::test(flavor = "multi_thread")]
async fn every_point_exists_also_one_that_is_too_old_or_damaged_to_build_on() {
    let store = store();
    let count = u8::try_from(BASES_MAX).unwrap() + 3;
    let repository = with_points(&store, count).await;
    let names = repository.point_names(Some(VM)).await.unwrap();
    let damaged = names.iter().find(|name| name.point == point(count)).unwrap();
    store.overwrite(&damaged.object(), b"rot".to_vec());
    let bases = Bases::read(&repository, VM).await.unwrap();
    let newest = bases.known_points().first().map(|known| known.id);
    assert_eq!(newest, Some(point(count - 1)));
    assert_eq!(bases.point_ids(), (1..=count).map(point).collect());
    assert_eq!(Bases::read(&repository, Uuid::nil()).await.unwrap().point_ids().len(), 0);
}

/// A disk read in full was given the newest stored one as its base: a source that wrongly called
/// a range unchanged would have kept old content.
#[tokio::test(flavor = "multi_thread")]
async fn only_an_incremental_has_something_to_keep_from() {
    let store = store();
    let bases = Bases::read(&with_points(&store, 2).await, VM).await.unwrap();
    let disk = |size_bytes, read| SnapshotDisk {
        description: DiskDescription { size_bytes, ..description() },
        read,
    };
    let full = disk(4096, ReadMode::Full { reason: FullReason::Requested });
    assert_eq!(bases.of(&full).unwrap(), None);
    let incremental = |n| ReadMode::Incremental { base: point(n) };
    let first = bases.of(&disk(4096, incremental(1))).unwrap().cloned().unwrap();
    let second = bases.of(&disk(4096, incremental(2))).unwrap().cloned().unwrap();
    assert_ne!(first.root, second.root);
    for wrong in [disk(4096, incremental(3)), disk(8192, incremental(2))] {
        assert_eq!(bases.of(&wrong).unwrap_err().kind(), Kind::Internal);
    }
}
