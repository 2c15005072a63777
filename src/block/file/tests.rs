//! Files as disks: conformance, holes, durable renames, refusals. Loop devices where root allows.

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::*;
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, ZeroMode, conformance};

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A loop device over a file, detached on drop.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Self {
        let out = Command::new("losetup").args(["--find", "--show"]).arg(path).output().unwrap();
        assert!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr));
        Self(String::from_utf8(out.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[tokio::test]
async fn a_file_is_a_conforming_source_in_both_kinds_of_access() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    let content = conformance::pattern(3_000_001);
    std::fs::write(&path, &content).unwrap();
    for access in [Access::Once, Access::Repeated] {
        conformance::source(&FileSource::open(&path, access).unwrap(), &content).await;
    }
}

#[tokio::test]
async fn holes_are_reported_as_zero_and_data_as_data() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len(8 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 65536], 1 << 20).unwrap();
    let source = FileSource::open(&path, Access::Once).unwrap();
    let map = conformance::all_extents(&source).await;
    assert_eq!(map.bytes_of(ExtentKind::Data), 65536);
    assert_eq!(map.iter().nth(1).unwrap().range, ByteRange::new(1 << 20, 65536));
}

#[tokio::test]
async fn a_file_that_shrank_is_an_error_not_zeroes() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let source = FileSource::open(&path, Access::Once).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let range = ByteRange::new(65536, 4096);
    let error = source.read(range.offset(), Buffer::unbudgeted(vec![0; 4096])).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Io, "{error:?}");
    source.extents(range).await.unwrap_err();
}

#[tokio::test]
async fn a_new_file_conforms_and_appears_when_committed() {
    let dir = dir();
    let path = dir.path().join("new.raw");
    let new = NewFile::create(&path, 1_000_001, Existing::Refuse).unwrap();
    let temporary = new.temporary_path().to_owned();
    conformance::sink(&*new.sink(), || async { std::fs::read(&temporary).unwrap() }).await;
    assert!(!path.exists(), "incomplete files have no name");
    new.commit().await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1_000_001);
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
}

#[tokio::test]
async fn an_existing_file_is_refused_or_replaced_at_the_end() {
    let dir = dir();
    let path = dir.path().join("old.raw");
    let late = NewFile::create(&path, 4096, Existing::Refuse).unwrap();
    std::fs::write(&path, b"old").unwrap();
    let error = NewFile::create(&path, 4096, Existing::Refuse).unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists);
    assert_eq!(late.commit().await.unwrap_err().kind(), Kind::AlreadyExists, "made meanwhile");
    let aborted = NewFile::create(&path, 4096, Existing::Replace).unwrap();
    aborted.abort().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let new = NewFile::create(&path, 4096, Existing::Replace).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    new.commit().await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), vec![0; 4096]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn zeroing_modes_make_holes_or_keep_space() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![1; 4 << 20]).unwrap();
    let sink = FileSink::open(&path, 4 << 20).unwrap();
    let allocated = || std::fs::metadata(&path).unwrap().blocks() * 512;
    sink.zero(ByteRange::new(0, 1 << 20), ZeroMode::Allocated).await.unwrap();
    assert!(allocated() >= 4 << 20);
    sink.zero(ByteRange::new(1 << 20, 1 << 20), ZeroMode::Sparse).await.unwrap();
    assert!(allocated() <= 3 << 20);
    sink.zero(ByteRange::new((2 << 20) + 5, 100_001), ZeroMode::Sparse).await.unwrap();
    sink.flush().await.unwrap();
    let mut expected = vec![1; 4 << 20];
    expected[..2 << 20].fill(0);
    expected[(2 << 20) + 5..(2 << 20) + 100_006].fill(0);
    assert!(std::fs::read(&path).unwrap() == expected);
}

#[tokio::test]
async fn a_target_that_is_too_small_or_of_another_kind_is_refused() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![1; 4096]).unwrap();
    assert_eq!(FileSink::open(&path, 8192).unwrap_err().kind(), Kind::Usage);
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [&fifo, &dir.path().to_owned()] {
        let error = FileSource::open(path, Access::Once).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
    }
}

#[tokio::test]
async fn a_block_device_is_source_and_sink() {
    let dir = dir();
    let path = dir.path().join("backing");
    // Not a multiple of 4 KiB: the edges of zero ranges must be written.
    let size_bytes = (3 << 20) + 512;
    std::fs::write(&path, vec![0xee; size_bytes]).unwrap();
    let device = Loop::over(&path);
    let sink = FileSink::open(Path::new(&device.0), size_bytes as u64).unwrap();
    let read = || async { std::fs::read(&device.0).unwrap() };
    conformance::sink(&sink, read).await;
    let mut expected = read().await;
    sink.zero(ByteRange::new(700, 1 << 20), ZeroMode::Sparse).await.unwrap();
    expected[700..700 + (1 << 20)].fill(0);
    drop(sink);
    let source = FileSource::open(Path::new(&device.0), Access::Once).unwrap();
    conformance::source(&source, &expected).await;
}

#[test]
fn a_device_that_something_holds_is_not_overwritten() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let device = Loop::over(&path);
    // A mount, a volume group, an array and swap hold a device just so.
    let mut exclusive = File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        exclusive.read(true),
        rustix::fs::OFlags::EXCL.bits().cast_signed(),
    );
    let holder = exclusive.open(&device.0).unwrap();
    let error = FileSink::open(Path::new(&device.0), 1 << 20).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(format!("{error:?}").contains("mounted"), "{error:?}");
    let error = FileSink::open_any(Path::new(&device.0)).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    drop(holder);
    FileSink::open(Path::new(&device.0), 1 << 20).unwrap();
}

#[tokio::test]
async fn a_copy_kept_beside_takes_no_name_that_is_there() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    let beside = |end: &str| dir.path().join(format!("disk.raw.kept{end}"));
    std::fs::write(beside(""), "mine").unwrap();
    for end in ["-2", "-3"] {
        let file = NewFile::create(&path, 512, Existing::Refuse).unwrap();
        file.sync().await.unwrap();
        assert_eq!(file.keep_beside(".kept").await.unwrap(), beside(end));
        assert_eq!(beside(end).metadata().unwrap().len(), 512);
    }
    assert_eq!(std::fs::read(beside("")).unwrap(), b"mine");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "no temporary is left");
}
