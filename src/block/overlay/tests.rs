//! An overlay is a disk, its base stays as it is, and a kept one is there again.

use super::growing::faults::{self, Sync};
use super::*;
use crate::block::conformance;
use crate::block::memory::MemoryDisk;

const LEN: usize = (1 << 20) + 777;
const IDENTITY: [u8; 32] = [7; 32];

fn base() -> (Arc<MemoryDisk>, Vec<u8>) {
    let content = conformance::pattern(LEN);
    (Arc::new(MemoryDisk::with_content(content.clone())), content)
}

async fn content(overlay: &Overlay) -> Vec<u8> {
    crate::block::read_all(overlay, LEN).await.unwrap()
}

#[tokio::test]
async fn an_unwritten_overlay_is_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, expected) = base();
    let overlay = Overlay::temporary(base, None, dir.path()).unwrap();
    conformance::source(&overlay, &expected).await;
    assert_eq!(overlay.written_bytes(), 0);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it has no name");
}

#[tokio::test]
async fn a_written_overlay_holds_what_was_written_and_the_base_is_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let (base, before) = base();
    let overlay = Overlay::temporary(Arc::clone(&base) as _, None, dir.path()).unwrap();
    conformance::sink(&overlay, || content(&overlay)).await;
    assert_eq!(base.content(), before);
}

#[tokio::test]
async fn odd_writes_side_by_side_leave_every_other_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (base, mut expected) = base();
    let overlay = Arc::new(Overlay::temporary(base, None, dir.path()).unwrap());
    let mut set = tokio::task::JoinSet::new();
    // Nine writes share a block, and some span blocks; none overlaps another.
    for n in 0..900_usize {
        let (offset, len) = (n * 450 + 13, 1 + n % 440);
        let bytes = vec![u8::try_from(n % 250).unwrap() + 1; len];
        if n % 7 == 0 {
            expected[offset..offset + len].fill(0);
        } else {
            expected[offset..offset + len].copy_from_slice(&bytes);
        }
        let overlay = Arc::clone(&overlay);
        set.spawn(async move {
            let range = ByteRange::new(offset as u64, len as u64);
            if n % 7 == 0 {
                overlay.zero(range, ZeroMode::Sparse).await.unwrap();
            } else {
                overlay.write(range.offset(), Buffer::unbudgeted(bytes)).await.unwrap();
            }
        });
    }
    set.join_all().await;
    assert!(content(&overlay).await == expected);
    conformance::source(&*overlay, &expected).await;
}

#[tokio::test]
async fn a_kept_overlay_is_what_it_was_at_its_last_flush() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, mut expected) = base();
    {
        let overlay = Overlay::kept(Arc::clone(&base) as _, None, (&path, &IDENTITY)).unwrap();
        overlay.write(5000, Buffer::unbudgeted(vec![1; 10_000])).await.unwrap();
        overlay.flush().await.unwrap();
        overlay.write(500_000, Buffer::unbudgeted(vec![2; 100])).await.unwrap();
        overlay.flush().await.unwrap();
        // Never flushed: the block reads as the base does afterwards.
        overlay.write(900_000, Buffer::unbudgeted(vec![3; 100])).await.unwrap();
        let busy = Overlay::kept(Arc::clone(&base) as _, None, (&path, &IDENTITY));
        assert_eq!(busy.map(|_| ()).unwrap_err().kind(), Kind::Busy);
    }
    expected[5000..15_000].fill(1);
    expected[500_000..500_100].fill(2);
    let overlay = Overlay::kept(base, None, (&path, &IDENTITY)).unwrap();
    assert!(content(&overlay).await == expected);
}

#[tokio::test]
async fn an_overlay_of_another_disk_and_a_file_that_is_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, _) = base();
    drop(Overlay::kept(Arc::clone(&base) as _, None, (&path, &IDENTITY)).unwrap());
    let other = Overlay::kept(Arc::clone(&base) as _, None, (&path, &[8; 32]));
    assert_eq!(other.map(|_| ()).unwrap_err().kind(), Kind::Usage);
    std::fs::write(&path, "a letter").unwrap();
    let none = Overlay::kept(base, None, (&path, &IDENTITY));
    assert_eq!(none.map(|_| ()).unwrap_err().kind(), Kind::Usage);
    assert_eq!(std::fs::read(&path).unwrap(), b"a letter", "nothing is overwritten");
}

