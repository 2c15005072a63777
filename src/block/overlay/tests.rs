//! An overlay is a disk, its base stays as it is, and a kept one is there again.

use std::path::PathBuf;

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

/// A base and a file for an overlay of it.
struct Rig {
    dir: tempfile::TempDir,
    path: PathBuf,
    base: Arc<MemoryDisk>,
    /// What the overlay should hold.
    expected: Vec<u8>,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (base, expected) = base();
        Self { path: dir.path().join("o"), dir, base, expected }
    }

    /// One whose overlay has 10,000 bytes that were flushed.
    async fn written() -> (Self, Overlay) {
        let mut rig = Self::new();
        let overlay = rig.open(None).unwrap();
        overlay.write(5000, fill(1, 10_000)).await.unwrap();
        overlay.flush().await.unwrap();
        rig.expected[5000..15_000].fill(1);
        (rig, overlay)
    }

    /// The same, and a wish that it be larger.
    async fn to_grow() -> (Self, Overlay) {
        let (rig, overlay) = Self::written().await;
        assert_eq!(rig.refused(Some(2 << 20)), Kind::Busy);
        (rig, overlay)
    }

    fn open(&self, size: Option<u64>) -> Result<Overlay> {
        self.open_for(&IDENTITY, size)
    }

    fn open_for(&self, identity: &[u8; 32], size: Option<u64>) -> Result<Overlay> {
        Overlay::kept(Arc::clone(&self.base) as _, size, (&self.path, identity))
    }

    fn error(&self, size: Option<u64>) -> Error {
        self.open(size).map(|_| ()).unwrap_err()
    }

    fn refused(&self, size: Option<u64>) -> Kind {
        self.error(size).kind()
    }

    fn refused_for(&self, identity: &[u8; 32], size: Option<u64>) -> Kind {
        self.open_for(identity, size).map(|_| ()).unwrap_err().kind()
    }

    /// Requires that the overlay holds what it should, and zeroes up to its end.
    async fn check(&self, overlay: &Overlay, when: &str) {
        let mut expected = self.expected.clone();
        expected.resize(usize::try_from(size_of(overlay)).unwrap(), 0);
        assert!(all_of(overlay).await == expected, "{when}");
    }
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
    let (mut rig, overlay) = Rig::written().await;
    overlay.write(500_000, fill(2, 100)).await.unwrap();
    overlay.flush().await.unwrap();
    // Never flushed: the block reads as the base does afterwards.
    overlay.write(900_000, fill(3, 100)).await.unwrap();
    assert_eq!(rig.refused(None), Kind::Busy);
    drop(overlay);
    rig.expected[500_000..500_100].fill(2);
    assert!(content(&rig.open(None).unwrap()).await == rig.expected);
}

#[tokio::test]
async fn an_overlay_of_another_disk_and_a_file_that_is_none_are_refused() {
    let mut rig = Rig::new();
    drop(rig.open(None).unwrap());
    assert_eq!(rig.refused_for(&[8; 32], None), Kind::Usage);
    let blank = vec![0; 8192];
    for content in [b"a letter", &[7; 4096][..], &blank] {
        std::fs::write(&rig.path, content).unwrap();
        assert_eq!(rig.refused(None), Kind::Usage);
        assert!(std::fs::read(&rig.path).unwrap() == content, "nothing is overwritten");
    }
    // Nothing is written to what is no file, though it has no length either.
    rig.path = PathBuf::from("/dev/null");
    assert_eq!(rig.refused(None), Kind::Usage);
}

