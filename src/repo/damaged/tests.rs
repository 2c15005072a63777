//! Damage heals: a backup that met rotten content once relied on it, and so on for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::block::{BlockSource, Buffer};
use crate::content::LEAF_BYTES;
use crate::control::Control;
use crate::repo::gc::tests::{
    Bed, MINUTE, add_point, assert_holds, chunk, collect, draft, point, read_directly, write,
};
use crate::repo::store::ReadRange;
use crate::repo::store::memory::{Fault, Operation};
use crate::repo::{CheckOptions, CheckReport, Depth, Repair, Repository, StoredDisk};

const DATA: CheckOptions = CheckOptions { depth: Depth::Data, repair: Repair::Nothing };
const STRUCTURE: CheckOptions = CheckOptions { depth: Depth::Structure, repair: Repair::Nothing };

pub(in crate::repo) async fn check(bed: &Bed, options: CheckOptions) -> CheckReport {
    bed.open().await.check(options, &Control::new()).await.unwrap()
}

pub(in crate::repo) async fn bytes(bed: &Bed, name: &ObjectName) -> Vec<u8> {
    bed.store.read(name, ReadRange::Whole { bytes_max: 1 << 30 }).await.unwrap()
}

/// The packs of chunks (2) or of tree nodes (3).
pub(in crate::repo) async fn packs(bed: &Bed, type_byte: u8) -> Vec<ObjectName> {
    let mut found = Vec::new();
    for name in bed.store.names() {
        if name.as_str().starts_with("packs/") && bytes(bed, &name).await[6] == type_byte {
            found.push(name);
        }
    }
    found
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::repo) enum Harm {
    Rot,
    Cut,
    Remove,
}

pub(in crate::repo) async fn harm(bed: &Bed, pack: &ObjectName, harm: Harm) {
    let mut whole = bytes(bed, pack).await;
    match harm {
        Harm::Remove => return bed.store.delete(pack).await.unwrap(),
        Harm::Cut => whole.truncate(60),
        Harm::Rot => whole[50] ^= 1,
    }
    let stored = bed.store.stat(pack).await.unwrap().stored;
    bed.store.overwrite(pack, whole);
    assert!(bed.store.stat(pack).await.unwrap().stored >= stored);
}

