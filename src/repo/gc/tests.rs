//! The collector beside writers and readers, over a store in memory with a clock of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange};
use crate::clock::{Clock, ManualClock};
use crate::content::LEAF_BYTES;
use crate::repo::config::ChunkSize;
use crate::repo::keys::{Credentials, InitOptions, Kdf};
use crate::repo::run::LEASE;
use crate::repo::store::ObjectStore;
use crate::repo::store::memory::{Fault, MemoryStore, Operation};
use crate::repo::{ManifestDraft, Repository, Run, StoredDisk};
use crate::workers::Workers;

/// Every test's VM has a disk of so many chunks; a chunk's content is a number (0: zeroes).
const CHUNKS: usize = 6;

pub(in crate::repo) struct Bed {
    pub(in crate::repo) clock: Arc<ManualClock>,
    pub(in crate::repo) store: Arc<MemoryStore>,
    pub(in crate::repo) workers: Workers,
}

impl Bed {
    pub(in crate::repo) async fn new() -> Self {
        let clock = Arc::new(ManualClock::new(Timestamp::UNIX_EPOCH));
        let store = Arc::new(MemoryStore::new(Arc::clone(&clock) as Arc<dyn Clock>));
        let bed = Self { clock, store, workers: Workers::new(2).unwrap() };
        let options = InitOptions {
            chunk: ChunkSize::DEFAULT,
            kdf: Kdf::FOR_TESTS,
            now: Timestamp::UNIX_EPOCH,
        };
        let store = Arc::clone(&bed.store) as Arc<dyn ObjectStore>;
        Repository::init(store, &Credentials::None, options, bed.workers.clone()).await.unwrap();
        bed
    }

    /// Another host: its own view of the repository.
    pub(in crate::repo) async fn open(&self) -> Repository {
        let store = Arc::clone(&self.store) as Arc<dyn ObjectStore>;
        Repository::open(store, &Credentials::None, self.workers.clone()).await.unwrap()
    }

    pub(in crate::repo) fn pass(&self, by: Duration) {
        self.clock.advance(by);
    }

    pub(in crate::repo) fn count(&self, folder: Folder) -> usize {
        let names = self.store.names();
        names.iter().filter(|name| name.as_str().starts_with(folder.prefix())).count()
    }
}

pub(in crate::repo) const MINUTE: Duration = Duration::from_secs(60);

pub(in crate::repo) fn chunk(content: u8) -> Vec<u8> {
    // Incompressible, so that the space it takes is seen.
    let mut bytes = vec![0; usize::try_from(LEAF_BYTES).unwrap()];
    if content > 0 {
        blake3::Hasher::new().update(&[content]).finalize_xof().fill(&mut bytes);
    }
    bytes
}

pub(in crate::repo) fn point(n: u8) -> PointId {
    PointId([n; 16])
}

/// A manifest of one disk; incremental if it has a base.
pub(in crate::repo) fn draft(stored: &StoredDisk, base: Option<PointId>) -> ManifestDraft {
    let read = match base {
        Some(base) => serde_json::json!({"mode": "incremental", "base": base}),
        None => serde_json::json!({"mode": "full", "reason": "requested"}),
    };
    serde_json::from_value(serde_json::json!({
        "vm": {"uuid": "b2b8a3a0-0000-4000-8000-000000000001", "name": "foo", "host": "h", "platform": "image"},
        "taken": "2026-11-21T00:00:00Z", "finished": "2026-11-21T00:00:01Z",
        "quiescence": {"level": "stopped"}, "excluded": [], "not_captured": [],
        "disks": [{
            "description": {"name": "vda", "size_bytes": stored.size_bytes, "format": "raw", "origin": "", "layer": "plain"},
            "read": read, "stored": stored, "read_bytes": 0,
            "stats": {"written_bytes": 0, "known_bytes": 0, "new_bytes": 0, "stored_bytes": 0},
        }],
        "artifacts": [], "program": "test",
    }))
    .unwrap()
}