#[tokio::test]
async fn a_crash_while_an_overlay_is_made_is_in_nobodys_way() {
    let attempt = |failing: usize, identity: &[u8; 32]| {
        let rig = Rig::new();
        let mut syncs = vec![Sync::Works; failing];
        syncs.push(Sync::Fails);
        faults::plan(&rig.path, &syncs);
        assert_eq!(rig.refused_for(identity, Some(2 << 20)), Kind::Io, "sync {failing} is heeded");
        let left = std::fs::read(&rig.path).unwrap();
        // What is not durable may be there in part; the length may be, without anything else.
        let torn = [0, 72, 4096, left.len()].map(|len| left[..len].to_vec());
        [&torn[..], &[vec![0; 72], vec![0; 4096]]].concat()
    };
    // The header of no bytes, its directory, the map, the header.
    let ours = [0, 1, 2, 3].map(|failing| (failing, IDENTITY));
    let of_another_disk = [0, 2].map(|failing| (failing, [8; 32]));
    for (failing, identity) in ours.into_iter().chain(of_another_disk) {
        for left in attempt(failing, &identity) {
            for size in [None, Some(3 << 20)] {
                let rig = Rig::new();
                std::fs::write(&rig.path, &left).unwrap();
                let when = format!("sync {failing}, {} bytes, {size:?}", left.len());
                let overlay = rig.open(size).expect(&when);
                assert_eq!(size_of(&overlay), size.unwrap_or(LEN as u64), "{when}");
                overlay.write(5000, fill(1, 100)).await.unwrap();
                overlay.flush().await.unwrap();
                drop(overlay);
                let mut rig = rig;
                rig.expected[5000..5100].fill(1);
                rig.check(&rig.open(None).unwrap(), &when).await;
            }
        }
    }
}

#[tokio::test]
async fn a_wish_for_an_overlay_that_was_never_made_in_full_is_granted() {
    let rig = Rig::new();
    faults::plan(&rig.path, &[Sync::Works, Sync::Works, Sync::Fails]);
    assert_eq!(rig.refused(None), Kind::Io);
    let other = std::fs::File::open(&rig.path).unwrap();
    other.lock().unwrap();
    assert_eq!(rig.refused(Some(2 << 20)), Kind::Busy);
    drop(other);
    let overlay = rig.open(None).unwrap();
    assert_eq!(size_of(&overlay), 2 << 20);
    rig.check(&overlay, "it is new").await;
}

#[tokio::test]
async fn a_wish_for_the_overlay_of_another_disk_that_was_never_made_is_not_granted() {
    let rig = Rig::new();
    faults::plan(&rig.path, &[Sync::Works, Sync::Works, Sync::Fails]);
    assert_eq!(rig.refused_for(&[8; 32], None), Kind::Io);
    let other = std::fs::File::open(&rig.path).unwrap();
    other.lock().unwrap();
    assert_eq!(rig.refused_for(&[8; 32], Some(2 << 20)), Kind::Busy);
    drop(other);
    assert_eq!(size_of(&rig.open(None).unwrap()), LEN as u64);
}

#[tokio::test]
async fn extents_tell_of_both_layers() {
    let dir = tempfile::tempdir().unwrap();
    let base = Arc::new(MemoryDisk::zeroed(1 << 20));
    let overlay = Overlay::temporary(base, None, dir.path()).unwrap();
    overlay.write(65536, fill(1, 4096)).await.unwrap();
    let map = conformance::all_extents(&overlay).await;
    assert_eq!(map.bytes_of(ExtentKind::Data), 4096);
}

#[tokio::test]
async fn a_grown_overlay_has_zeroes_behind_its_base_and_keeps_what_was_written() {
    let (mut rig, overlay) = Rig::written().await;
    overlay.write(LEN as u64 - 3, fill(4, 3)).await.unwrap();
    overlay.flush().await.unwrap();
    drop(overlay);
    rig.expected[LEN - 3..].fill(4);
    for size in [LEN as u64 + 1, 3 << 20, 200 << 20] {
        let overlay = rig.open(Some(size)).unwrap();
        assert_eq!(size_of(&overlay), size);
        overlay.write(size - 1, fill(9, 1)).await.unwrap();
        overlay.flush().await.unwrap();
        rig.expected.resize(usize::try_from(size).unwrap(), 0);
        *rig.expected.last_mut().unwrap() = 9;
        drop(overlay);
        let overlay = rig.open(None).unwrap();
        assert!(all_of(&overlay).await == rig.expected, "it has the size it was given: {size}");
        assert_eq!(rig.refused(None), Kind::Busy);
    }
    for less in [LEN as u64 - 1, LEN as u64, (200 << 20) - 1] {
        assert_eq!(rig.refused(Some(less)), Kind::Usage, "{less}");
    }
    assert_eq!(std::fs::read_dir(rig.dir.path()).unwrap().count(), 1, "nothing is left behind");
    assert_eq!(rig.refused_for(&[8; 32], Some(1 << 30)), Kind::Usage);
}

