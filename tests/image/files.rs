//! Single images: reading, locking, refusing, making.

use std::path::Path;

use vmbackup::block::file::Existing;
use vmbackup::block::{BlockSource, Buffer, conformance, read_all};
use vmbackup::error::{Error, Kind};
use vmbackup::image::{ImageLock, LockedImage, NewImage, OddEnd, OpenImage, open_image_as};
use vmbackup::nbd::ClientOptions;

use crate::support::{Images, LEN};

async fn open_image(path: &Path, format: &str) -> Result<OpenImage, Error> {
    open_image_as((path, format), OddEnd::Padded, ClientOptions::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_many_formats_read_as_what_is_inside() {
    for format in ["raw", "qcow2", "vmdk", "vdi", "vhdx", "qed"] {
        let images = Images::new();
        let content = images.converted("a", format);
        let source = open_image(&images.path("a"), format).await.unwrap();
        let read = read_all(&source, LEN).await.unwrap();
        assert!(read == content, "{format}");
    }
    let images = Images::new();
    let content = images.converted("a", "qcow2");
    let source = open_image(&images.path("a"), "qcow2").await.unwrap();
    conformance::source(&source, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_read_under_the_format_it_is_given() {
    let images = Images::new();
    images.converted("a.qcow2", "qcow2");
    // As raw it is the file itself, header and all.
    let source = open_image(&images.path("a.qcow2"), "raw").await.unwrap();
    let len = std::fs::metadata(images.path("a.qcow2")).unwrap().len();
    assert_eq!(source.geometry().size_bytes, len);
    let error = open_image(&images.path("pattern.tmp"), "qcow2").await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage, "{error:?}");
    for format in ["", "raw,size=1", "QCOW2"] {
        let error = open_image(&images.path("a.qcow2"), format).await.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{format}: {error:?}");
    }
}

/// A guest sees whole sectors; a backup of the file has to hold what it sees.
#[tokio::test(flavor = "multi_thread")]
async fn a_raw_file_that_ends_inside_a_sector_is_read_as_qemu_shows_it() {
    for len in [1, 511, 513, (1 << 20) + 1, (3 << 20) - 1] {
        let images = Images::new();
        let file = conformance::pattern(len);
        std::fs::write(images.path("odd.raw"), &file).unwrap();
        let shown = images.content("odd.raw", "raw");
        assert_eq!(shown.len(), len.next_multiple_of(512));
        let mut image = LockedImage::acquire(&images.path("odd.raw"), "raw").await.unwrap();
        assert_eq!(image.layers()[0].info.size_bytes, shown.len() as u64);
        let source = image.source(None).await.unwrap();
        conformance::source(source.as_ref(), &shown).await;
        assert!(std::fs::read(images.path("odd.raw")).unwrap() == file, "it was only read");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_image_is_not_found_by_name() {
    let images = Images::new();
    for format in ["raw", "qcow2"] {
        let error = open_image(&images.path("none"), format).await.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
        assert!(format!("{error:?}").contains("none"), "{error:?}");
    }
}

async fn refusal(images: &Images, name: &str, format: &str) -> Error {
    open_image(&images.path(name), format).await.map(|_| ()).unwrap_err()
}

/// A VM cannot start while we read, and we do not read while it runs: raw and qcow2 alike.
#[tokio::test(flavor = "multi_thread")]
async fn our_lock_and_a_vm_exclude_each_other() {
    for format in ["raw", "qcow2"] {
        let images = Images::new();
        images.converted("a", format);
        let mut vm = images.vm("a", format);
        assert!(vm.runs());
        assert_eq!(refusal(&images, "a", format).await.kind(), Kind::Busy);
        assert_eq!(ImageLock::probe(&images.path("a")).unwrap_err().kind(), Kind::Busy);
        drop(vm);
        let source = open_image(&images.path("a"), format).await.unwrap();
        let said = images.vm("a", format).refusal();
        assert!(said.contains("lock"), "{said}");
        // Two readers do not mind each other.
        let second = open_image(&images.path("a"), format).await.unwrap();
        second.read(0, Buffer::unbudgeted(vec![0; 4096])).await.unwrap();
        drop((source, second));
        assert!(images.vm("a", format).runs(), "the lock is gone with its source");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn backing_files_are_locked_too() {
    let images = Images::new();
    images.converted("base.raw", "raw");
    let backing = images.path("base.raw");
    let backing = backing.to_str().unwrap();
    images.run("qemu-img", &["create", "-f", "qcow2", "-b", backing, "-F", "raw", "top.qcow2"]);
    let mut image = LockedImage::acquire(&images.path("top.qcow2"), "qcow2").await.unwrap();
    assert_eq!(image.layers().len(), 2);
    let source = image.source(None).await.unwrap();
    conformance::source(source.as_ref(), &images.content("top.qcow2", "qcow2")).await;
    assert!(images.vm("base.raw", "raw").refusal().contains("lock"));
}

/// The header of an image without a recorded format would be probed by QEMU: a guest could have
/// written any format's header into its raw disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_backing_file_without_a_format_is_refused() {
    let images = Images::new();
    images.raw("base.raw");
    images.run("qemu-img", &["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    // Newer tools do not make such images any more: cut the format out of the header extensions.
    let path = images.path("top.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let magic = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes.windows(4).position(|four| four == magic).unwrap();
    bytes[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = refusal(&images, "top.qcow2", "qcow2").await;
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("without its format"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_lead_elsewhere_are_refused() {
    let images = Images::new();
    images.data_file("x.qcow2", "d.raw");
    let image = std::fs::read(images.path("x.qcow2")).unwrap();
    let at = image.windows(5).position(|name| name == b"d.raw").unwrap();
    for elsewhere in [b"nbd:x", b"json:", b"a:b/c"] {
        let mut image = image.clone();
        image[at..at + 5].copy_from_slice(elsewhere);
        std::fs::write(images.path("x.qcow2"), image).unwrap();
        let error = refusal(&images, "x.qcow2", "qcow2").await;
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("not a local file"), "{error:?}");
        assert!(error.hint_text().unwrap().contains("while it runs"), "{error:?}");
    }
    images.luks("e.qcow2");
    let error = refusal(&images, "e.qcow2", "qcow2").await;
    assert!(error.to_string().contains("encrypted"), "{error:?}");
    let url = "nbd:localhost:1:exportname=x";
    images
        .run("qemu-img", &["create", "-u", "-f", "qcow2", "-b", url, "-F", "raw", "n.qcow2", "1M"]);
    let error = refusal(&images, "n.qcow2", "qcow2").await;
    assert!(error.to_string().contains("not a local file"), "{error:?}");
}

/// A relative name begins where the image is, whatever directory we were started in.
#[tokio::test(flavor = "multi_thread")]
async fn a_data_file_is_locked_read_and_watched_with_its_image() {
    for absolute in [false, true] {
        let images = Images::new();
        let data = images.path("d,1.raw");
        images.data_file("a.qcow2", if absolute { data.to_str().unwrap() } else { "d,1.raw" });
        images.qemu_io("a.qcow2", "write -P 5 1M 1M");
        let mut vm = images.vm("d,1.raw", "raw");
        assert!(vm.runs());
        assert_eq!(refusal(&images, "a.qcow2", "qcow2").await.kind(), Kind::Busy);
        drop(vm);
        // Below an overlay in another directory, too.
        std::fs::create_dir(images.path("over")).unwrap();
        let base = images.path("a.qcow2");
        let create = ["create", "-f", "qcow2", "-F", "qcow2", "-b", base.to_str().unwrap()];
        images.run("qemu-img", &[&create[..], &["over/b.qcow2"]].concat());
        let shown = std::fs::read(&data).unwrap();
        assert!(shown.len() == LEN && shown[1 << 20..2 << 20].iter().all(|byte| *byte == 5));
        for name in ["a.qcow2", "over/b.qcow2"] {
            let mut image = LockedImage::acquire(&images.path(name), "qcow2").await.unwrap();
            let source = image.source(None).await.unwrap();
            conformance::source(source.as_ref(), &shown).await;
            assert!(images.vm("d,1.raw", "raw").refusal().contains("lock"));
            image.still_valid().await.unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            std::fs::write(&data, &shown).unwrap();
            assert_eq!(image.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
        }
        std::fs::rename(&data, images.path("gone")).unwrap();
        assert_eq!(refusal(&images, "a.qcow2", "qcow2").await.kind(), Kind::NotFound);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_ignores_locks_is_noticed() {
    let images = Images::new();
    images.raw("a.raw");
    let image = LockedImage::acquire(&images.path("a.raw"), "raw").await.unwrap();
    image.still_valid().await.unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::write(images.path("a.raw"), vec![1; LEN]).unwrap();
    assert_eq!(image.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);

    images.raw("b.raw");
    let image = LockedImage::acquire(&images.path("b.raw"), "raw").await.unwrap();
    std::fs::copy(images.path("b.raw"), images.path("c.raw")).unwrap();
    std::fs::rename(images.path("c.raw"), images.path("b.raw")).unwrap();
    assert_eq!(image.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_images_hold_what_was_written() {
    for format in ["raw", "qcow2", "vmdk", "vdi"] {
        let images = Images::new();
        let path = images.path("new");
        let image = NewImage::create(&path, format, LEN as u64, Existing::Refuse).await.unwrap();
        let sink = image.sink();
        assert!(sink.starts_zero(), "{format}");
        assert!(!path.exists(), "it has its name when it is complete");
        let content = conformance::pattern(LEN);
        for (index, piece) in content.chunks(65536).enumerate() {
            let buffer = Buffer::unbudgeted(piece.to_vec());
            sink.write(index as u64 * 65536, buffer).await.unwrap();
        }
        drop(sink);
        image.commit().await.unwrap();
        assert!(images.content("new", format) == content, "{format}");
        let left = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(left, 2, "only the image and the test's own copy");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_qcow2_is_a_conforming_sink() {
    let images = Images::new();
    let path = images.path("a");
    let image = NewImage::create(&path, "qcow2", LEN as u64, Existing::Refuse).await.unwrap();
    let sink = image.sink();
    // Read back through the file QEMU still has open.
    let temporary = std::fs::read_dir(images.path("a").parent().unwrap()).unwrap().next();
    let temporary = temporary.unwrap().unwrap().file_name().into_string().unwrap();
    conformance::sink(sink.as_ref(), || async { images.content(&temporary, "qcow2") }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_image_leaves_nothing_and_an_existing_one_stays() {
    let images = Images::new();
    let path = images.path("a");
    let image = NewImage::create(&path, "qcow2", LEN as u64, Existing::Refuse).await.unwrap();
    image.abort().unwrap();
    let image = NewImage::create(&path, "qcow2", LEN as u64, Existing::Refuse).await.unwrap();
    drop(image);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    std::fs::write(&path, "precious").unwrap();
    let error = NewImage::create(&path, "qcow2", LEN as u64, Existing::Refuse).await.map(|_| ());
    assert_eq!(error.unwrap_err().kind(), Kind::AlreadyExists);
    let image = NewImage::create(&path, "qcow2", LEN as u64, Existing::Replace).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    image.commit().await.unwrap();
    assert!(images.content("a", "qcow2").iter().all(|b| *b == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_the_format_cannot_keep_is_refused() {
    let images = Images::new();
    let image = NewImage::create(&images.path("a"), "vpc", 1_000_000, Existing::Refuse).await;
    let error = image.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
}

/// Nothing of ours outlives us: the server ends with its source.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_source_ends_its_process_and_removes_its_socket() {
    let images = Images::new();
    images.converted("a.qcow2", "qcow2");
    let servers = || {
        let needle = images.path("a.qcow2").display().to_string();
        let processes = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok());
        let ours = processes.filter(|line| String::from_utf8_lossy(line).contains(&needle));
        ours.count()
    };
    let source = open_image(&images.path("a.qcow2"), "qcow2").await.unwrap();
    assert_eq!(servers(), 1);
    drop(source);
    for _ in 0..200 {
        if servers() == 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("qemu-nbd is still there");
}