/// Stores `contents`; chunks equal to the base's are kept from it.
pub(in crate::repo) async fn write(
    run: &Run,
    contents: &[u8],
    base: Option<&(StoredDisk, Vec<u8>)>,
) -> StoredDisk {
    let writer = run.disk_writer(contents.len() as u64 * LEAF_BYTES, base.map(|base| &base.0));
    for (at, content) in (0..).zip(contents) {
        let range = ByteRange::new(at * LEAF_BYTES, LEAF_BYTES);
        let same = base.is_some_and(|(_, old)| old[usize::try_from(at).unwrap()] == *content);
        if same {
            writer.keep(range).await.unwrap();
        } else {
            let buffer = Buffer::unbudgeted(chunk(*content));
            writer.write(range.offset(), buffer).await.unwrap();
        }
    }
    writer.finish().await.unwrap().0
}

pub(in crate::repo) async fn add_point(
    repository: &Repository,
    n: u8,
    contents: &[u8],
) -> StoredDisk {
    let run = repository.begin_run().await.unwrap();
    let stored = write(&run, contents, None).await;
    run.commit(point(n), draft(&stored, None)).await.unwrap();
    stored
}

pub(in crate::repo) async fn assert_holds(
    repository: &Repository,
    stored: &StoredDisk,
    contents: &[u8],
) {
    let reader = repository.open_disk(stored).await.unwrap();
    let len = usize::try_from(LEAF_BYTES).unwrap();
    for (at, content) in (0..).zip(contents) {
        let buffer = Buffer::unbudgeted(vec![0xee; len]);
        let read = reader.read(at * LEAF_BYTES, buffer).await.unwrap();
        assert!(read[..] == chunk(*content)[..], "chunk {at} of {contents:?}");
    }
    let expected: Vec<u8> = contents.iter().flat_map(|content| chunk(*content)).collect();
    assert!(read_directly(repository, stored).await.unwrap() == expected, "directly: {contents:?}");
}

