//! The collector where room is short: it gets everything done in rounds, or takes nothing.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::tests::{Bed, MINUTE, add_point, assert_holds, chunk, draft, point};
use super::*;
use crate::block::{BlockSink, Buffer};
use crate::content::LEAF_BYTES;
use crate::control::NoticeLevel;
use crate::repo::store::memory::{Fault, Operation};
use crate::repo::{Repository, Run, StoredDisk};

/// Pairs of a point that goes and one that stays, which needs a part of the other's pack.
const PAIRS: u8 = 12;

const MIB: u64 = 1 << 20;

/// Each pack has ten chunks, of which the point that stays needs four.
async fn mostly_garbage(bed: &Bed) -> (Repository, Vec<(StoredDisk, Vec<u8>)>) {
    let repository = bed.open().await;
    let mut kept = Vec::new();
    for pair in 0..PAIRS {
        let all: Vec<u8> = (1..=10).map(|n| pair * 10 + n).collect();
        add_point(&repository, 100 + pair, &all).await;
        bed.pass(MINUTE);
        // Of another size, so that its tree is its own.
        let some = all[..4].to_vec();
        kept.push((add_point(&repository, pair, &some).await, some));
        bed.pass(MINUTE);
    }
    for pair in 0..PAIRS {
        repository.forget(point(100 + pair)).await.unwrap();
    }
    bed.pass(MINUTE);
    (repository, kept)
}

async fn assert_all_hold(repository: &Repository, kept: &[(StoredDisk, Vec<u8>)]) {
    for (stored, contents) in kept {
        assert_holds(repository, stored, contents).await;
    }
}

async fn collect_small(repository: &Repository, control: &Control) -> CollectReport {
    let options = CollectOptions { pack_bytes: 2 * MIB, ..CollectOptions::default() };
    repository.collect(options, control).await.unwrap()
}

/// What a collection said at a level.
fn said(control: &Control, level: NoticeLevel) -> String {
    let notices = control.notices_from(0).into_iter().filter(|notice| notice.level == level);
    notices.map(|notice| notice.text).collect::<Vec<_>>().join("\n")
}

fn is_in(name: &ObjectName, folder: Folder) -> bool {
    name.as_str().starts_with(folder.prefix())
}

/// How many packs no segment names.
async fn unindexed(bed: &Bed) -> usize {
    let segments = bed.open().await.blobs.index.segments();
    let known: HashSet<ObjectName> = segments
        .iter()
        .flat_map(|segment| segment.packs().iter().map(|pack| pack.name()))
        .collect();
    let names = bed.store.names();
    names.iter().filter(|name| is_in(name, Folder::Packs) && !known.contains(name)).count()
}

/// Counts the packs that are begun.
fn count_packs(bed: &Bed) -> Arc<AtomicUsize> {
    let packs = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&packs);
    bed.store.set_fault_hook(move |operation| {
        let is_pack = matches!(operation, Operation::Create(name) if is_in(name, Folder::Packs));
        seen.fetch_add(usize::from(is_pack), Ordering::Relaxed);
        None
    });
    packs
}

const ALL_THAT_MOVES: u64 = PAIRS as u64 * 4 * LEAF_BYTES;