#[tokio::test]
async fn extents_tell_of_both_layers() {
    let dir = tempfile::tempdir().unwrap();
    let base = Arc::new(MemoryDisk::zeroed(1 << 20));
    let overlay = Overlay::temporary(base, None, dir.path()).unwrap();
    overlay.write(65536, Buffer::unbudgeted(vec![1; 4096])).await.unwrap();
    let map = conformance::all_extents(&overlay).await;
    assert_eq!(map.bytes_of(ExtentKind::Data), 4096);
}

#[tokio::test]
async fn a_grown_overlay_has_zeroes_behind_its_base_and_keeps_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, mut expected) = base();
    let open = |size| Overlay::kept(Arc::clone(&base) as _, size, (&path, &IDENTITY));
    let overlay = open(None).unwrap();
    overlay.write(5000, Buffer::unbudgeted(vec![1; 10_000])).await.unwrap();
    overlay.write(LEN as u64 - 3, Buffer::unbudgeted(vec![4; 3])).await.unwrap();
    overlay.flush().await.unwrap();
    drop(overlay);
    expected[5000..15_000].fill(1);
    expected[LEN - 3..].fill(4);
    for size in [LEN as u64 + 1, 3 << 20, 200 << 20] {
        let overlay = open(Some(size)).unwrap();
        assert_eq!(BlockSource::geometry(&overlay).size_bytes, size);
        let byte = Buffer::unbudgeted(vec![9]);
        overlay.write(size - 1, byte).await.unwrap();
        overlay.flush().await.unwrap();
        expected.resize(usize::try_from(size).unwrap(), 0);
        *expected.last_mut().unwrap() = 9;
        drop(overlay);
        let overlay = open(None).unwrap();
        let found = crate::block::read_all(&overlay, 1 << 30).await.unwrap();
        assert!(found == expected, "it has the size it was given: {size}");
        assert_eq!(open(None).map(|_| ()).unwrap_err().kind(), Kind::Busy);
    }
    for less in [LEN as u64 - 1, LEN as u64, (200 << 20) - 1] {
        assert_eq!(open(Some(less)).map(|_| ()).unwrap_err().kind(), Kind::Usage, "{less}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
    let other = Overlay::kept(base, Some(1 << 30), (&path, &[8; 32]));
    assert_eq!(other.map(|_| ()).unwrap_err().kind(), Kind::Usage);
}

/// What the disk holds, read by `overlay`.
async fn all_of(overlay: &Overlay) -> Vec<u8> {
    crate::block::read_all(overlay, 1 << 30).await.unwrap()
}

fn fill(byte: u8, len: usize) -> Buffer {
    Buffer::unbudgeted(vec![byte; len])
}

fn size_of(overlay: &Overlay) -> u64 {
    BlockSource::geometry(overlay).size_bytes
}

#[tokio::test]
async fn an_overlay_in_use_grows_as_another_process_wishes_and_both_views_are_one_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, mut expected) = base();
    let open = |size| Overlay::kept(Arc::clone(&base) as _, size, (&path, &IDENTITY));
    let mut newest = open(None).unwrap();
    let mut views = Vec::new();
    assert!(newest.grown(LEN as u64).await.unwrap().is_none(), "nobody wished for anything");
    newest.write(0, fill(1, 9000)).await.unwrap();
    expected[..9000].fill(1);
    // By less than the old map is long, by whole blocks, and past what one page of map covers.
    // The second ends in the block where the map of the first was.
    let sizes = [LEN + 1, (1 << 20) + 8192 + 10, 3 << 20, 150 << 20, 151 << 20];
    for (byte, size) in (2..).zip(sizes) {
        let busy = open(Some(size as u64)).map(|_| ()).unwrap_err();
        assert_eq!(busy.kind(), Kind::Busy, "{busy:?}");
        assert!(busy.hint_text().unwrap().contains(&size.to_string()), "{busy:?}");
        let grown = newest.grown(size_of(&newest)).await.unwrap().expect("it grows");
        assert_eq!(size_of(&grown), size as u64);
        assert!(newest.grown(size as u64).await.unwrap().is_none(), "no more than that");
        let before = std::mem::replace(&mut newest, grown);
        // What is written by one is read by the other, on both sides of the old end.
        let old_end = expected.len();
        expected.resize(size, 0);
        assert!(all_of(&newest).await == expected, "zeroes follow: {size}");
        before.write(old_end as u64 - 3, fill(byte, 3)).await.unwrap();
        newest.write(old_end as u64, fill(byte, 1)).await.unwrap();
        newest.write(size as u64 - 1, fill(byte, 1)).await.unwrap();
        expected[old_end - 3..=old_end].fill(byte);
        expected[size - 1] = byte;
        assert!(all_of(&newest).await == expected, "{size}");
        assert!(all_of(&before).await == expected[..old_end], "it keeps its size: {size}");
        if byte % 2 == 0 { &before } else { &newest }.flush().await.unwrap();
        views.push(before);
    }
    newest.flush().await.unwrap();
    drop((views, newest));
    let again = open(None).unwrap();
    assert!(all_of(&again).await == expected, "all of it was kept");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
}

