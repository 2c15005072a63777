//! The collector where room is short: it gets everything done in rounds, or takes nothing.

use super::tests::{Bed, MINUTE, add_point, assert_holds, point};
use super::*;
use crate::content::LEAF_BYTES;
use crate::control::Notice;
use crate::repo::{Repository, RunOptions, StoredDisk};

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

async fn collect_small(repository: &Repository, control: &Control) -> CollectReport {
    let options = CollectOptions { pack_bytes: 2 * MIB, ..CollectOptions::default() };
    repository.collect(options, control).await.unwrap()
}

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
    // What is held while something moves, and beside it: more than two packs, one, a part of one.
    for free in [6 * MIB, 4 * MIB, 5 * MIB / 2] {
        let bed = Bed::new().await;
        let (repository, kept) = mostly_garbage(&bed).await;
        let before = bed.store.used_bytes();
        bed.store.set_capacity(before + free);
        let report = collect_small(&repository, &Control::new()).await;
        let after = bed.store.used_bytes();
        assert!(after < least + 64 * 1024, "{free}: {before} to {after}, not {least}: {report:?}");
        assert_eq!(report.forgotten, usize::from(PAIRS), "{report:?}");
        assert!(report.bytes_repacked >= u64::from(PAIRS) * 4 * LEAF_BYTES, "{report:?}");
        assert_eq!((report.packs_waiting, bed.count(Folder::Condemned)), (0, 0));
        let fresh = bed.open().await;
        for (stored, contents) in &kept {
            assert_holds(&fresh, stored, contents).await;
        }
        bed.pass(MINUTE);
        let again = collect_small(&repository, &Control::new()).await;
        assert_eq!((again.packs_deleted, again.bytes_repacked), (0, 0), "{again:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_that_has_to_wait_gives_back_the_room_it_tried_to_use() {
    let bed = Bed::new().await;
    let (repository, kept) = mostly_garbage(&bed).await;
    let run = bed.open().await.begin_run(RunOptions::default()).await.unwrap();
    bed.pass(MINUTE);
    let before = bed.store.used_bytes();
    bed.store.set_capacity(before + 2 * MIB + MIB / 2);
    let control = Control::new();
    for _ in 0..3 {
        let report = collect_small(&repository, &control).await;
        assert_eq!((report.packs_deleted, report.bytes_repacked), (0, 0), "{report:?}");
        bed.pass(MINUTE);
    }
    let after = bed.store.used_bytes();
    assert!(after < before + 64 * 1024, "{before} to {after}");
    run.abort().await.unwrap();
    bed.pass(MINUTE);
    let report = collect_small(&repository, &control).await;
    assert!(bed.store.used_bytes() < before / 2, "{report:?}");
    for (stored, contents) in &kept {
        assert_holds(&repository, stored, contents).await;
    }
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
    let said: Vec<Notice> = control.notices_from(0);
    assert!(said.iter().any(|notice| notice.text.contains("make a little room")), "{said:?}");
    for (stored, contents) in &kept {
        assert_holds(&repository, stored, contents).await;
    }
}