/// What all that stays takes, as one can tell where there is room.
async fn bytes_when_collected() -> u64 {
    let bed = Bed::new().await;
    let (repository, _) = mostly_garbage(&bed).await;
    collect_small(&repository, &Control::new()).await;
    bed.store.used_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_converges_with_room_for_a_few_packs_and_less() {
    let least = bytes_when_collected().await;
    let mut begun = Vec::new();
    // What is held while something moves, and beside it: more than two packs, one, a part of one.
    for free in [6 * MIB, 4 * MIB, 5 * MIB / 2, 5 * MIB / 2, 5 * MIB / 2] {
        let bed = Bed::new().await;
        let (repository, kept) = mostly_garbage(&bed).await;
        let before = bed.store.used_bytes();
        bed.store.set_capacity(before + free);
        let packs = count_packs(&bed);
        let control = Control::new();
        let report = collect_small(&repository, &control).await;
        begun.push(packs.load(Ordering::Relaxed));
        bed.store.clear_fault_hook();
        let rounds = said(&control, NoticeLevel::Info);
        assert!(rounds.contains("the collection goes on"), "{rounds}");
        let after = bed.store.used_bytes();
        assert!(after < least + 64 * 1024, "{free}: {before} to {after}, not {least}: {report:?}");
        assert_eq!(report.forgotten, usize::from(PAIRS), "{report:?}");
        assert!(report.bytes_repacked >= ALL_THAT_MOVES, "{report:?}");
        assert_eq!((report.packs_waiting, bed.count(Folder::Condemned)), (0, 0));
        let fresh = bed.open().await;
        assert_all_hold(&fresh, &kept).await;
        bed.pass(MINUTE);
        let again = collect_small(&repository, &Control::new()).await;
        assert_eq!((again.packs_deleted, again.bytes_repacked), (0, 0), "{again:?}");
    }
    // A round begins with what there is room for, not with more each time. How many packs are open when
    // the room ends is a matter of time: now and then it is two more.
    begun[2..].sort_unstable();
    assert!(begun[3] <= usize::from(PAIRS) + 3, "{begun:?} packs begun");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_that_has_to_wait_gives_back_the_room_it_tried_to_use() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    let run = bed.open().await.begin_run().await.unwrap();
    bed.pass(MINUTE);
    let before = bed.store.used_bytes();
    // It does not know before it runs into it.
    bed.store.set_quota(before + 2 * MIB + MIB / 2);
    let control = Control::new();
    for _ in 0..3 {
        let report = collect_small(&repository, &control).await;
        assert_eq!((report.packs_deleted, report.bytes_repacked), (0, 0), "{report:?}");
        bed.pass(MINUTE);
    }
    let after = bed.store.used_bytes();
    assert!(after < before + 64 * 1024, "{before} to {after}");
    run.end().await.unwrap();
    bed.pass(MINUTE);
    let report = collect_small(&repository, &control).await;
    assert!(bed.store.used_bytes() < before / 2, "{report:?}");
    assert_all_hold(&repository, &kept).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_without_room_to_move_anything_frees_what_is_dead_and_says_so() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    let before = bed.store.used_bytes();
    bed.store.set_capacity(before + 200 * 1024);
    let control = Control::new();
    let report = collect_small(&repository, &control).await;
    // The trees of what was forgotten.
    assert!(report.packs_deleted > 0 && bed.store.used_bytes() < before, "{report:?}");
    assert_eq!(report.bytes_repacked, 0, "{report:?}");
    let said = said(&control, NoticeLevel::Warning);
    assert!(said.contains("no room in memory") && said.contains("make a little room"), "{said}");
    assert_all_hold(&repository, &kept).await;
}

/// The collector wrote into the last byte beside a backup, which failed for want of it, only to
/// find out that not all fitted; nothing of it would have been freed before the backup was over.
#[tokio::test(flavor = "multi_thread")]
async fn beside_others_nothing_is_moved_unless_much_more_room_stays_for_them() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    // What is wholly dead goes now: no list is pending later.
    let only_dead = CollectOptions { repack_dead_percent: 100, ..CollectOptions::default() };
    assert!(repository.collect(only_dead, &Control::new()).await.unwrap().packs_deleted > 0);
    let run = bed.open().await.begin_run().await.unwrap();
    bed.pass(MINUTE);
    let packs = count_packs(&bed);
    // All of it would fit, and twice; but the others need room, too.
    bed.store.set_capacity(bed.store.used_bytes() + 64 * MIB);
    let control = Control::new();
    let report = collect_small(&repository, &control).await;
    assert_eq!((report.bytes_repacked, packs.load(Ordering::Relaxed)), (0, 0), "{report:?}");
    assert!(report.waiting_for.is_empty(), "{report:?}");
    let said = said(&control, NoticeLevel::Warning);
    assert!(said.contains("once the runs that are at work are over"), "{said}");
    bed.store.set_capacity(bed.store.used_bytes() + 1024 * MIB);
    let report = collect_small(&repository, &Control::new()).await;
    assert!(report.bytes_repacked >= ALL_THAT_MOVES, "{report:?}");
    run.end().await.unwrap();
    assert_all_hold(&repository, &kept).await;
}

