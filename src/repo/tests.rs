//! The repository end to end, over a store in memory: what is written reads back, unchanged parts
//! cost nothing, damage is found and named.

#![allow(clippy::cast_possible_truncation)]

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use proptest::prelude::*;

use super::config::ChunkSize;
use super::keys::Kdf;
use super::store::memory::{Fault, MemoryStore, Operation};
use super::store::{Folder, ObjectName, ObjectStore, for_each};
use super::*;
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ZeroMode, conformance};
use crate::content::{ContentHash, ContentRoot, LEAF_BYTES, levels};
use crate::error::Kind;

const CHUNK: u64 = LEAF_BYTES;

pub(super) async fn open(store: &Arc<MemoryStore>, chunk_bytes: u64) -> Repository {
    let store = Arc::clone(store) as Arc<dyn ObjectStore>;
    let workers = Workers::new(2).unwrap();
    if store.stat(&ObjectName::config()).await.is_ok() {
        return Repository::open(store, &Credentials::None, workers).await.unwrap();
    }
    let options = InitOptions {
        chunk: ChunkSize::new(chunk_bytes).unwrap(),
        kdf: Kdf::FOR_TESTS,
        now: crate::clock::Timestamp::UNIX_EPOCH,
    };
    Repository::init(store, &Credentials::None, options, workers).await.unwrap()
}

pub(super) fn store() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new(Arc::new(crate::clock::SystemClock)))
}

pub(super) fn draft() -> ManifestDraft {
    serde_json::from_value(serde_json::json!({
        "vm": {"uuid": "b2b8a3a0-0000-4000-8000-000000000001", "name": "foo", "host": "h", "platform": "image"},
        "taken": "2026-11-21T00:00:00Z", "finished": "2026-11-21T00:00:01Z",
        "quiescence": {"level": "stopped"}, "disks": [], "excluded": [], "not_captured": [],
        "artifacts": [], "program": "test",
    }))
    .unwrap()
}

pub(super) fn point(n: u8) -> crate::vm::PointId {
    crate::vm::PointId([n; 16])
}

async fn write_all(run: &Run, content: &[u8], chunk: u64) -> (StoredDisk, WriteStats) {
    let writer = run.disk_writer(content.len() as u64, None);
    let range = ByteRange::new(0, content.len() as u64);
    for piece in range.pieces(chunk) {
        let span = usize::try_from(piece.offset()).unwrap()..usize::try_from(piece.end()).unwrap();
        writer.write(piece.offset(), Buffer::unbudgeted(content[span].to_vec())).await.unwrap();
    }
    writer.finish().await.unwrap()
}

fn root_of(content: &[u8]) -> ContentRoot {
    let size = content.len() as u64;
    let leaves: Vec<_> = content.chunks(LEAF_BYTES as usize).map(ContentHash::of_leaf).collect();
    ContentRoot::new(size, &ContentHash::of_children(&leaves, levels(size)))
}