/// A disk, read on a thread that may wait, as a restore to a file does, in requests of three chunks.
pub(in crate::repo) async fn read_directly(
    repository: &Repository,
    stored: &StoredDisk,
) -> crate::error::Result<Vec<u8>> {
    let reader = repository.open_disk(stored).await?;
    let direct = reader.blocking().expect("the store is in memory");
    let len = usize::try_from(stored.size_bytes).unwrap();
    let read = move || {
        let mut bytes = vec![0xee; len];
        let step = 3 * usize::try_from(LEAF_BYTES).unwrap();
        for (at, part) in (0_u64..).step_by(step).zip(bytes.chunks_mut(step)) {
            direct.read_at(at, part)?;
        }
        Ok(bytes)
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

pub(in crate::repo) async fn collect(repository: &Repository) -> CollectReport {
    repository.collect(CollectOptions::default(), &Control::new()).await.unwrap()
}

/// Of a point whose manifest may yet appear: it was listed when it did, and its chunks were gone.
#[tokio::test(flavor = "multi_thread")]
async fn the_tombstone_of_a_point_without_a_manifest_stays_for_a_day() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    repository.forget(point(1)).await.unwrap();
    bed.pass(23 * 60 * MINUTE);
    collect(&repository).await;
    add_point(&repository, 1, &[1, 2, 3, 4, 5, 6]).await;
    assert!(repository.point_names(None).await.unwrap().is_empty());
    collect(&repository).await;
    assert_eq!((bed.count(Folder::Points), bed.count(Folder::Tombstones)), (0, 0));
    repository.forget(point(2)).await.unwrap();
    bed.pass(25 * 60 * MINUTE);
    collect(&repository).await;
    assert_eq!(bed.count(Folder::Tombstones), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_forgotten_point_needs_goes_and_the_rest_stays() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let (first, second) = ([1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9]);
    add_point(&repository, 1, &first).await;
    bed.pass(MINUTE);
    let kept = add_point(&repository, 2, &second).await;
    bed.pass(MINUTE);
    assert_eq!(collect(&repository).await.packs_deleted, 0);
    repository.forget(point(1)).await.unwrap();
    assert_eq!(repository.point_names(None).await.unwrap().len(), 1);
    bed.pass(MINUTE);
    let report = collect(&repository).await;
    assert_eq!((report.points, report.forgotten, report.packs_waiting), (1, 1, 0));
    // Half of the first pack was dead: the other half moved, then the pack went.
    assert!(report.bytes_repacked >= 3 * LEAF_BYTES, "{report:?}");
    assert!(report.bytes_freed > 6 * LEAF_BYTES, "{report:?}");
    assert_eq!((bed.count(Folder::Points), bed.count(Folder::Tombstones)), (1, 0));
    assert_eq!(bed.count(Folder::Condemned), 0);
    assert_holds(&bed.open().await, &kept, &second).await;
    bed.pass(MINUTE);
    let again = collect(&repository).await;
    assert_eq!((again.packs_deleted, again.bytes_repacked), (0, 0), "{again:?}");
}

/// Collects what a forgotten point had; how many objects of each folder are left, and what was warned of.
async fn collect_beside(
    faults: impl Fn(&Operation) -> Option<Fault> + Send + Sync + 'static,
) -> (Vec<usize>, Vec<String>) {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    add_point(&repository, 1, &[1, 2, 3, 4, 5, 6]).await;
    bed.pass(MINUTE);
    add_point(&repository, 2, &[1, 2, 3, 7, 8, 9]).await;
    repository.forget(point(1)).await.unwrap();
    bed.pass(MINUTE);
    bed.store.set_fault_hook(faults);
    let control = Control::new();
    let report = repository.collect(CollectOptions::default(), &control).await.unwrap();
    assert!(report.forgotten == 1 && report.packs_deleted > 0, "{report:?}");
    let notices = control.notices_from(0).into_iter();
    let warnings = notices.filter(|notice| notice.level == NoticeLevel::Warning);
    let left = Folder::ALL.iter().map(|folder| bed.count(*folder)).collect();
    (left, warnings.map(|notice| notice.text).collect())
}

/// A foreign file among what killed runs left made every collection an error, and kept the catalog
/// from being put right.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_swept_is_told_of_and_everything_else_is_done() {
    let (left, warnings) = collect_beside(|_| None).await;
    assert!(warnings.is_empty(), "{warnings:?}");
    let stays = |operation: &Operation| (*operation == Operation::Sweep).then_some(Fault::Fail);
    let (left_beside, warnings) = collect_beside(stays).await;
    assert_eq!(left_beside, left);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("Sweep in memory") && warnings[0].contains("remove it by hand"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_swept_keeps_the_room_of_the_rest_from_no_collection() {
    let runs = AtomicUsize::new(0);
    let full_at_first = move |operation: &Operation| match operation {
        Operation::Sweep => Some(Fault::Fail),
        Operation::Create(name) if name.as_str().starts_with(Folder::Runs.prefix()) => {
            (runs.fetch_add(1, Ordering::Relaxed) == 0).then_some(Fault::Full)
        }
        _ => None,
    };
    let (_, warnings) = collect_beside(full_at_first).await;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn forgetting_everything_frees_everything() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    add_point(&repository, 1, &[1, 2, 3]).await;
    repository.forget(point(1)).await.unwrap();
    bed.pass(MINUTE);
    collect(&repository).await;
    assert_eq!((bed.count(Folder::Packs), bed.count(Folder::Points)), (0, 0));
    let stored = add_point(&bed.open().await, 2, &[1, 2, 3]).await;
    assert_holds(&bed.open().await, &stored, &[1, 2, 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_began_before_is_waited_for_and_what_it_needs_survives() {
    let bed = Bed::new().await;
    let (writer, collector) = (bed.open().await, bed.open().await);
    add_point(&writer, 1, &[1, 2, 3, 4, 5, 6]).await;
    bed.pass(MINUTE);
    let run = writer.begin_run().await.unwrap();
    // It dedups against the point that is forgotten in the meantime.
    let stored = write(&run, &[1, 2, 3, 4, 5, 6], None).await;
    collector.forget(point(1)).await.unwrap();
    bed.pass(MINUTE);
    let report = collect(&collector).await;
    assert_eq!((report.packs_deleted, report.waiting_for.len()), (0, 1), "{report:?}");
    assert!(report.packs_waiting > 0);
    run.commit(point(2), draft(&stored, None)).await.unwrap();
    bed.pass(MINUTE);
    let report = collect(&collector).await;
    assert_eq!((report.packs_deleted, report.packs_waiting), (0, 0), "{report:?}");
    assert_eq!(bed.count(Folder::Condemned), 0, "the list is settled");
    assert_holds(&bed.open().await, &stored, &[1, 2, 3, 4, 5, 6]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_began_later_stores_again_what_is_condemned() {
    let bed = Bed::new().await;
    let (writer, collector) = (bed.open().await, bed.open().await);
    add_point(&writer, 1, &[1, 2, 3]).await;
    bed.pass(MINUTE);
    let old = writer.begin_run().await.unwrap();
    collector.forget(point(1)).await.unwrap();
    bed.pass(MINUTE);
    assert!(collect(&collector).await.packs_waiting > 0);
    bed.pass(LEASE_OF_WRITER + MINUTE);
    old.end().await.unwrap();
    let stale = bed.open().await;
    let new = stale.begin_run().await.unwrap();
    let stored = write(&new, &[1, 2, 3], None).await;
    // The list is carried out while the later run is still at work.
    let report = collect(&collector).await;
    assert!(report.packs_deleted > 0 && report.packs_waiting == 0, "{report:?}");
    new.commit(point(2), draft(&stored, None)).await.unwrap();
    assert_holds(&bed.open().await, &stored, &[1, 2, 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_base_was_forgotten_does_not_commit() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let base = add_point(&repository, 1, &[1, 2, 3]).await;
    let run = repository.begin_run().await.unwrap();
    let stored = write(&run, &[1, 2, 9], Some(&(base, vec![1, 2, 3]))).await;
    repository.forget(point(1)).await.unwrap();
    let error = run.commit(point(2), draft(&stored, Some(point(1)))).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoBase);
    assert!(repository.point_names(None).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_run_without_a_manifest_left_goes() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let run = repository.begin_run().await.unwrap();
    let stored = write(&run, &[1, 2, 3], None).await;
    bed.pass(LEASE_OF_WRITER + MINUTE);
    let error = run.commit(point(1), draft(&stored, None)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout);
    assert!(bed.count(Folder::Packs) > 0);
    bed.pass(MINUTE);
    collect(&repository).await;
    assert_eq!(bed.count(Folder::Packs), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_holds_the_collector_up_only_until_its_lease_is_over() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    add_point(&repository, 1, &[1, 2, 3]).await;
    drop(repository.begin_run().await.unwrap());
    repository.forget(point(1)).await.unwrap();
    bed.pass(MINUTE);
    assert!(collect(&repository).await.waiting_for.is_empty(), "nothing is old enough to condemn");
    assert!(bed.count(Folder::Packs) > 0);
    bed.pass(LEASE + MINUTE);
    collect(&repository).await;
    assert_eq!(bed.count(Folder::Packs), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_was_open_before_still_reads_after_a_repack() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    add_point(&repository, 1, &[1, 2, 3, 4, 5, 6]).await;
    bed.pass(MINUTE);
    let kept = add_point(&repository, 2, &[6, 1, 0, 0, 0, 0]).await;
    let stale = bed.open().await;
    let reader = stale.open_disk(&kept).await.unwrap();
    repository.forget(point(1)).await.unwrap();
    bed.pass(MINUTE);
    assert!(collect(&repository).await.packs_deleted > 0);
    let len = usize::try_from(2 * LEAF_BYTES).unwrap();
    let read = reader.read(0, Buffer::unbudgeted(vec![0; len])).await.unwrap();
    assert!(read[..] == [chunk(6), chunk(1)].concat()[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_collectors_never_work_at_once() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let Blobs { store, keys, .. } = &*repository.blobs;
    let other = Lease::begin(store, keys, RunKind::Collect).await.unwrap();
    let refused = repository.collect(CollectOptions::default(), &Control::new()).await;
    assert_eq!(refused.unwrap_err().kind(), Kind::Busy);
    drop(other);
    bed.pass(LEASE + MINUTE);
    collect(&repository).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_stops_the_collector_before_it_deletes_anything() {
    for folder in [Folder::Index, Folder::Points, Folder::Packs] {
        let bed = Bed::new().await;
        let repository = bed.open().await;
        add_point(&repository, 1, &[1, 2, 3]).await;
        add_point(&repository, 2, &[1, 2, 4]).await;
        repository.forget(point(2)).await.unwrap();
        bed.pass(MINUTE);
        let before = bed.store.names();
        for name in before.iter().filter(|name| name.as_str().starts_with(folder.prefix())) {
            bed.store.overwrite(name, vec![7; 100]);
        }
        let refused = bed.open().await.collect(CollectOptions::default(), &Control::new()).await;
        assert_eq!(refused.unwrap_err().kind(), Kind::Corrupt, "{folder:?}");
        assert!(before.iter().all(|name| bed.store.names().contains(name)), "{folder:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_runs_leave_few_segments_and_packs() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let mut points = Vec::new();
    for n in 0..40 {
        points.push(add_point(&repository, n, &[n + 1, n + 2, 0]).await);
        bed.pass(MINUTE);
    }
    let before = (bed.count(Folder::Index), bed.count(Folder::Packs));
    collect(&repository).await;
    let after = (bed.count(Folder::Index), bed.count(Folder::Packs));
    assert!(
        before.0 >= 40 && before.1 >= 40 && after.0 <= 3 && after.1 <= 4,
        "{before:?} {after:?}"
    );
    let fresh = bed.open().await;
    for (n, stored) in (0..).zip(&points) {
        assert_holds(&fresh, stored, &[n + 1, n + 2, 0]).await;
    }
}

/// One thing that happens to a repository.
#[derive(Clone, Debug)]
enum Step {
    /// A host begins a backup.
    Begin {
        host: usize,
    },
    /// It writes its disk.
    Write {
        host: usize,
        contents: [u8; CHUNKS],
    },
    /// It commits, or finds out that it may not.
    Commit {
        host: usize,
    },
    /// It is killed.
    Kill {
        host: usize,
    },
    Forget {
        which: prop::sample::Index,
    },
    Collect {
        host: usize,
    },
    Pass {
        minutes: u64,
    },
}

const HOSTS: usize = 3;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..HOSTS).prop_map(|host| Step::Begin { host }),
        4 => (0..HOSTS, proptest::array::uniform6(0_u8..10))
            .prop_map(|(host, contents)| Step::Write { host, contents }),
        4 => (0..HOSTS).prop_map(|host| Step::Commit { host }),
        1 => (0..HOSTS).prop_map(|host| Step::Kill { host }),
        3 => any::<prop::sample::Index>().prop_map(|which| Step::Forget { which }),
        4 => (0..HOSTS).prop_map(|host| Step::Collect { host }),
        2 => (1_u64..50).prop_map(|minutes| Step::Pass { minutes }),
    ]
}

/// What a host has under way.
struct Work {
    run: Run,
    base: Option<PointId>,
    written: Option<(StoredDisk, Vec<u8>)>,
}

/// The points that were committed and not forgotten: what the repository must hold.
type Model = Vec<(PointId, StoredDisk, Vec<u8>)>;

async fn play(steps: Vec<Step>) {
    let bed = Bed::new().await;
    // Views are kept over the whole play: their caches are as stale as can be.
    let mut views = Vec::new();
    for _ in 0..HOSTS {
        views.push(bed.open().await);
    }
    let mut works: Vec<Option<Work>> = (0..HOSTS).map(|_| None).collect();
    let mut model: Model = Vec::new();
    let mut next = 0;
    for step in steps {
        bed.pass(Duration::from_secs(1));
        match step {
            Step::Begin { host } => {
                let run = views[host].begin_run().await.unwrap();
                works[host] = Some(Work { run, base: None, written: None });
            }
            Step::Write { host, contents } => {
                let Some(work) = &mut works[host] else { continue };
                let base = model.last().map(|(id, disk, held)| (*id, (disk.clone(), held.clone())));
                let stored = write(&work.run, &contents, base.as_ref().map(|base| &base.1)).await;
                work.base = base.map(|base| base.0);
                work.written = Some((stored, contents.to_vec()));
            }
            Step::Commit { host } => {
                let Some(Work { run, base, written: Some((stored, contents)) }) =
                    works[host].take()
                else {
                    continue;
                };
                next += 1;
                match run.commit(point(next), draft(&stored, base)).await {
                    Ok(_) => model.push((point(next), stored, contents)),
                    Err(error) => {
                        assert!(matches!(error.kind(), Kind::Timeout | Kind::NoBase), "{error:?}");
                    }
                }
            }
            Step::Kill { host } => works[host] = None,
            Step::Forget { which } if !model.is_empty() => {
                let (id, ..) = model.remove(which.index(model.len()));
                views[0].forget(id).await.unwrap();
            }
            Step::Forget { .. } => {}
            Step::Collect { host } => {
                let options =
                    CollectOptions { repack_dead_percent: 20, ..CollectOptions::default() };
                views[host].collect(options, &Control::new()).await.unwrap();
            }
            Step::Pass { minutes } => bed.pass(MINUTE * u32::try_from(minutes).unwrap()),
        }
        let fresh = bed.open().await;
        let names = fresh.point_names(None).await.unwrap();
        assert_eq!(names.len(), model.len());
        for (_, stored, contents) in &model {
            assert_holds(&fresh, stored, contents).await;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever hosts do in whatever order, each committed point that was not forgotten restores.
    #[test]
    fn every_committed_point_restores_whatever_happens(
        steps in proptest::collection::vec(step(), 1..30),
    ) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(steps));
    }
}

/// A pack that was condemned, and needed after all by a run from before, was deleted under whoever
/// read the point of that run when the point was forgotten: the old list counted as missed by
/// nobody, because the reader had begun after it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_condemned_before_a_reader_began_waits_for_it_all_the_same() {
    let bed = Bed::new().await;
    let (writer, collector) = (bed.open().await, bed.open().await);
    add_point(&writer, 1, &[1, 2, 3]).await;
    bed.pass(MINUTE);
    let older = writer.begin_run().await.unwrap();
    let stored = write(&older, &[1, 2, 3], None).await;
    collector.forget(point(1)).await.unwrap();
    bed.pass(MINUTE);
    assert!(collect(&collector).await.packs_waiting > 0);
    older.commit(point(2), draft(&stored, None)).await.unwrap();
    bed.pass(LEASE_OF_WRITER + MINUTE);
    let reader = bed.open().await;
    let hold = reader.hold().await.unwrap();
    assert_eq!(reader.point_names(None).await.unwrap().len(), 1);
    bed.pass(MINUTE);
    collector.forget(point(2)).await.unwrap();
    for _ in 0..2 {
        bed.pass(MINUTE);
        let report = collect(&collector).await;
        assert_eq!((report.packs_deleted, report.waiting_for.len()), (0, 1), "{report:?}");
        assert_holds(&reader, &stored, &[1, 2, 3]).await;
    }
    hold.end().await.unwrap();
    bed.pass(MINUTE);
    collect(&collector).await;
    assert_eq!((bed.count(Folder::Packs), bed.count(Folder::Condemned)), (0, 0));
}
