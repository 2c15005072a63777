//! What a salvage calls lost is lost, all of it and nothing else.

use std::time::Duration;

use super::*;
use crate::block::{BlockSink, BlockSource, Buffer, ZeroMode};
use crate::content::LEAF_BYTES;
use crate::control::Control;
use crate::repo::damaged::tests::{Harm, bytes, harm, packs};
use crate::repo::gc::tests::{Bed, MINUTE, add_point, chunk, draft, point, write};
use crate::repo::run::LEASE_OF_WRITER;
use crate::repo::store::ObjectStore;
use crate::repo::store::memory::{Fault, Operation};
use crate::repo::{CheckOptions, Depth, Repair, Repository, StoredDisk};

/// All of a disk as a copy reads it: what its extents call zero is not read.
async fn salvage(repository: &Repository, stored: &StoredDisk) -> Result<(Vec<u8>, Vec<Loss>)> {
    let (reader, losses) = repository.open_disk_salvaging(stored).await?;
    let mut content = Vec::new();
    while (content.len() as u64) < stored.size_bytes {
        let at = content.len() as u64;
        let map = reader.extents(ByteRange::between(at, stored.size_bytes)).await?;
        for extent in map.iter() {
            for piece in extent.range.pieces(LEAF_BYTES) {
                let len = usize::try_from(piece.len()).unwrap();
                if extent.kind == crate::block::ExtentKind::Zero {
                    content.resize(content.len() + len, 0);
                } else {
                    let buffer = Buffer::unbudgeted(vec![0xee; len]);
                    content.extend_from_slice(&reader.read(piece.offset(), buffer).await?);
                }
            }
        }
    }
    Ok((content, losses.take()))
}

/// The content is what it should be, but for what is lost, which is zero.
fn assert_only_lost(content: &[u8], losses: &[Loss], expected: &[u8]) {
    let mut wanted = expected.to_vec();
    for loss in losses {
        let at = |n: u64| usize::try_from(n).unwrap();
        wanted[at(loss.range.offset())..at(loss.range.end())].fill(0);
    }
    assert!(content == wanted, "{losses:?}");
}

