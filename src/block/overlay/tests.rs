//! An overlay is a disk, its base stays as it is, and a kept one is there again.

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
        assert_eq!(open(Some(size + 1)).map(|_| ()).unwrap_err().kind(), Kind::Busy);
    }
    for less in [LEN as u64 - 1, LEN as u64, (200 << 20) - 1] {
        assert_eq!(open(Some(less)).map(|_| ()).unwrap_err().kind(), Kind::Usage, "{less}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
    let other = Overlay::kept(base, Some(1 << 30), (&path, &[8; 32]));
    assert_eq!(other.map(|_| ()).unwrap_err().kind(), Kind::Usage);
}
