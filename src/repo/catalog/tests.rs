//! The catalog over a store in memory: what it answers is what the manifests say, whatever becomes of
//! it, and what it costs is counted in calls to the store.

#![allow(clippy::cast_possible_truncation)]

use std::sync::Mutex;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::clock::{Clock, ManualClock};
use crate::control::Control;
use crate::repo::config::ChunkSize;
use crate::repo::keys::{Credentials, InitOptions, Kdf};
use crate::repo::seal::ObjectType;
use crate::repo::store::directory::{DirectoryStore, Parents};
use crate::repo::store::memory::{MemoryStore, Operation};
use crate::repo::store::{ObjectName, ObjectStore};
use crate::repo::{CollectOptions, ManifestDraft, Repository};
use crate::workers::Workers;

async fn store_manifest(blobs: &Blobs, point: PointId, draft: ManifestDraft) {
    let (_, name, object) = points::prepare_manifest(blobs, point, draft).await.unwrap();
    blobs.store.put(&name, object).await.unwrap();
}

struct Bed {
    clock: Arc<ManualClock>,
    store: Arc<MemoryStore>,
    repository: Repository,
}

fn point(n: u64) -> PointId {
    // Ids are random in life: so that one run in eight merges.
    let hash = blake3::hash(&n.to_le_bytes());
    PointId(hash.as_bytes()[..16].try_into().unwrap())
}

fn uuid(vm: u64) -> Uuid {
    Uuid::from_u128(0xb2b8_a3a0_0000_4000_8000_0000_0000_0000 + u128::from(vm))
}

fn draft(vm: u64, name: &str) -> ManifestDraft {
    serde_json::from_value(serde_json::json!({
        "vm": {"uuid": uuid(vm), "name": name, "host": "h", "platform": "image"},
        "taken": "2026-11-21T00:00:00Z", "finished": "2026-11-21T00:00:01Z",
        "quiescence": {"level": "stopped"}, "excluded": [], "not_captured": [],
        "disks": [], "artifacts": [], "program": "test",
    }))
    .unwrap()
}