#[tokio::test]
async fn an_overlay_in_use_grows_as_another_process_wishes_and_both_views_are_one_disk() {
    let mut rig = Rig::new();
    let mut newest = rig.open(None).unwrap();
    let mut views = Vec::new();
    assert!(newest.grown(LEN as u64).await.unwrap().is_none(), "nobody wished for anything");
    newest.write(0, fill(1, 9000)).await.unwrap();
    rig.expected[..9000].fill(1);
    // By less than the old map is long, by whole blocks, and past what one page of map covers.
    // The second ends in the block where the map of the first was.
    let sizes = [LEN + 1, (1 << 20) + 8192 + 10, 3 << 20, 150 << 20, 151 << 20];
    for (byte, size) in (2..).zip(sizes) {
        let busy = rig.error(Some(size as u64));
        assert_eq!(busy.kind(), Kind::Busy, "{busy:?}");
        assert!(busy.hint_text().unwrap().contains(&size.to_string()), "{busy:?}");
        let grown = newest.grown(size_of(&newest)).await.unwrap().expect("it grows");
        assert_eq!(size_of(&grown), size as u64);
        assert!(newest.grown(size as u64).await.unwrap().is_none(), "no more than that");
        let before = std::mem::replace(&mut newest, grown);
        // What is written by one is read by the other, on both sides of the old end.
        let old_end = rig.expected.len();
        rig.expected.resize(size, 0);
        assert!(all_of(&newest).await == rig.expected, "zeroes follow: {size}");
        before.write(old_end as u64 - 3, fill(byte, 3)).await.unwrap();
        newest.write(old_end as u64, fill(byte, 1)).await.unwrap();
        newest.write(size as u64 - 1, fill(byte, 1)).await.unwrap();
        rig.expected[old_end - 3..=old_end].fill(byte);
        rig.expected[size - 1] = byte;
        assert!(all_of(&newest).await == rig.expected, "{size}");
        assert!(all_of(&before).await == rig.expected[..old_end], "it keeps its size: {size}");
        if byte % 2 == 0 { &before } else { &newest }.flush().await.unwrap();
        views.push(before);
    }
    newest.flush().await.unwrap();
    drop((views, newest));
    assert!(all_of(&rig.open(None).unwrap()).await == rig.expected, "all of it was kept");
    assert_eq!(std::fs::read_dir(rig.dir.path()).unwrap().count(), 1, "nothing is left behind");
}

#[tokio::test]
async fn a_wish_outlives_the_server_that_did_not_grant_it() {
    let rig = Rig::new();
    let first = rig.open(None).unwrap();
    assert_eq!(rig.refused_for(&[8; 32], Some(2 << 20)), Kind::Usage, "it is another disk's");
    assert_eq!(rig.refused(Some(LEN as u64 - 1)), Kind::Usage);
    assert_eq!(rig.refused(Some(u64::MAX)), Kind::Usage);
    assert_eq!(rig.refused(None), Kind::Busy);
    assert!(first.grown(LEN as u64).await.unwrap().is_none(), "none of these is a wish");
    assert_eq!(rig.refused(Some(2 << 20)), Kind::Busy);
    drop(first);
    assert_eq!(size_of(&rig.open(None).unwrap()), 2 << 20);
    assert_eq!(rig.refused(Some((2 << 20) - 1)), Kind::Usage);
    assert_eq!(size_of(&rig.open(Some(3 << 20)).unwrap()), 3 << 20);
}

#[tokio::test]
async fn a_crash_at_any_step_of_growing_leaves_the_disk_as_it_was_flushed() {
    let (rig, overlay) = Rig::written().await;
    drop(overlay);
    let before = std::fs::read(&rig.path).unwrap();
    drop(rig.open(Some(2 << 20)).unwrap());
    let after = std::fs::read(&rig.path).unwrap();
    // The header is the last that is written; what is behind the old end may be there in part, and
    // may say of blocks that they were written which never were.
    for len in [before.len() + 1, before.len() + 4096, after.len() - 1, after.len()] {
        let mut torn = after[..len].to_vec();
        torn[..before.len()].copy_from_slice(&before);
        torn[before.len()..].fill(0xff);
        std::fs::write(&rig.path, torn).unwrap();
        assert!(content(&rig.open(None).unwrap()).await == rig.expected, "{len}");
        let grown = rig.open(Some(2 << 20)).unwrap();
        assert_eq!(size_of(&grown), 2 << 20);
        rig.check(&grown, "it can grow still").await;
    }
}