/// What was moved stayed in packs that no index named, too young to be deleted by the collection
/// that had made them.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_moved_is_taken_back_when_others_take_the_room_for_its_index() {
    let least = bytes_when_collected().await;
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    let segments = AtomicUsize::new(0);
    // Even a renewal of the lease has no room then.
    bed.store.set_fault_hook(move |operation| match operation {
        Operation::Finish(name) if is_in(name, Folder::Index) => {
            (segments.fetch_add(1, Ordering::Relaxed) == 0).then_some(Fault::Full)
        }
        Operation::Create(name) if is_in(name, Folder::Runs) => {
            (segments.load(Ordering::Relaxed) == 1).then_some(Fault::Full)
        }
        _ => None,
    });
    let report = collect_small(&repository, &Control::new()).await;
    assert!(report.bytes_repacked >= ALL_THAT_MOVES, "{report:?}");
    assert_eq!(unindexed(&bed).await, 0, "{report:?}");
    let after = bed.store.used_bytes();
    assert!(after < least + 64 * 1024, "{after}, not {least}");
    assert_all_hold(&repository, &kept).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_round_without_repacking_freed_is_used_to_repack_again() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    // There is no room for the first segment, and whether it is there is not known.
    let (finished, asked) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let first = |count: &AtomicUsize| count.fetch_add(1, Ordering::Relaxed) == 0;
    bed.store.set_fault_hook(move |operation| match operation {
        Operation::Finish(name) if is_in(name, Folder::Index) => {
            first(&finished).then_some(Fault::Full)
        }
        Operation::Stat(name) if is_in(name, Folder::Index) => first(&asked).then_some(Fault::Fail),
        _ => None,
    });
    let report = collect_small(&repository, &Control::new()).await;
    // What others may know of stays.
    assert!(unindexed(&bed).await > 0, "{report:?}");
    assert!(report.bytes_repacked >= ALL_THAT_MOVES, "{report:?}");
    assert_all_hold(&repository, &kept).await;
}

/// Chunks `numbers` of a disk; each takes little, because it is nearly empty.
async fn write_sparse(run: &Run, numbers: std::ops::Range<u32>) -> StoredDisk {
    let writer = run.disk_writer(u64::from(numbers.end - numbers.start) * LEAF_BYTES, None);
    for (at, number) in (0..).zip(numbers) {
        let mut bytes = chunk(0);
        bytes[..4].copy_from_slice(&(number + 1).to_le_bytes());
        writer.write(at * LEAF_BYTES, Buffer::unbudgeted(bytes)).await.unwrap();
    }
    writer.finish().await.unwrap().0
}

/// A backup that began while hours' worth of packs moved was not heeded, and found the store full.
#[tokio::test(flavor = "multi_thread")]
async fn who_begins_while_something_moves_keeps_the_room_that_is_left() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    let capacity = bed.store.used_bytes() + 64 * MIB;
    bed.store.set_capacity(capacity);
    let (store, begun) = (Arc::clone(&bed.store), AtomicUsize::new(0));
    bed.store.set_fault_hook(move |operation| {
        let is_pack = matches!(operation, Operation::Create(name) if is_in(name, Folder::Packs));
        if is_pack && begun.fetch_add(1, Ordering::Relaxed) == 1 {
            let run = format!("backup-{}/00000000", "5".repeat(32));
            store.overwrite(&ObjectName::new(Folder::Runs, &run), Vec::new());
        }
        None
    });
    let control = Control::new();
    let report = collect_small(&repository, &control).await;
    // What moves before it is asked again, and a pack more.
    let moved = 4 * 2 * MIB..ALL_THAT_MOVES;
    assert!(moved.contains(&report.bytes_repacked), "{report:?}");
    let said = said(&control, NoticeLevel::Warning);
    assert!(said.contains("once the runs that are at work are over"), "{said}");
    assert_all_hold(&repository, &kept).await;
    // It is over.
    bed.store.clear_fault_hook();
    bed.pass(crate::repo::run::LEASE + MINUTE);
    let report = collect_small(&repository, &Control::new()).await;
    assert!(report.bytes_repacked > 0 && report.packs_waiting == 0, "{report:?}");
}

/// Batches of less than it takes to ask again: nobody was asked for while such a round lasted.
#[tokio::test(flavor = "multi_thread")]
async fn who_begins_between_small_batches_is_heeded_too() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    let (store, begun) = (Arc::clone(&bed.store), AtomicUsize::new(0));
    bed.store.set_fault_hook(move |operation| {
        let is_pack = matches!(operation, Operation::Create(name) if is_in(name, Folder::Packs));
        match if is_pack { begun.fetch_add(1, Ordering::Relaxed) } else { 0 } {
            // What fitted until then is as much as is tried from now on.
            1 => Some(Fault::Full),
            // Before half of it can have moved, however much the attempt that failed had copied.
            2 => {
                let run = format!("backup-{}/00000000", "5".repeat(32));
                store.overwrite(&ObjectName::new(Folder::Runs, &run), Vec::new());
                // They need it.
                store.set_capacity(store.used_bytes() + 16 * MIB);
                None
            }
            _ => None,
        }
    });
    let control = Control::new();
    let report = collect_small(&repository, &control).await;
    assert!((MIB..ALL_THAT_MOVES).contains(&report.bytes_repacked), "{report:?}");
    let said = said(&control, NoticeLevel::Warning);
    assert!(said.contains("once the runs that are at work are over"), "{said}");
    assert_all_hold(&repository, &kept).await;
}