/// Not a test: makes a repository to measure lists with (docs/benchmarks.md), where it is told to.
/// Its manifests are empty files: a list reads the catalog alone.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes a million files in the new directory that VMBACKUP_MILLION names"]
async fn make_a_repository_of_a_million_points() {
    let Some(directory) = std::env::var_os("VMBACKUP_MILLION") else { return };
    let directory = std::path::PathBuf::from(directory);
    std::fs::create_dir(&directory).unwrap();
    let store = DirectoryStore::init(&directory, Parents::MustExist).await.unwrap();
    let options =
        InitOptions { chunk: ChunkSize::DEFAULT, kdf: Kdf::FOR_TESTS, now: Timestamp::UNIX_EPOCH };
    let workers = Workers::new(2).unwrap();
    let repository =
        Repository::init(Arc::new(store), &Credentials::None, options, workers).await.unwrap();
    let blobs = &repository.blobs;
    let mut writer = SegmentWriter::create(&*blobs.store, &blobs.keys, &[7; 16]).await.unwrap();
    for vm in 0..1000 {
        std::fs::create_dir_all(directory.join(format!("points/{}", uuid(vm)))).unwrap();
        for sequence in 1..=1000 {
            let body = draft(vm, &format!("vm-{vm:07}"));
            let point = point(vm * 1000 + sequence);
            let summary = Summary::of(&Manifest { point, sequence, body });
            std::fs::write(directory.join(summary.name().object().as_str()), "").unwrap();
            writer.push(summary).await.unwrap();
        }
    }
    writer.finish(&[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_the_summaries_in_their_order_from_the_catalog_and_from_manifests() {
    let bed = Bed::new().await;
    let blobs = &bed.repository.blobs;
    let mut writer = SegmentWriter::create(&*blobs.store, &blobs.keys, &[7; 16]).await.unwrap();
    for n in 0..20_000 {
        let manifest =
            Manifest { point: point(n), sequence: n + 1, body: draft(n / 10_000, "foo") };
        let name = PointName {
            domain: manifest.body.vm.uuid,
            sequence: manifest.sequence,
            point: manifest.point,
        };
        let object = name.object();
        let json = serde_json::to_vec(&manifest).unwrap();
        let sealed = blobs.keys.seal_object(ObjectType::Point, &object, &json);
        bed.store.put(&object, sealed).await.unwrap();
        // Some are in no catalog.
        if n % 1000 != 3 {
            writer.push(Summary::of(&manifest)).await.unwrap();
        }
    }
    writer.finish(&[]).await.unwrap();
    let all = bed.repository.summaries(PointsOf::All).await.unwrap();
    assert_eq!(all.len(), 20_000);
    let mut pages = bed.repository.summary_pages(PointsOf::All).await.unwrap();
    for _ in 0..2 {
        let mut listed = Vec::new();
        while let Some(page) = pages.next().await.unwrap() {
            assert!(page.len() <= 8192);
            listed.extend(page);
        }
        assert!(listed == all);
        pages.rewind();
    }
}

impl Bed {
    async fn new() -> Self {
        let clock = Arc::new(ManualClock::new(Timestamp::UNIX_EPOCH));
        let store = Arc::new(MemoryStore::new(Arc::clone(&clock) as Arc<dyn Clock>));
        let options = InitOptions {
            chunk: ChunkSize::DEFAULT,
            kdf: Kdf::FOR_TESTS,
            now: Timestamp::UNIX_EPOCH,
        };
        let shared = Arc::clone(&store) as Arc<dyn ObjectStore>;
        let workers = Workers::new(2).unwrap();
        let repository =
            Repository::init(shared, &Credentials::None, options, workers).await.unwrap();
        Self { clock, store, repository }
    }

    /// Commits a point, the way a run does.
    async fn commit(&self, n: u64, vm: u64, name: &str) {
        let blobs = &self.repository.blobs;
        store_manifest(blobs, point(n), draft(vm, name)).await;
        merge_tier(blobs, point(n)).await.unwrap();
        self.clock.advance(Duration::from_secs(1));
    }

    async fn collect(&self) {
        self.clock.advance(Duration::from_secs(3600));
        self.repository.collect(CollectOptions::default(), &Control::new()).await.unwrap();
    }

    fn catalog(&self) -> Vec<ObjectName> {
        let mut names = self.store.names();
        names.retain(|name| name.as_str().starts_with(Folder::Catalog.prefix()));
        names
    }

    /// What the manifests say.
    async fn truth(&self) -> Vec<Summary> {
        self.repository.manifests(None).await.unwrap().iter().map(Summary::of).collect()
    }

    async fn all(&self) -> Vec<Summary> {
        self.repository.summaries(PointsOf::All).await.unwrap()
    }

    async fn called(&self, text: &str) -> Vec<PointId> {
        let found = self.repository.summaries(PointsOf::Called(text)).await.unwrap();
        found.iter().map(|summary| summary.point).collect()
    }

    /// Calls to the store from now on.
    fn calls(&self) -> Arc<Mutex<Vec<Operation>>> {
        let calls: Arc<Mutex<Vec<Operation>>> = Arc::default();
        let seen = Arc::clone(&calls);
        self.store.set_fault_hook(move |operation| {
            seen.lock().unwrap().push(operation.clone());
            None
        });
        calls
    }
}

fn manifest_reads(calls: &[Operation]) -> usize {
    let is_manifest = |operation: &&Operation| matches!(operation, Operation::Read(name) if name.as_str().starts_with("points/"));
    calls.iter().filter(is_manifest).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn listing_and_finding_among_2000_points_read_no_manifest_and_little_else() {
    let bed = Bed::new().await;
    for n in 0..2000 {
        let vm = n % 40;
        bed.commit(n, vm, &format!("vm-{vm}")).await;
    }
    let truth = bed.truth().await;
    for is_collected in [false, true] {
        if is_collected {
            bed.collect().await;
            assert!(bed.catalog().len() <= 2, "{:?}", bed.catalog());
        }
        let calls = bed.calls();
        assert!(bed.all().await == truth);
        let made = std::mem::take(&mut *calls.lock().unwrap());
        assert_eq!(manifest_reads(&made), 0);
        assert!(made.len() < 130, "{} calls to list 2000 points", made.len());
        assert_eq!(bed.called("vm-7").await.len(), 50);
        let made = std::mem::take(&mut *calls.lock().unwrap());
        assert_eq!(manifest_reads(&made), 0);
        assert!(made.len() < 100, "{} calls to find a VM's points", made.len());
        bed.store.clear_fault_hook();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_leave_few_segments_that_count_and_rewrite_each_summary_seldom() {
    let bed = Bed::new().await;
    let calls = bed.calls();
    for n in 0..600 {
        bed.commit(n, n % 7, "foo").await;
    }
    bed.store.clear_fault_hook();
    let catalog = Catalog::open(&bed.repository.blobs).await.unwrap();
    // Seven per tier and what has piled up since the last look.
    assert!(catalog.segments.len() < 40, "{} segments", catalog.segments.len());
    let finished = |operation: &&Operation| matches!(operation, Operation::Finish(name) if name.as_str().starts_with("catalog/"));
    let written = calls.lock().unwrap().iter().filter(finished).count();
    assert!((600..700).contains(&written), "{written} segments for 600 points");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_found_by_every_name_it_had_and_by_its_uuid() {
    let bed = Bed::new().await;
    bed.commit(1, 1, "old").await;
    bed.commit(2, 1, "new").await;
    bed.commit(3, 2, "other").await;
    for text in ["old", "new"] {
        assert_eq!(bed.called(text).await, [point(1), point(2)], "{text}");
    }
    assert_eq!(bed.called(&uuid(2).to_string()).await, [point(3)]);
    assert_eq!(bed.called("b2b8a3a0").await.len(), 3, "a prefix of all three");
    assert!(bed.called("nobody").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_of_which_the_catalog_knows_nothing_is_found_by_name() {
    let bed = Bed::new().await;
    bed.commit(1, 1, "foo").await;
    for name in bed.catalog() {
        bed.store.delete(&name).await.unwrap();
    }
    bed.commit(2, 2, "bar").await;
    assert_eq!(bed.called("foo").await, [point(1)]);
    assert!(bed.called("bar").await.contains(&point(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_collector_drops_what_is_forgotten_and_replaces_what_is_damaged() {
    let bed = Bed::new().await;
    for n in 0..60 {
        bed.commit(n, 1, "foo").await;
    }
    bed.collect().await;
    for n in 0..40 {
        bed.repository.forget(point(n)).await.unwrap();
    }
    assert_eq!(bed.all().await.len(), 20, "forgotten at once");
    bed.collect().await;
    let catalog = Catalog::open(&bed.repository.blobs).await.unwrap();
    assert_eq!(catalog.segments.iter().map(|s| s.points()).sum::<u64>(), 20);
    for damage in [vec![7; 100], Vec::new()] {
        for name in bed.catalog() {
            bed.store.overwrite(&name, damage.clone());
        }
        let truth = bed.truth().await;
        assert!(bed.all().await == truth, "the manifests are read instead");
        assert_eq!(bed.called("foo").await.len(), 20);
        bed.collect().await;
        let calls = bed.calls();
        assert!(bed.all().await == truth);
        assert_eq!(manifest_reads(&calls.lock().unwrap()), 0, "the catalog is whole again");
        bed.store.clear_fault_hook();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_block_costs_a_look_at_the_manifests_until_the_collector_ran() {
    let bed = Bed::new().await;
    for n in 0..300 {
        bed.commit(n, n % 3, "foo").await;
    }
    bed.collect().await;
    let name = bed.catalog().remove(0);
    let mut bytes = bed
        .store
        .read(&name, crate::repo::store::ReadRange::Whole { bytes_max: 1 << 24 })
        .await
        .unwrap();
    bytes[100] ^= 1;
    bed.store.overwrite(&name, bytes);
    let truth = bed.truth().await;
    assert!(bed.all().await == truth);
    bed.collect().await;
    let calls = bed.calls();
    assert!(bed.all().await == truth);
    assert_eq!(manifest_reads(&calls.lock().unwrap()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_summary_whose_manifest_is_still_to_come_is_not_collected() {
    let bed = Bed::new().await;
    bed.commit(1, 1, "foo").await;
    let run = bed.repository.begin_run().await.unwrap();
    bed.clock.advance(Duration::from_secs(1));
    let blobs = &bed.repository.blobs;
    let manifest = Manifest { point: point(2), sequence: 1, body: draft(2, "bar") };
    add(blobs, &Summary::of(&manifest)).await.unwrap();
    bed.clock.advance(Duration::from_secs(60));
    for _ in 0..2 {
        bed.repository.collect(CollectOptions::default(), &Control::new()).await.unwrap();
    }
    let knows = |catalog: Catalog| catalog.segments.iter().any(|s| s.vms().contains_key(&uuid(2)));
    assert!(knows(Catalog::open(blobs).await.unwrap()));
    run.end().await.unwrap();
    bed.collect().await;
    assert!(!knows(Catalog::open(blobs).await.unwrap()), "nobody can commit it any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_that_merge_at_once_lose_nothing() {
    let bed = Bed::new().await;
    let blobs = &bed.repository.blobs;
    for n in 0..20 {
        let body = draft(n % 2, "foo");
        store_manifest(blobs, point(n), body).await;
    }
    let turn = PointId([0; 16]);
    let (a, b, c) =
        tokio::join!(merge_tier(blobs, turn), merge_tier(blobs, turn), merge_tier(blobs, turn));
    [a, b, c].into_iter().for_each(Result::unwrap);
    let calls = bed.calls();
    let found = bed.all().await;
    assert_eq!(manifest_reads(&calls.lock().unwrap()), 0);
    bed.store.clear_fault_hook();
    assert!(found == bed.truth().await);
}

/// One thing that happens to a catalog.
#[derive(Clone, Debug)]
enum Step {
    Commit { vm: u64, name: u8 },
    Forget { which: prop::sample::Index },
    Damage { which: prop::sample::Index },
    Lose { which: prop::sample::Index },
    Collect,
}

fn step() -> impl Strategy<Value = Step> {
    let which = any::<prop::sample::Index>;
    prop_oneof![
        12 => (0_u64..4, 0_u8..3).prop_map(|(vm, name)| Step::Commit { vm, name }),
        3 => which().prop_map(|which| Step::Forget { which }),
        1 => which().prop_map(|which| Step::Damage { which }),
        1 => which().prop_map(|which| Step::Lose { which }),
        1 => Just(Step::Collect),
    ]
}

async fn play(steps: Vec<Step>) {
    let bed = Bed::new().await;
    let mut next = 0;
    for step in steps {
        let (catalog, there) = (bed.catalog(), bed.truth().await);
        match step {
            Step::Commit { vm, name } => {
                next += 1;
                bed.commit(next, vm, &format!("name-{name}")).await;
            }
            Step::Forget { which } if !there.is_empty() => {
                bed.repository.forget(which.get(&there).point).await.unwrap();
            }
            Step::Damage { which } if !catalog.is_empty() => {
                bed.store.overwrite(which.get(&catalog), vec![7; 200]);
            }
            Step::Lose { which } if !catalog.is_empty() => {
                bed.store.delete(which.get(&catalog)).await.unwrap();
            }
            Step::Collect => bed.collect().await,
            _ => {}
        }
        assert!(bed.all().await == bed.truth().await);
    }
    bed.collect().await;
    let calls = bed.calls();
    let found = bed.all().await;
    assert_eq!(manifest_reads(&calls.lock().unwrap()), 0, "the collector puts all right");
    bed.store.clear_fault_hook();
    assert!(found == bed.truth().await);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whatever becomes of the catalog, a list says what the manifests say.
    #[test]
    fn a_list_is_what_the_manifests_say_whatever_becomes_of_the_catalog(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(steps));
    }
}