#[tokio::test]
async fn a_wish_outlives_the_server_that_did_not_grant_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, _) = base();
    let open = |size, identity| Overlay::kept(Arc::clone(&base) as _, size, (&path, identity));
    let kind = |result: Result<Overlay>| result.map(|_| ()).unwrap_err().kind();
    let first = open(None, &IDENTITY).unwrap();
    assert_eq!(kind(open(Some(2 << 20), &[8; 32])), Kind::Usage, "it is another disk's");
    assert_eq!(kind(open(Some(LEN as u64 - 1), &IDENTITY)), Kind::Usage);
    assert_eq!(kind(open(Some(u64::MAX), &IDENTITY)), Kind::Usage);
    assert_eq!(kind(open(None, &IDENTITY)), Kind::Busy);
    assert!(first.grown(LEN as u64).await.unwrap().is_none(), "none of these is a wish");
    assert_eq!(kind(open(Some(2 << 20), &IDENTITY)), Kind::Busy);
    drop(first);
    assert_eq!(size_of(&open(None, &IDENTITY).unwrap()), 2 << 20);
    assert_eq!(kind(open(Some((2 << 20) - 1), &IDENTITY)), Kind::Usage);
    assert_eq!(size_of(&open(Some(3 << 20), &IDENTITY).unwrap()), 3 << 20);
}

#[tokio::test]
async fn a_crash_at_any_step_of_growing_leaves_the_disk_as_it_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, mut expected) = base();
    let open = |size| Overlay::kept(Arc::clone(&base) as _, size, (&path, &IDENTITY));
    let overlay = open(None).unwrap();
    overlay.write(5000, fill(1, 10_000)).await.unwrap();
    overlay.flush().await.unwrap();
    expected[5000..15_000].fill(1);
    drop(overlay);
    let before = std::fs::read(&path).unwrap();
    drop(open(Some(2 << 20)).unwrap());
    let after = std::fs::read(&path).unwrap();
    // The header is the last that is written; what is behind the old end may be there in part, and
    // may say of blocks that they were written which never were.
    for len in [before.len() + 1, before.len() + 4096, after.len() - 1, after.len()] {
        let mut torn = after[..len].to_vec();
        torn[..before.len()].copy_from_slice(&before);
        torn[before.len()..].fill(0xff);
        std::fs::write(&path, torn).unwrap();
        assert!(content(&open(None).unwrap()).await == expected, "{len}");
        // And it can grow still.
        let grown = open(Some(2 << 20)).unwrap();
        expected.resize(2 << 20, 0);
        assert!(all_of(&grown).await == expected, "{len}");
        expected.truncate(LEN);
    }
}

#[tokio::test]
async fn an_explicit_size_takes_back_a_wish_that_nobody_granted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, _) = base();
    let open = |size| Overlay::kept(Arc::clone(&base) as _, size, (&path, &IDENTITY));
    let kind = |result: Result<Overlay>| result.map(|_| ()).unwrap_err().kind();
    for taken_back_with in [2 << 20, 3 << 20] {
        let first = open(Some(2 << 20)).unwrap();
        assert_eq!(kind(open(Some(1 << 40))), Kind::Busy);
        drop(first);
        assert_eq!(kind(open(Some(LEN as u64))), Kind::Usage, "the disk is larger");
        let explicit = open(Some(taken_back_with)).unwrap();
        assert_eq!(size_of(&explicit), taken_back_with);
        assert!(explicit.grown(taken_back_with).await.unwrap().is_none(), "it was taken back");
        drop(explicit);
        assert_eq!(size_of(&open(None).unwrap()), taken_back_with, "for good");
    }
    // The same while it is served.
    let first = open(None).unwrap();
    assert_eq!(kind(open(Some(1 << 40))), Kind::Busy);
    assert_eq!(kind(open(Some(3 << 20))), Kind::Busy);
    assert!(first.grown(3 << 20).await.unwrap().is_none());
}