/// The question took room while all there was was held: the round ended there, and all began anew.
#[tokio::test(flavor = "multi_thread")]
async fn others_are_asked_for_where_all_room_is_held() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    let (store, refused) = (Arc::clone(&bed.store), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&refused);
    bed.store.set_fault_hook(move |operation| {
        let is_refused = matches!(operation, Operation::Now) && store.unfinished_bytes() > 0;
        seen.fetch_add(usize::from(is_refused), Ordering::Relaxed);
        is_refused.then_some(Fault::Full)
    });
    let control = Control::new();
    let report = collect_small(&repository, &control).await;
    assert!(refused.load(Ordering::Relaxed) > 0, "nobody asked in the middle of a batch");
    // All in the first round.
    assert!(report.bytes_repacked >= ALL_THAT_MOVES, "{report:?}");
    assert_eq!(said(&control, NoticeLevel::Info), "", "{report:?}");
    assert_all_hold(&repository, &kept).await;
}

/// The trees that have to move are larger than the room; what is left of a data pack is not, and
/// makes room for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_type_of_pack_that_does_not_fit_keeps_none_of_the_other_from_moving() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    // A pack of 72 KiB of nodes that are needed and 56 KiB that no point has.
    let run = repository.begin_run().await.unwrap();
    let trees = write_sparse(&run, 0..9 * 256).await;
    write_sparse(&run, 10_000..10_000 + 7 * 256).await;
    run.commit(point(1), draft(&trees, None)).await.unwrap();
    bed.pass(MINUTE);
    // A pack of ten chunks that no point has, and a small one.
    let run = repository.begin_run().await.unwrap();
    let small = write_sparse(&run, 20_000..20_001).await;
    super::tests::write(&run, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], None).await;
    run.commit(point(2), draft(&small, None)).await.unwrap();
    bed.pass(MINUTE);
    let before = bed.store.used_bytes();
    // For the index, held meanwhile, and a little beside it.
    let index_bytes = room::room_to_free(16 * 256 + 11);
    bed.store.set_capacity(before + index_bytes + 48 * 1024);
    let control = Control::new();
    let report = collect_small(&repository, &control).await;
    assert!(report.bytes_freed > 10 * LEAF_BYTES, "{report:?}");
    assert!(report.bytes_repacked > 72 * 1024, "{report:?}");
    let warnings = said(&control, NoticeLevel::Warning);
    assert!(warnings.is_empty(), "{warnings}");
    assert!(!said(&control, NoticeLevel::Info).is_empty(), "the trees had no room at first");
}

/// Segments that were replaced and what killed runs left stayed, night after night, because there
/// was no room to write the index anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_collection_that_fails_for_want_of_room_removes_what_needs_none_to_go() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    let packs_stay = |operation: &Operation| {
        let is_pack = matches!(operation, Operation::Delete(name) if is_in(name, Folder::Packs));
        is_pack.then_some(Fault::Fail)
    };
    bed.store.set_fault_hook(packs_stay);
    let options = CollectOptions { pack_bytes: 2 * MIB, ..CollectOptions::default() };
    repository.collect(options, &Control::new()).await.unwrap_err();
    bed.store.clear_fault_hook();
    drop(bed.open().await.begin_run().await.unwrap());
    bed.pass(crate::repo::run::LEASE + MINUTE);
    repository.forget(point(0)).await.unwrap();
    bed.pass(MINUTE);
    let (segments, runs) = (bed.count(Folder::Index), bed.count(Folder::Runs));
    bed.store.set_fault_hook(|operation| {
        let is_index = matches!(operation, Operation::Create(name) if is_in(name, Folder::Index));
        is_index.then_some(Fault::Full)
    });
    let error = repository.collect(options, &Control::new()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    assert!(segments > 10 && bed.count(Folder::Index) < 4, "{segments}");
    assert!(bed.count(Folder::Runs) < runs / 4, "{runs}");
    bed.store.clear_fault_hook();
    assert_all_hold(&repository, &kept[1..]).await;
}