/// Both ways to read it come to the same.
async fn restores(repository: &Repository, stored: &StoredDisk) -> Result<Vec<u8>> {
    let bytes = repository.read_bytes(stored).await;
    let directly = read_directly(repository, stored).await;
    let (bytes_or_kind, directly) =
        (bytes.as_ref().map_err(Error::kind), directly.as_ref().map_err(Error::kind));
    assert!(bytes_or_kind == directly, "{bytes_or_kind:?} {directly:?}");
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_backup_heals_the_points_that_damage_affected() {
    let contents = [1, 2, 3, 4, 5, 6];
    for type_byte in [2, 3] {
        for kind in [Harm::Rot, Harm::Cut, Harm::Remove] {
            let bed = Bed::new().await;
            let old = add_point(&bed.open().await, 1, &contents).await;
            let pack = packs(&bed, type_byte).await.remove(0);
            harm(&bed, &pack, kind).await;
            let told = format!("{kind:?} of type {type_byte}");

            let error = restores(&bed.open().await, &old).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{told}: {error:?}");
            let report = check(&bed, DATA).await;
            assert_eq!(report.affected.len(), 1, "{told}: {report:?}");
            assert_eq!(report.affected[0].point, point(1), "{told}");
            let named: Vec<_> = report.damages.iter().map(|damage| &damage.object).collect();
            assert_eq!(named, [pack.as_str()], "{told}: {report:?}");
            // What is missing every run sees for itself.
            assert_eq!(bed.count(Folder::Damaged), usize::from(kind != Harm::Remove), "{told}");

            bed.pass(MINUTE);
            let new = add_point(&bed.open().await, 2, &contents).await;
            for stored in [&old, &new] {
                assert_holds(&bed.open().await, stored, &contents).await;
            }
            for options in [STRUCTURE, DATA] {
                let report = check(&bed, options).await;
                assert!(report.affected.is_empty(), "{told}: {report:?}");
            }
            bed.pass(MINUTE);
            collect(&bed.open().await).await;
            assert!(bed.store.stat(&pack).await.is_err(), "{told}: the damaged pack is gone");
            assert_eq!(bed.count(Folder::Damaged), 0, "{told}: so is its record");
            assert!(check(&bed, DATA).await.is_fine(), "{told}");
            for stored in [&old, &new] {
                assert_holds(&bed.open().await, stored, &contents).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_off_or_missing_pack_heals_though_nobody_looked() {
    for kind in [Harm::Cut, Harm::Remove] {
        let bed = Bed::new().await;
        let stale = bed.open().await;
        let old = add_point(&stale, 1, &[1, 2, 3]).await;
        harm(&bed, &packs(&bed, 2).await.remove(0), kind).await;
        let new = add_point(&stale, 2, &[1, 2, 3]).await;
        for stored in [&old, &new] {
            assert_holds(&bed.open().await, stored, &[1, 2, 3]).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_that_touches_the_damaged_chunk_heals_it() {
    let bed = Bed::new().await;
    let old = add_point(&bed.open().await, 1, &[1, 2, 3]).await;
    harm(&bed, &packs(&bed, 2).await.remove(0), Harm::Rot).await;
    check(&bed, DATA).await;
    let repository = bed.open().await;
    let run = repository.begin_run().await.unwrap();
    // The chunk is written again with the content it had, the others are kept.
    let new = write(&run, &[1, 2, 3], Some(&(old.clone(), vec![9, 2, 3]))).await;
    run.commit(point(2), draft(&new, Some(point(1)))).await.unwrap();
    for stored in [&old, &new] {
        assert_holds(&bed.open().await, stored, &[1, 2, 3]).await;
    }
}

/// Every incremental once walked the trees of its bases while the snapshot was open.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_of_a_base_is_known_from_the_second_question_on() {
    let bed = Bed::new().await;
    let old = add_point(&bed.open().await, 1, &[1, 2, 3]).await;
    let sound = bed.open().await.begin_run().await.unwrap();
    harm(&bed, &packs(&bed, 2).await.remove(0), Harm::Rot).await;
    check(&bed, DATA).await;
    let run = bed.open().await.begin_run().await.unwrap();
    let control = Control::new();
    let damage = run.base_damage().await.unwrap();
    let ranges = damage.of(&old, &control).await.unwrap();
    assert!(!ranges.is_empty());
    let asked = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&asked);
    bed.store.set_fault_hook(move |_| {
        flag.store(true, Ordering::SeqCst);
        None
    });
    assert_eq!(damage.of(&old, &control).await.unwrap(), ranges);
    assert!(!asked.load(Ordering::SeqCst), "the store was asked again");
    // A run that began before nobody met the damage walks nothing at all.
    let damage = sound.base_damage().await.unwrap();
    assert!(asked.swap(false, Ordering::SeqCst), "which packs there are");
    assert_eq!(damage.of(&old, &control).await.unwrap(), []);
    assert!(!asked.load(Ordering::SeqCst));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_store_is_no_damage_and_is_not_recorded() {
    let bed = Bed::new().await;
    let stored = add_point(&bed.open().await, 1, &[1, 2, 3]).await;
    let data = packs(&bed, 2).await.remove(0);
    let name = data.clone();
    bed.store.set_fault_hook(move |call| {
        matches!(call, Operation::Read(read) if *read == name).then_some(Fault::Fail)
    });
    let error = restores(&bed.open().await, &stored).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Io, "{error:?}");
    let report = check(&bed, DATA).await;
    assert!(report.damages.is_empty() && !report.is_fine(), "{report:?}");
    assert_eq!(report.unreadable[0].object, data.as_str());
    assert_eq!(bed.count(Folder::Damaged), 0);
    bed.store.clear_fault_hook();
    assert!(check(&bed, DATA).await.is_fine());
    assert_holds(&bed.open().await, &stored, &[1, 2, 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_was_open_before_finds_the_sound_copy() {
    let bed = Bed::new().await;
    let old = add_point(&bed.open().await, 1, &[1, 2, 3]).await;
    let stale = bed.open().await;
    let reader = stale.open_disk(&old).await.unwrap();
    harm(&bed, &packs(&bed, 2).await.remove(0), Harm::Rot).await;
    check(&bed, DATA).await;
    add_point(&bed.open().await, 2, &[1, 2, 3]).await;
    let buffer = Buffer::unbudgeted(vec![0; usize::try_from(LEAF_BYTES).unwrap()]);
    assert!(reader.read(0, buffer).await.unwrap()[..] == chunk(1)[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_still_readable_of_a_damaged_pack_is_kept() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let old = add_point(&repository, 1, &[1, 2, 3, 4, 5, 6]).await;
    let pack = packs(&bed, 2).await.remove(0);
    harm(&bed, &pack, Harm::Rot).await;
    check(&bed, DATA).await;
    // Another disk, which shares two chunks of six: those are stored anew, the rest has no copy.
    bed.pass(MINUTE);
    let new = add_point(&bed.open().await, 2, &[2, 3, 7]).await;
    for _ in 0..2 {
        bed.pass(MINUTE);
        collect(&bed.open().await).await;
        bed.store.stat(&pack).await.unwrap();
        assert_eq!(bed.count(Folder::Damaged), 1);
    }
    assert_holds(&bed.open().await, &new, &[2, 3, 7]).await;
    let repository = bed.open().await;
    let reader = repository.open_disk(&old).await.unwrap();
    for content in [2_u8, 3, 4, 5, 6] {
        let buffer = Buffer::unbudgeted(vec![0; usize::try_from(LEAF_BYTES).unwrap()]);
        let read = reader.read((u64::from(content) - 1) * LEAF_BYTES, buffer).await.unwrap();
        assert!(read[..] == chunk(content)[..]);
    }
    let report = check(&bed, STRUCTURE).await;
    assert_eq!(report.affected.len(), 1, "records tell without reading all: {report:?}");
    assert_eq!(report.affected[0].ranges[0].bytes, LEAF_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_collector_that_finds_damage_itself_goes_round_it() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let first = [1, 2, 3, 4, 5, 6];
    add_point(&repository, 1, &first).await;
    bed.pass(MINUTE);
    let kept = add_point(&repository, 2, &[1, 2, 7, 8]).await;
    let mut both = Vec::new();
    for pack in packs(&bed, 2).await {
        both.push((bed.store.stat(&pack).await.unwrap().stored, pack));
    }
    both.sort();
    harm(&bed, &both[0].1, Harm::Rot).await;
    repository.forget(point(1)).await.unwrap();
    bed.pass(MINUTE);
    // It would be repacked: most of it is dead.
    let report = collect(&bed.open().await).await;
    assert_eq!((report.points, report.bytes_repacked), (1, 0), "{report:?}");
    assert_eq!(bed.count(Folder::Damaged), 1);
    let reader = bed.open().await.open_disk(&kept).await.unwrap();
    let buffer = Buffer::unbudgeted(vec![0; usize::try_from(3 * LEAF_BYTES).unwrap()]);
    let read = reader.read(LEAF_BYTES, buffer).await.unwrap();
    assert!(read[..] == [chunk(2), chunk(7), chunk(8)].concat()[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_copies_the_collector_keeps_the_sound_one_whichever_it_met_first() {
    // Each round the damaged copy is another one; which is met first is up to random ids.
    for round in 0..6 {
        let bed = Bed::new().await;
        let (one, other) = (bed.open().await, bed.open().await);
        let a = one.begin_run().await.unwrap();
        let b = other.begin_run().await.unwrap();
        let contents = [1, 2, 3];
        let stored = write(&a, &contents, None).await;
        write(&b, &contents, None).await;
        a.commit(point(1), draft(&stored, None)).await.unwrap();
        b.commit(point(2), draft(&stored, None)).await.unwrap();
        // Of each type there are two packs now; nobody knows of the damage.
        let nodes = packs(&bed, 3).await;
        assert_eq!(nodes.len(), 2);
        harm(&bed, &nodes[round % 2], Harm::Rot).await;
        bed.pass(MINUTE);
        for _ in 0..2 {
            collect(&bed.open().await).await;
            bed.pass(MINUTE);
            assert_holds(&bed.open().await, &stored, &contents).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_and_a_collector_beside_each_other_heal_and_lose_nothing() {
    let bed = Bed::new().await;
    let contents = [1, 2, 3, 4, 5, 6];
    let old = add_point(&bed.open().await, 1, &contents).await;
    harm(&bed, &packs(&bed, 2).await.remove(0), Harm::Rot).await;
    check(&bed, DATA).await;
    bed.pass(MINUTE);
    let (one, other, collector) = (bed.open().await, bed.open().await, bed.open().await);
    let a = one.begin_run().await.unwrap();
    let b = other.begin_run().await.unwrap();
    let (first, second) = tokio::join!(write(&a, &contents, None), write(&b, &contents, None));
    collect(&collector).await;
    a.commit(point(2), draft(&first, None)).await.unwrap();
    collect(&collector).await;
    b.commit(point(3), draft(&second, None)).await.unwrap();
    for _ in 0..3 {
        bed.pass(MINUTE);
        collect(&collector).await;
        for stored in [&old, &first, &second] {
            assert_holds(&bed.open().await, stored, &contents).await;
        }
    }
    assert_eq!(bed.count(Folder::Damaged), 0);
    assert!(check(&bed, DATA).await.is_fine());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_takes_no_record_fails_no_reader_but_every_run() {
    let bed = Bed::new().await;
    let old = add_point(&bed.open().await, 1, &[1, 2, 3]).await;
    harm(&bed, &packs(&bed, 2).await.remove(0), Harm::Rot).await;
    let refused = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&refused);
    bed.store.set_fault_hook(move |call| match call {
        Operation::Create(name) if name.as_str().starts_with("damaged/") => {
            seen.store(true, Ordering::Relaxed);
            Some(Fault::Fail)
        }
        _ => None,
    });
    let repository = bed.open().await;
    let error = restores(&repository, &old).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
    assert!(refused.load(Ordering::Relaxed));
    // A collector that knows of no damage might keep the damaged copy of the two.
    let run = repository.begin_run().await.unwrap();
    let stored = write(&run, &[1, 2, 3], None).await;
    let refused = run.commit(point(2), draft(&stored, None)).await.unwrap_err();
    assert!(format!("{refused:?}").contains("cannot record that"), "{refused:?}");

    bed.store.clear_fault_hook();
    add_point(&repository, 3, &[1, 2, 3]).await;
    assert_eq!(bed.count(Folder::Damaged), 1);
    assert_holds(&bed.open().await, &old, &[1, 2, 3]).await;
}