fn lost_bytes(losses: &[Loss]) -> u64 {
    losses.iter().map(|loss| loss.range.len()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn just_what_is_damaged_is_lost() {
    let contents = [1, 2, 3, 4, 5, 6];
    let expected: Vec<u8> = contents.iter().flat_map(|content| chunk(*content)).collect();
    for (kind, lost_chunks) in [(Harm::Rot, 1), (Harm::Cut, 6), (Harm::Remove, 6)] {
        let bed = Bed::new().await;
        let stored = add_point(&bed.open().await, 1, &contents).await;
        let (content, losses) = salvage(&bed.open().await, &stored).await.unwrap();
        assert!(content == expected && losses.is_empty(), "nothing is damaged yet");
        harm(&bed, &packs(&bed, 2).await.remove(0), kind).await;
        for _ in 0..2 {
            let (content, losses) = salvage(&bed.open().await, &stored).await.unwrap();
            assert_eq!(lost_bytes(&losses), lost_chunks * LEAF_BYTES, "{kind:?}: {losses:?}");
            assert_only_lost(&content, &losses, &expected);
        }
        // What is found elsewhere is not lost.
        bed.pass(MINUTE);
        add_point(&bed.open().await, 2, &contents).await;
        let (content, losses) = salvage(&bed.open().await, &stored).await.unwrap();
        assert!(content == expected && losses.is_empty(), "{kind:?}: {losses:?}");
    }
}

/// A disk of three nodes over chunks, with a chunk in the middle of each.
async fn tall_disk(bed: &Bed) -> (StoredDisk, Vec<u8>) {
    let size_bytes = 700 * LEAF_BYTES;
    let mut expected = vec![0; usize::try_from(size_bytes).unwrap()];
    let run = bed.open().await.begin_run().await.unwrap();
    let writer = run.disk_writer(size_bytes, None);
    let mut from = 0;
    for (content, at) in [(1, 100), (2, 300), (3, 600)] {
        let zeroes = ByteRange::between(from, at * LEAF_BYTES);
        writer.zero(zeroes, ZeroMode::Sparse).await.unwrap();
        writer.write(at * LEAF_BYTES, Buffer::unbudgeted(chunk(content))).await.unwrap();
        from = (at + 1) * LEAF_BYTES;
        let start = usize::try_from(at * LEAF_BYTES).unwrap();
        expected[start..start + chunk(content).len()].copy_from_slice(&chunk(content));
    }
    writer.zero(ByteRange::between(from, size_bytes), ZeroMode::Sparse).await.unwrap();
    let stored = writer.finish().await.unwrap().0;
    run.commit(point(1), draft(&stored, None)).await.unwrap();
    (stored, expected)
}

#[tokio::test(flavor = "multi_thread")]
async fn below_a_node_that_is_lost_everything_is_and_nothing_beside_it() {
    let bed = Bed::new().await;
    let (stored, expected) = tall_disk(&bed).await;
    let nodes = packs(&bed, 3).await.remove(0);
    harm(&bed, &nodes, Harm::Rot).await;
    let (content, losses) = salvage(&bed.open().await, &stored).await.unwrap();
    // The first that was stored: the one over the first 256 chunks.
    let first = ByteRange::new(0, 256 * LEAF_BYTES);
    assert_eq!(losses.iter().map(|loss| loss.range).collect::<Vec<_>>(), [first]);
    assert_only_lost(&content, &losses, &expected);

    harm(&bed, &nodes, Harm::Remove).await;
    let (content, losses) = salvage(&bed.open().await, &stored).await.unwrap();
    assert_eq!(lost_bytes(&losses), stored.size_bytes, "without its top nothing is known");
    assert!(content.iter().all(|byte| *byte == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_store_never_becomes_zeroes() {
    for type_byte in [2, 3] {
        let bed = Bed::new().await;
        let stored = add_point(&bed.open().await, 1, &[1, 2, 3]).await;
        let name = packs(&bed, type_byte).await.remove(0);
        bed.store.set_fault_hook(move |call| {
            matches!(call, Operation::Read(read) if *read == name).then_some(Fault::Fail)
        });
        let error = salvage(&bed.open().await, &stored).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Io, "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_cannot_be_read_now_may_be_sound() {
    for type_byte in [2, 3] {
        let bed = Bed::new().await;
        let contents = [1, 2, 3];
        let stored = add_point(&bed.open().await, 1, &contents).await;
        let rotten = packs(&bed, type_byte).await.remove(0);
        harm(&bed, &rotten, Harm::Rot).await;
        let depth = CheckOptions { depth: Depth::Data, repair: Repair::Nothing };
        bed.open().await.check(depth, &Control::new()).await.unwrap();
        bed.pass(MINUTE);
        add_point(&bed.open().await, 2, &contents).await;
        let sound = packs(&bed, type_byte).await.into_iter().find(|pack| *pack != rotten);
        let sound = sound.expect("the content was stored anew");
        bed.store.set_fault_hook(move |call| {
            matches!(call, Operation::Read(read) if *read == sound).then_some(Fault::Fail)
        });
        let error = salvage(&bed.open().await, &stored).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Io, "{error:?}");
    }
}

/// The objects of the index.
fn segments(bed: &Bed) -> Vec<ObjectName> {
    let mut names = bed.store.names();
    names.retain(|name| name.as_str().starts_with(Folder::Index.prefix()));
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_is_not_taken_for_damaged_data() {
    for kind in [Harm::Rot, Harm::Cut, Harm::Remove] {
        let bed = Bed::new().await;
        let stored = add_point(&bed.open().await, 1, &[1, 2, 3]).await;
        for segment in segments(&bed) {
            harm(&bed, &segment, kind).await;
        }
        let error = salvage(&bed.open().await, &stored).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{kind:?}: {error:?}");
        assert!(format!("{error:?}").contains("--rebuild-index"), "{kind:?}: {error:?}");

        let rebuild = CheckOptions { depth: Depth::Structure, repair: Repair::RebuildIndex };
        bed.open().await.check(rebuild, &Control::new()).await.unwrap();
        let (_, losses) = salvage(&bed.open().await, &stored).await.unwrap();
        assert!(losses.is_empty(), "{kind:?}: {losses:?}");
    }
}

/// A run that was given up after it had stored a damaged chunk anew: no segment lists its pack.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_in_a_pack_that_no_segment_lists_is_not_lost() {
    let bed = Bed::new().await;
    let stored = add_point(&bed.open().await, 1, &[1, 2, 3]).await;
    let before = segments(&bed);
    harm(&bed, &packs(&bed, 2).await.remove(0), Harm::Remove).await;
    bed.pass(MINUTE);
    add_point(&bed.open().await, 2, &[1, 2, 3]).await;
    for segment in segments(&bed).iter().filter(|segment| !before.contains(segment)) {
        bed.store.delete(segment).await.unwrap();
    }
    let error = salvage(&bed.open().await, &stored).await.unwrap_err();
    assert!(format!("{error:?}").contains("--rebuild-index"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_went_with_a_hold_is_told_as_that_and_not_as_damage() {
    for silent in [Duration::from_secs(60), LEASE_OF_WRITER + Duration::from_secs(1)] {
        let bed = Bed::new().await;
        let repository = bed.open().await;
        let stored = add_point(&repository, 1, &[1, 2, 3]).await;
        let pack = packs(&bed, 2).await.remove(0);
        let work = async {
            bed.pass(silent);
            harm(&bed, &pack, Harm::Remove).await;
            repository.read_bytes(&stored).await
        };
        let error = repository.while_held(&Control::new(), work).await.unwrap_err();
        let expected = if silent > LEASE_OF_WRITER { Kind::Timeout } else { Kind::Corrupt };
        assert_eq!(error.kind(), expected, "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_says_that_it_was_lost() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let hold = crate::repo::Hold::begin(&repository, &Control::new()).await.unwrap();
    hold.check().await.unwrap();
    bed.pass(LEASE_OF_WRITER + Duration::from_secs(1));
    let error = hold.check().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
    assert!(error.to_string().contains("hold on the repository was lost"), "{error}");
}

#[test]
fn a_list_is_sorted_and_nothing_is_on_it_twice() {
    let loss = |offset, len, reason: &str| Loss {
        range: ByteRange::new(offset, len),
        reason: reason.into(),
    };
    let mut noted = Vec::new();
    for (offset, len, reason) in
        [(100, 50, "a"), (150, 50, "a"), (0, 20, "b"), (120, 100, "a"), (20, 10, "c")]
    {
        append(&mut noted, loss(offset, len, reason));
    }
    let list = sorted(noted);
    assert_eq!(list, [loss(0, 20, "b"), loss(20, 10, "c"), loss(100, 120, "a")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_disks_with_one_chunk_lose_it_both() {
    let bed = Bed::new().await;
    let repository = bed.open().await;
    let run = repository.begin_run().await.unwrap();
    let stored = write(&run, &[4, 4, 4], None).await;
    run.commit(point(1), draft(&stored, None)).await.unwrap();
    let pack = packs(&bed, 2).await.remove(0);
    assert!(!bytes(&bed, &pack).await.is_empty());
    harm(&bed, &pack, Harm::Rot).await;
    let (content, losses) = salvage(&bed.open().await, &stored).await.unwrap();
    assert!(content.iter().all(|byte| *byte == 0));
    assert_eq!(lost_bytes(&losses), 3 * LEAF_BYTES, "{losses:?}");
}