async fn objects(store: &MemoryStore, folder: Folder) -> Vec<super::store::ObjectInfo> {
    let mut all = Vec::new();
    for_each(store, folder.prefix(), |object| all.push(object)).await.unwrap();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_disk_conforms_as_a_source_and_survives_reopening() {
    for chunk in [CHUNK, 4 * CHUNK] {
        let store = store();
        let content = conformance::pattern(1024 * 1024 + 777);
        let repository = open(&store, chunk).await;
        let run = repository.begin_run().await.unwrap();
        let (stored, stats) = write_all(&run, &content, chunk).await;
        assert_eq!(stored.root, root_of(&content));
        assert_eq!(stats.written_bytes, content.len() as u64);
        run.commit(point(1), draft()).await.unwrap();

        let reopened = open(&store, chunk).await;
        let names = reopened.point_names(None).await.unwrap();
        assert_eq!(names.len(), 1);
        assert_eq!(reopened.manifest(&names[0]).await.unwrap().point, point(1));
        let reader = reopened.open_disk(&stored).await.unwrap();
        conformance::source(&reader, &content).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_writer_conforms_as_a_sink() {
    let store = store();
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let writer = run.disk_writer(3_000_000, None);
    let run = tokio::sync::Mutex::new(Some(run));
    let read_back = || async {
        let (stored, _) = writer.finish().await.unwrap();
        let run = run.lock().await.take().expect("read back once");
        run.commit(point(1), draft()).await.unwrap();
        repository.read_bytes(&stored).await.unwrap()
    };
    conformance::sink(&*writer, read_back).await;
}

/// A chunk that nothing compresses.
fn noise(n: u64) -> Buffer {
    let mut bytes = vec![0; CHUNK as usize];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut bytes);
    Buffer::unbudgeted(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_counts_as_durable_when_its_pack_is_in_the_store() {
    let store = store();
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let mut durable = run.durable_packs();
    let size = 300 * CHUNK;
    let writer = run.disk_writer(size, None);
    let store_chunk =
        async |at: u64, n: u64| writer.store(at * CHUNK, noise(n)).await.unwrap().durability;
    assert_eq!(store_chunk(0, 0).await, Durability::Packs(1));
    assert_eq!(store_chunk(1, 0).await, Durability::Packs(1), "the same as one before it");
    let zeroes = Buffer::unbudgeted(vec![0; CHUNK as usize]);
    assert_eq!(writer.store(2 * CHUNK, zeroes).await.unwrap().durability, Durability::Now);
    let mut at = 3;
    while store_chunk(at, at).await == Durability::Packs(1) {
        assert!(*durable.borrow() == 0 || !objects(&store, Folder::Packs).await.is_empty());
        at += 1;
    }
    assert!(at > 250, "a pack of 64 MiB ends after {at} chunks");
    durable.wait_for(|count| *count == 1).await.unwrap();
    assert_eq!(objects(&store, Folder::Packs).await.len(), 1);
    let rest = ByteRange::between((at + 1) * CHUNK, size);
    writer.zero(rest, ZeroMode::Sparse).await.unwrap();
    writer.finish().await.unwrap();
    run.commit(point(1), draft()).await.unwrap();
    let run = repository.begin_run().await.unwrap();
    let writer = run.disk_writer(CHUNK, None);
    assert_eq!(writer.store(0, noise(5)).await.unwrap().durability, Durability::Now);
    run.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_whose_pack_the_store_does_not_take_never_counts_as_durable() {
    let store = store();
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let durable = run.durable_packs();
    let writer = run.disk_writer(300 * CHUNK, None);
    store.set_fault_hook(|op| matches!(op, Operation::Finish(_)).then_some(Fault::Fail));
    for n in 0..300 {
        // Some fail, once the first pack did.
        let _ = writer.store(n * CHUNK, noise(n)).await;
    }
    assert!(run.commit(point(1), draft()).await.is_err());
    assert_eq!(*durable.borrow(), 0);
}

/// They were read one after the other: minutes in which an incremental of a large disk did not begin.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_kept_of_a_base_is_foreseen_with_several_reads_at_once() {
    const NODES: u64 = 40;
    let (store, node_bytes) = (store(), 256 * CHUNK);
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let writer = run.disk_writer(NODES * node_bytes, None);
    for node in 0..NODES {
        writer.store(node * node_bytes, noise(node)).await.unwrap();
        let rest = ByteRange::between(node * node_bytes + CHUNK, (node + 1) * node_bytes);
        writer.zero(rest, ZeroMode::Sparse).await.unwrap();
    }
    let (base, _) = writer.finish().await.unwrap();
    run.commit(point(1), draft()).await.unwrap();
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let writer = run.disk_writer(NODES * node_bytes, Some(&base));
    let mut seams = writer.seams();
    (0..NODES).for_each(|node| seams.keep(ByteRange::new(node * node_bytes, CHUNK)));
    let reads: Arc<[AtomicUsize; 3]> = Arc::default();
    let seen = Arc::clone(&reads);
    store.set_fault_hook(move |op| {
        if matches!(op, Operation::Read(name) if name.as_str().starts_with("packs/")) {
            let [all, now, most] = &*seen;
            all.fetch_add(1, Ordering::Relaxed);
            most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            std::thread::sleep(std::time::Duration::from_millis(10));
            now.fetch_sub(1, Ordering::Relaxed);
        }
        None
    });
    writer.foresee(seams).await.unwrap();
    let [all, _, most] = &*reads;
    assert!(all.load(Ordering::Relaxed) > NODES as usize, "each node is read");
    assert!(most.load(Ordering::Relaxed) > 1, "one at a time");
    store.clear_fault_hook();
    run.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_disk_of_the_same_content_stores_nothing_but_is_complete() {
    let store = store();
    let content = conformance::pattern(8 << 20);
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let (first, _) = write_all(&run, &content, CHUNK).await;
    run.commit(point(1), draft()).await.unwrap();
    let packs = objects(&store, Folder::Packs).await.len();
    let run = repository.begin_run().await.unwrap();
    let (second, stats) = write_all(&run, &content, CHUNK).await;
    let manifest = run.commit(point(2), draft()).await.unwrap();
    assert_eq!(manifest.sequence, 2);
    assert_eq!((first, stats.new_bytes, stats.stored_bytes), (second, 0, 0));
    assert_eq!(objects(&store, Folder::Packs).await.len(), packs);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_of_a_16_tib_disk_costs_what_changed() {
    let store = store();
    let repository = open(&store, CHUNK).await;
    let size = 16_u64 << 40;
    let run = repository.begin_run().await.unwrap();
    let base = run.disk_writer(size, None);
    let data = conformance::pattern(CHUNK as usize);
    base.write(0, Buffer::unbudgeted(data.clone())).await.unwrap();
    base.zero(ByteRange::between(CHUNK, size), ZeroMode::Sparse).await.unwrap();
    let (base, _) = base.finish().await.unwrap();
    run.commit(point(1), draft()).await.unwrap();

    let run = repository.begin_run().await.unwrap();
    let next = run.disk_writer(size, Some(&base));
    let at = 7_u64 << 40;
    next.keep(ByteRange::between(0, at)).await.unwrap();
    next.write(at, Buffer::unbudgeted(data.clone())).await.unwrap();
    next.keep(ByteRange::between(at + CHUNK, size)).await.unwrap();
    let (next, stats) = next.finish().await.unwrap();
    run.commit(point(2), draft()).await.unwrap();
    assert!(stats.stored_bytes < 10_000, "{stats:?}");
    let reader = repository.open_disk(&next).await.unwrap();
    for offset in [0, at] {
        let read = reader.read(offset, Buffer::unbudgeted(vec![1; data.len()])).await.unwrap();
        assert!(read[..] == data[..]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keeping_everything_is_the_base_itself() {
    let store = store();
    let content = conformance::pattern(1 << 20);
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let (base, _) = write_all(&run, &content, CHUNK).await;
    let next = run.disk_writer(1 << 20, Some(&base));
    next.keep(ByteRange::new(0, 1 << 20)).await.unwrap();
    assert_eq!(next.finish().await.unwrap().0, base);
    let other_size = run.disk_writer(2 << 20, Some(&base));
    let error = other_size.keep(ByteRange::new(0, 1 << 20)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
}

/// Stores a disk that is zero but for some chunks.
async fn write_chunks(run: &Run, size: u64, chunks: &[(u64, u8)]) -> StoredDisk {
    let writer = run.disk_writer(size, None);
    for piece in ByteRange::new(0, size).pieces(CHUNK) {
        let byte = chunks.iter().find(|(n, _)| *n == piece.offset() / CHUNK).map(|(_, byte)| *byte);
        match byte {
            Some(byte) => {
                let bytes = vec![byte; piece.len() as usize];
                writer.write(piece.offset(), Buffer::unbudgeted(bytes)).await.unwrap();
            }
            None => writer.zero(piece, ZeroMode::Sparse).await.unwrap(),
        }
    }
    writer.finish().await.unwrap().0
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_between_disks_are_the_chunks_that_differ_whatever_their_sizes() {
    use crate::block::ExtentKind::{Data, Unchanged, Zero};
    let store = store();
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    // 300 chunks have a tree of two heights, 10 one of one.
    let large = write_chunks(&run, 300 * CHUNK + 10, &[(1, 1), (2, 9), (299, 3), (300, 3)]).await;
    let small = write_chunks(&run, 10 * CHUNK - 5, &[(1, 1), (2, 2), (4, 4)]).await;
    run.commit(point(1), draft()).await.unwrap();
    let open = async |stored| Arc::new(repository.open_disk(stored).await.unwrap());
    let map = async |disk, base| {
        let changed = ChangedDisk::new(open(disk).await, open(base).await).unwrap();
        let mut found = Vec::new();
        let whole = changed.geometry().range();
        let mut at = 0;
        while at < whole.end() {
            let map = changed.extents(ByteRange::between(at, whole.end())).await.unwrap();
            assert_eq!(map.start(), at);
            found.extend(map.iter().map(|extent| (extent.range.end(), extent.kind)));
            at = map.end();
        }
        found
    };
    let end = large.size_bytes;
    assert_eq!(map(&large, &large).await, [(end, Unchanged)]);
    let grown = [
        (2 * CHUNK, Unchanged),
        (3 * CHUNK, Data),
        (4 * CHUNK, Unchanged),
        (5 * CHUNK, Zero),
        (10 * CHUNK - 5, Unchanged),
        (299 * CHUNK, Zero),
        (end, Data),
    ];
    assert_eq!(map(&large, &small).await, grown);
    let end = small.size_bytes;
    let shrunk = [
        (2 * CHUNK, Unchanged),
        (3 * CHUNK, Data),
        (4 * CHUNK, Unchanged),
        (5 * CHUNK, Data),
        (end, Unchanged),
    ];
    assert_eq!(map(&small, &large).await, shrunk);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_with_a_missing_chunk_does_not_finish() {
    let store = store();
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let writer = run.disk_writer(2 * CHUNK, None);
    writer.write(0, Buffer::unbudgeted(vec![1; CHUNK as usize])).await.unwrap();
    assert_eq!(writer.finish().await.unwrap_err().kind(), Kind::Internal);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_pack_is_an_error_that_names_pack_and_offset() {
    let store = store();
    let content = conformance::pattern(2 << 20);
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    let (stored, _) = write_all(&run, &content, CHUNK).await;
    run.commit(point(1), draft()).await.unwrap();
    let packs = objects(&store, Folder::Packs).await;
    let largest = packs.iter().max_by_key(|pack| pack.size_bytes).unwrap();
    store.delete(&largest.name).await.unwrap();
    let reader = repository.open_disk(&stored).await.unwrap();
    let error = reader.read(0, Buffer::unbudgeted(vec![0; 4096])).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    let shown = format!("{error:?}");
    assert!(shown.contains(largest.name.as_str()) && shown.contains("offset 0"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_run_leaves_no_point_and_no_index() {
    let store = store();
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    write_all(&run, &conformance::pattern(1 << 20), CHUNK).await;
    run.end().await.unwrap();
    for folder in [Folder::Points, Folder::Index, Folder::Packs] {
        assert!(objects(&store, folder).await.is_empty(), "{folder:?}");
    }
}

/// Who stops a backup does not wait for a store that hangs, and gives a flush up.
#[tokio::test]
async fn what_a_flush_that_is_given_up_waited_for_goes_on() {
    let store = store();
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    write_all(&run, &conformance::pattern(1 << 20), CHUNK).await;
    // On one thread the packs are written only while this waits.
    let mut given_up = Box::pin(run.flush());
    let waits = poll_fn(|context| Poll::Ready(given_up.as_mut().poll(context).is_pending()));
    assert!(waits.await);
    drop(given_up);
    assert!(objects(&store, Folder::Packs).await.is_empty());
    run.flush().await.unwrap();
    // One of chunks, and one of nodes.
    assert_eq!(objects(&store, Folder::Packs).await.len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_sequence_of_points_reads_back(
        steps in proptest::collection::vec(
            proptest::collection::vec((0_u8..3, 1_u8..4), 5), 1..4),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        runtime.block_on(async {
            let store = store();
            let repository = open(&store, CHUNK).await;
            let size = 5 * CHUNK as usize - 1000;
            let mut model = vec![0_u8; size];
            let mut base: Option<StoredDisk> = None;
            let mut points: Vec<(StoredDisk, Vec<u8>)> = Vec::new();
            for (number, step) in steps.iter().enumerate() {
                let run = repository.begin_run().await.unwrap();
                let writer = run.disk_writer(size as u64, base.as_ref());
                let range = ByteRange::new(0, size as u64);
                for (piece, (action, fill)) in range.pieces(CHUNK).zip(step) {
                    let span = piece.offset() as usize..piece.end() as usize;
                    match action {
                        0 if base.is_some() => writer.keep(piece).await.unwrap(),
                        1 => {
                            model[span].fill(0);
                            writer.zero(piece, ZeroMode::Sparse).await.unwrap();
                        }
                        _ => {
                            model[span.clone()].fill(*fill);
                            let buffer = Buffer::unbudgeted(model[span].to_vec());
                            writer.write(piece.offset(), buffer).await.unwrap();
                        }
                    }
                }
                let (stored, _) = writer.finish().await.unwrap();
                prop_assert_eq!(stored.root, root_of(&model));
                run.commit(point(number as u8), draft()).await.unwrap();
                base = Some(stored.clone());
                points.push((stored, model.clone()));
            }
            for (stored, content) in points {
                prop_assert!(repository.read_bytes(&stored).await.unwrap() == content);
            }
            Ok(())
        })?;
    }
}

/// A blob counts as known once a writer claimed it. When storing it failed, a second write of the
/// same content used to be told that it is known, and the commit made a point with a hole.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_lost_a_pack_never_commits_even_if_every_write_is_repeated() {
    let store = store();
    let content = conformance::pattern(8 << 20);
    let repository = open(&store, CHUNK).await;
    let run = repository.begin_run().await.unwrap();
    store.set_fault_hook(|op| matches!(op, Operation::Write(_)).then_some(Fault::Full));
    let writer = run.disk_writer(content.len() as u64, None);
    for (number, piece) in content.chunks(CHUNK as usize).enumerate() {
        let write = || writer.write(number as u64 * CHUNK, Buffer::unbudgeted(piece.to_vec()));
        // Told of the failure, some layer tries again.
        if write().await.is_err() {
            store.clear_fault_hook();
            write().await.unwrap();
        }
    }
    // Whether an error was seen yet or not: the point must not come into being.
    store.clear_fault_hook();
    writer.finish().await.unwrap();
    let error = run.commit(point(1), draft()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    assert!(objects(&store, Folder::Points).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_manifest_hides_its_own_point_only() {
    let store = store();
    let repository = open(&store, CHUNK).await;
    for number in 1..=3 {
        let run = repository.begin_run().await.unwrap();
        run.commit(point(number), draft()).await.unwrap();
    }
    let names = repository.point_names(None).await.unwrap();
    store.overwrite(&names[1].object(), vec![7; 500]);
    let listed = repository.manifests(None).await.unwrap();
    assert_eq!(listed.iter().map(|m| m.sequence).collect::<Vec<_>>(), [1, 3]);
    let error = repository.manifest(&names[1]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    let keys = &repository.blobs.keys;
    let error = points::manifests(&repository.blobs.store, keys, &names).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "the collector must know every point");
}

/// Whatever bit of a pack or an index segment flips: what reads is right, and what does not is told.
#[tokio::test(flavor = "multi_thread")]
async fn no_flipped_bit_is_ever_restored() {
    let content = conformance::pattern(3 << 19);
    for folder in [Folder::Packs, Folder::Index] {
        for seed in 0..24_usize {
            let store = store();
            let repository = open(&store, CHUNK).await;
            let run = repository.begin_run().await.unwrap();
            let (stored, _) = write_all(&run, &content, CHUNK).await;
            run.commit(point(1), draft()).await.unwrap();
            let all = objects(&store, folder).await;
            let name = &all[seed % all.len()].name;
            let whole = super::store::ReadRange::Whole { bytes_max: 1 << 30 };
            let mut bytes = store.read(name, whole).await.unwrap();
            // The ends hold headers and trailers: look there more often.
            let at = if seed % 3 == 0 { seed * 2 } else { seed * 131_071 } % bytes.len();
            bytes[at] ^= 1 << (seed % 8);
            store.overwrite(name, bytes);
            let read = async {
                let options = Workers::new(1)?;
                let store = Arc::clone(&store) as Arc<dyn ObjectStore>;
                let reopened = Repository::open(store, &Credentials::None, options).await?;
                reopened.read_bytes(&stored).await
            };
            match read.await {
                Ok(bytes) => assert!(bytes == content, "{name} at {at}: wrong bytes were restored"),
                Err(error) => assert_eq!(error.kind(), Kind::Corrupt, "{name} at {at}: {error:?}"),
            }
        }
    }
}