#[tokio::test]
async fn an_overlay_in_another_layout_is_named_so_that_nobody_throws_it_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, disk) = base();
    let header = |version: u64| {
        let mut header = [&b"vmbackup overlay"[..], &version.to_le_bytes()].concat();
        header.extend((LEN as u64).to_le_bytes());
        header.extend(IDENTITY);
        header.resize(4096, 0);
        header
    };
    let blocks = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        bytes
    };
    let first = [blocks(&disk), header(1), vec![0; 4096]].concat();
    let third = [header(3), blocks(&disk), vec![0; 4096]].concat();
    for (version, bytes) in [(1, first), (3, third)] {
        std::fs::write(&path, &bytes).unwrap();
        let refused = Overlay::kept(Arc::clone(&base) as _, None, (&path, &IDENTITY));
        let refused = refused.map(|_| ()).unwrap_err();
        assert!(refused.to_string().contains(&format!("layout {version}")), "{refused:?}");
        assert!(refused.hint_text().unwrap().contains("keep it"), "{refused:?}");
        assert!(std::fs::read(&path).unwrap() == bytes, "nothing is overwritten");
    }
}

/// An overlay with 10,000 bytes that were flushed, and a wish that it be larger.
async fn to_grow(base: &Arc<MemoryDisk>, path: &Path) -> Overlay {
    let open = |size| Overlay::kept(Arc::clone(base) as _, size, (path, &IDENTITY));
    let overlay = open(None).unwrap();
    overlay.write(5000, fill(1, 10_000)).await.unwrap();
    overlay.flush().await.unwrap();
    assert_eq!(open(Some(2 << 20)).map(|_| ()).unwrap_err().kind(), Kind::Busy);
    overlay
}

#[tokio::test]
async fn a_growth_that_fails_at_its_header_loses_nothing_that_is_flushed_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, mut expected) = base();
    let overlay = to_grow(&base, &path).await;
    faults::plan(&path, &[Sync::Works, Sync::Fails, Sync::Works]);
    assert!(overlay.grown(LEN as u64).await.is_err());
    overlay.write(500_000, fill(2, 100)).await.unwrap();
    overlay.flush().await.unwrap_err();
    overlay.flush().await.unwrap();
    expected[5000..15_000].fill(1);
    expected[500_000..500_100].fill(2);
    let crashed = dir.path().join("crashed");
    std::fs::copy(&path, &crashed).unwrap();
    let restarted = Overlay::kept(Arc::clone(&base) as _, None, (&crashed, &IDENTITY)).unwrap();
    expected.resize(2 << 20, 0);
    assert!(all_of(&restarted).await == expected, "what was flushed is there after a crash");
    // And it grows at the next attempt.
    let grown = overlay.grown(LEN as u64).await.unwrap().expect("it grows");
    assert!(all_of(&grown).await == expected);
}

#[tokio::test]
async fn an_overlay_whose_header_is_unknown_promises_nothing_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, mut expected) = base();
    let overlay = to_grow(&base, &path).await;
    faults::plan(&path, &[Sync::Works, Sync::Fails, Sync::Fails]);
    assert!(overlay.grown(LEN as u64).await.is_err());
    let before = std::fs::read(&path).unwrap();
    for _ in 0..3 {
        let failed = overlay.flush().await.unwrap_err();
        assert!(failed.to_string().contains("header"), "{failed:?}");
        assert!(overlay.grown(LEN as u64).await.is_err());
        assert!(std::fs::read(&path).unwrap() == before, "no map is touched");
    }
    drop(overlay);
    expected[5000..15_000].fill(1);
    expected.resize(2 << 20, 0);
    let again = Overlay::kept(base, None, (&path, &IDENTITY)).unwrap();
    assert!(all_of(&again).await == expected, "it is as it was flushed last");
}

#[tokio::test]
async fn a_sync_that_fails_while_the_disk_is_to_grow_is_told_to_the_next_flush() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let (base, mut expected) = base();
    let overlay = to_grow(&base, &path).await;
    overlay.write(500_000, fill(2, 100)).await.unwrap();
    faults::plan(&path, &[Sync::Fails]);
    assert!(overlay.grown(LEN as u64).await.is_err());
    // The next attempt works: the flush has to hear of the first one still.
    let grown = overlay.grown(LEN as u64).await.unwrap().expect("it grows");
    let failed = grown.flush().await.unwrap_err();
    assert!(failed.to_string().contains("may be lost"), "{failed:?}");
    overlay.flush().await.unwrap();
    expected[5000..15_000].fill(1);
    expected[500_000..500_100].fill(2);
    expected.resize(2 << 20, 0);
    drop((overlay, grown));
    let again = Overlay::kept(base, None, (&path, &IDENTITY)).unwrap();
    assert!(all_of(&again).await == expected);
}