#[tokio::test]
async fn an_explicit_size_takes_back_a_wish_that_nobody_granted() {
    let rig = Rig::new();
    for taken_back_with in [2 << 20, 3 << 20] {
        let first = rig.open(Some(2 << 20)).unwrap();
        assert_eq!(rig.refused(Some(1 << 40)), Kind::Busy);
        drop(first);
        assert_eq!(rig.refused(Some(LEN as u64)), Kind::Usage, "the disk is larger");
        let explicit = rig.open(Some(taken_back_with)).unwrap();
        assert_eq!(size_of(&explicit), taken_back_with);
        assert!(explicit.grown(taken_back_with).await.unwrap().is_none(), "it was taken back");
        drop(explicit);
        assert_eq!(size_of(&rig.open(None).unwrap()), taken_back_with, "for good");
    }
    // The same while it is served.
    let first = rig.open(None).unwrap();
    assert_eq!(rig.refused(Some(1 << 40)), Kind::Busy);
    assert_eq!(rig.refused(Some(3 << 20)), Kind::Busy);
    assert!(first.grown(3 << 20).await.unwrap().is_none());
}

#[tokio::test]
async fn an_overlay_in_another_layout_is_named_so_that_nobody_throws_it_away() {
    let rig = Rig::new();
    let mut bytes = [&b"vmbackup overlay"[..], &3_u64.to_le_bytes(), &[7; 48]].concat();
    bytes.resize(9000, 7);
    std::fs::write(&rig.path, &bytes).unwrap();
    let refused = rig.error(None);
    assert!(refused.to_string().contains("layout 3"), "{refused:?}");
    assert!(refused.hint_text().unwrap().contains("keep it"), "{refused:?}");
    assert!(std::fs::read(&rig.path).unwrap() == bytes, "nothing is overwritten");
}

#[tokio::test]
async fn a_growth_that_fails_at_its_header_leaves_what_was_flushed_before() {
    let (rig, overlay) = Rig::to_grow().await;
    faults::plan(&rig.path, &[Sync::Works, Sync::Fails, Sync::Works]);
    assert!(overlay.grown(LEN as u64).await.is_err());
    overlay.write(500_000, fill(2, 100)).await.unwrap();
    overlay.flush().await.unwrap_err();
    let crashed = rig.dir.path().join("crashed");
    std::fs::copy(&rig.path, &crashed).unwrap();
    let restarted = Overlay::kept(Arc::clone(&rig.base) as _, None, (&crashed, &IDENTITY)).unwrap();
    assert_eq!(size_of(&restarted), 2 << 20);
    rig.check(&restarted, "it is as it was flushed last").await;
}

#[tokio::test]
async fn an_overlay_whose_header_is_unknown_promises_nothing_any_more() {
    let (rig, overlay) = Rig::to_grow().await;
    faults::plan(&rig.path, &[Sync::Works, Sync::Fails, Sync::Fails]);
    assert!(overlay.grown(LEN as u64).await.is_err());
    let before = std::fs::read(&rig.path).unwrap();
    for _ in 0..3 {
        let failed = overlay.flush().await.unwrap_err();
        assert!(failed.to_string().contains("header"), "{failed:?}");
        assert!(overlay.grown(LEN as u64).await.is_err());
        assert!(std::fs::read(&rig.path).unwrap() == before, "no map is touched");
    }
    drop(overlay);
    rig.check(&rig.open(None).unwrap(), "it is as it was flushed last").await;
}

#[tokio::test]
async fn a_sync_that_fails_while_the_disk_is_to_grow_is_told_to_every_flush() {
    let (rig, overlay) = Rig::to_grow().await;
    overlay.write(500_000, fill(2, 100)).await.unwrap();
    faults::plan(&rig.path, &[Sync::Fails]);
    assert!(overlay.grown(LEN as u64).await.is_err());
    // The next attempt works: flushes have to hear of the first one still, whoever's they are.
    let grown = overlay.grown(LEN as u64).await.unwrap().expect("it grows");
    for disk in [&grown, &overlay, &grown] {
        let failed = disk.flush().await.unwrap_err();
        assert!(failed.to_string().contains("may be lost"), "{failed:?}");
    }
}
