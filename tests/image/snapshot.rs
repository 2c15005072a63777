//! Points in time of stopped VMs: full, incremental, and what makes an incremental a full one.

use vmbackup::block::ExtentKind;
use vmbackup::control::Control;
use vmbackup::error::{Kind, Result};
use vmbackup::platform::image::{ImageSource, Images as Vm};
use vmbackup::platform::{BackupMode, Platform, SnapshotRequest, VmSnapshot};
use vmbackup::vm::{FullReason, ReadMode};

use crate::support::{Images, LEN, changed, content, point, request};

const FULL: BackupMode = BackupMode::Full;
const AUTO: BackupMode = BackupMode::Auto;
const INCREMENTAL: BackupMode = BackupMode::Incremental;

fn vm(images: &Images, disks: &[(&str, &str)]) -> Vm {
    let source = |(name, format): &(&str, &str)| ImageSource {
        path: images.path(name),
        format: (*format).to_owned(),
    };
    Vm::new("foo", disks.iter().map(source).collect()).unwrap()
}

async fn open(vm: &Vm, request: &SnapshotRequest) -> Result<Box<dyn VmSnapshot>> {
    vm.open_snapshot(request, &Control::new()).await
}

/// Takes point `n` of `vm` and keeps it.
async fn take(vm: &Vm, request: &SnapshotRequest) {
    let mut snapshot = open(vm, request).await.unwrap();
    snapshot.still_valid().await.unwrap();
    snapshot.commit().await.unwrap();
}

fn reason(snapshot: &dyn VmSnapshot, index: usize) -> FullReason {
    match &snapshot.disks()[index].read {
        ReadMode::Full { reason } => *reason,
        ReadMode::Incremental { base } => panic!("incremental from {base}"),
    }
}

/// Why the next point of a lone `a.qcow2`, whose point 1 was taken, is read in full.
async fn reason_after(images: &Images, known: &[(u8, &[(&str, usize)])]) -> FullReason {
    let vm = vm(images, &[("a.qcow2", "qcow2")]);
    let snapshot = open(&vm, &request(AUTO, 2, known)).await.unwrap();
    let reason = reason(snapshot.as_ref(), 0);
    snapshot.abort().await.unwrap();
    reason
}

/// `a.qcow2` with the pattern, and point 1 taken of it.
async fn with_point_1() -> Images {
    let images = Images::new();
    images.converted("a.qcow2", "qcow2");
    take(&vm(&images, &[("a.qcow2", "qcow2")]), &request(FULL, 1, &[])).await;
    images
}

const KNOWN: &[(u8, &[(&str, usize)])] = &[(1, &[("a", LEN)])];

#[tokio::test(flavor = "multi_thread")]
async fn full_then_incremental_reads_what_changed() {
    let images = Images::new();
    let first = images.converted("a.qcow2", "qcow2");
    let second = images.raw("b.raw");
    let vm = vm(&images, &[("a.qcow2", "qcow2"), ("b.raw", "raw")]);
    let mut snapshot = open(&vm, &request(FULL, 1, &[])).await.unwrap();
    assert_eq!(reason(snapshot.as_ref(), 0), FullReason::Requested);
    assert_eq!(snapshot.disks()[0].description.name, "a");
    assert_eq!(content(&snapshot.source(0).await.unwrap()).await, first);
    assert_eq!(content(&snapshot.source(1).await.unwrap()).await, second);
    snapshot.still_valid().await.unwrap();
    snapshot.commit().await.unwrap();
    assert_eq!(images.bitmaps("a.qcow2").len(), 1);
    let uuid = vm.identify().await.unwrap().uuid;
    let expected = format!("vmb-01234567-{uuid}-{}-a", point(1));
    assert_eq!(images.bitmaps("a.qcow2"), [expected.as_str()]);

    images.qemu_io("a.qcow2", "write -P 7 1M 64k");
    images.qemu_io("a.qcow2", "write -z 2M 128k");
    let known: &[(u8, &[(&str, usize)])] = &[(1, &[("a", LEN), ("b", LEN)])];
    let mut snapshot = open(&vm, &request(INCREMENTAL, 2, known)).await.unwrap();
    assert_eq!(snapshot.disks()[0].read, ReadMode::Incremental { base: point(1) });
    assert_eq!(reason(snapshot.as_ref(), 1), FullReason::FormatWithoutBitmaps);
    let source = snapshot.source(0).await.unwrap();
    let expected = [(1 << 20, 64 << 10, ExtentKind::Data), (2 << 20, 128 << 10, ExtentKind::Zero)];
    assert_eq!(changed(&source).await, expected);
    assert_eq!(content(&source).await, images.content("a.qcow2", "qcow2"));
    snapshot.still_valid().await.unwrap();
    // The source is still held: releasing does not wait for it.
    snapshot.commit().await.unwrap();
    let expected = format!("vmb-01234567-{uuid}-{}-a", point(2));
    assert_eq!(images.bitmaps("a.qcow2"), [expected.as_str()], "the older one is dropped");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_a_data_file_keeps_its_chain_in_itself() {
    let images = Images::new();
    images.data_file("a.qcow2", "d.raw");
    images.qemu_io("a.qcow2", "write -P 3 0 3M");
    let vm = vm(&images, &[("a.qcow2", "qcow2")]);
    take(&vm, &request(FULL, 1, &[])).await;
    assert_eq!(images.bitmaps("a.qcow2").len(), 1);
    images.qemu_io("a.qcow2", "write -P 7 1M 64k");
    let plan = vm.plan(&request(FULL, 2, KNOWN)).await.unwrap();
    assert!(plan.disks[0].expected_bytes >= Some(3 << 20), "{plan:?}");
    let plan = vm.plan(&request(INCREMENTAL, 2, KNOWN)).await.unwrap();
    assert_eq!(plan.disks[0].expected_bytes, Some(64 << 10), "{plan:?}");
    let mut snapshot = open(&vm, &request(INCREMENTAL, 2, KNOWN)).await.unwrap();
    assert_eq!(snapshot.disks()[0].read, ReadMode::Incremental { base: point(1) });
    let source = snapshot.source(0).await.unwrap();
    assert_eq!(changed(&source).await, [(1 << 20, 64 << 10, ExtentKind::Data)]);
    assert_eq!(content(&source).await, std::fs::read(images.path("d.raw")).unwrap());
    snapshot.still_valid().await.unwrap();
    snapshot.abort().await.unwrap();
    take(&vm, &request(INCREMENTAL, 3, KNOWN)).await;
    let bitmaps = images.bitmaps("a.qcow2");
    assert!(bitmaps.len() == 1 && bitmaps[0].contains(&point(3).to_string()), "{bitmaps:?}");
    // A VM that has only the data file keeps a backup out as well.
    let _running = images.vm("d.raw", "raw");
    let plan = vm.plan(&request(AUTO, 4, KNOWN)).await.unwrap();
    assert!(plan.problems.iter().any(|problem| problem.what.contains("d.raw")), "{plan:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_counts_what_changed_also_beside_a_vm() {
    let images = Images::new();
    images.raw("b.raw");
    images.run("qemu-img", &["create", "-f", "qcow2", "-b", "b.raw", "-F", "raw", "a.qcow2"]);
    let vm = vm(&images, &[("a.qcow2", "qcow2")]);
    take(&vm, &request(FULL, 1, &[])).await;
    images.qemu_io("a.qcow2", "write -P 7 1M 64k");
    images.qemu_io("a.qcow2", "write -z 2M 64k");
    let plan = vm.plan(&request(INCREMENTAL, 2, KNOWN)).await.unwrap();
    assert_eq!(plan.disks[0].expected_bytes, Some(64 << 10), "{plan:?}");
    let running = images.vm("b.raw", "raw");
    let plan = vm.plan(&request(INCREMENTAL, 2, KNOWN)).await.unwrap();
    assert_eq!(plan.disks[0].expected_bytes, Some(64 << 10), "{plan:?}");
    assert!(plan.problems.iter().any(|problem| problem.what.contains("b.raw")), "{plan:?}");
    drop(running);
    // Who writes to the image itself is named; what its bitmaps mark meanwhile nobody else can tell.
    let _running = images.vm("a.qcow2", "qcow2");
    let plan = vm.plan(&request(INCREMENTAL, 2, KNOWN)).await.unwrap();
    assert!(plan.problems.iter().any(|problem| problem.what.contains("a.qcow2")), "{plan:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_run_leaves_the_base_as_it_was() {
    let images = with_point_1().await;
    let before = images.bitmaps("a.qcow2");
    images.qemu_io("a.qcow2", "write -P 7 1M 64k");
    let vm = vm(&images, &[("a.qcow2", "qcow2")]);
    for _ in 0..2 {
        let mut snapshot = open(&vm, &request(INCREMENTAL, 2, KNOWN)).await.unwrap();
        let source = snapshot.source(0).await.unwrap();
        assert_eq!(changed(&source).await, [(1 << 20, 64 << 10, ExtentKind::Data)]);
        snapshot.abort().await.unwrap();
        assert_eq!(images.bitmaps("a.qcow2"), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_vm_is_busy_and_nothing_is_left_in_its_image() {
    let images = with_point_1().await;
    images.raw("b.raw");
    let before = images.bitmaps("a.qcow2");
    // The raw disk is in use: found out after the bitmap was begun in the other image.
    let mut running = images.vm("b.raw", "raw");
    assert!(running.runs());
    let vm = vm(&images, &[("a.qcow2", "qcow2"), ("b.raw", "raw")]);
    let error = open(&vm, &request(AUTO, 2, KNOWN)).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains("b.raw"), "{error}");
    assert_eq!(images.bitmaps("a.qcow2"), before);
    let plan = vm.plan(&request(AUTO, 2, KNOWN)).await.unwrap();
    assert!(
        plan.problems.iter().any(|p| p.fatal.is_some() && p.what.contains("b.raw")),
        "{plan:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vm_cannot_start_until_the_snapshot_has_ended() {
    let images = with_point_1().await;
    let vm = vm(&images, &[("a.qcow2", "qcow2")]);
    let mut snapshot = open(&vm, &request(AUTO, 2, KNOWN)).await.unwrap();
    let _source = snapshot.source(0).await.unwrap();
    assert!(images.vm("a.qcow2", "qcow2").refusal().contains("lock"));
    snapshot.still_valid().await.unwrap();
    snapshot.commit().await.unwrap();
    assert!(images.vm("a.qcow2", "qcow2").runs());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_to_build_on_is_told_with_its_reasons() {
    let images = Images::new();
    images.converted("a.qcow2", "qcow2");
    let vm = vm(&images, &[("a.qcow2", "qcow2")]);
    let error = open(&vm, &request(INCREMENTAL, 1, &[])).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::NoBase);
    assert!(error.to_string().contains("first backup"), "{error}");
    assert!(images.bitmaps("a.qcow2").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_reason_to_read_in_full_is_found() {
    let images = with_point_1().await;
    assert_eq!(reason_after(&images, &[]).await, FullReason::FirstBackup);
    assert_eq!(reason_after(&images, &[(1, &[("b", LEN)])]).await, FullReason::NewDisk);
    assert_eq!(reason_after(&images, &[(1, &[("a", LEN / 2)])]).await, FullReason::Resized);
    assert_eq!(reason_after(&images, &[(9, &[("a", LEN)])]).await, FullReason::BitmapMissing);
    let bitmap = images.bitmaps("a.qcow2").remove(0);
    images.run("qemu-img", &["bitmap", "--disable", "a.qcow2", &bitmap]);
    assert_eq!(reason_after(&images, KNOWN).await, FullReason::BitmapNotRecording);
    images.run("qemu-img", &["bitmap", "--remove", "a.qcow2", &bitmap]);
    assert_eq!(reason_after(&images, KNOWN).await, FullReason::BitmapMissing);
}

/// A VM that is killed leaves its bitmaps marked in use: writes may be missing from them.
#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_that_was_left_open_is_not_believed() {
    let images = with_point_1().await;
    let mut running = images.vm("a.qcow2", "qcow2");
    assert!(running.runs());
    drop(running);
    assert_eq!(reason_after(&images, KNOWN).await, FullReason::BitmapInconsistent);
}

/// Such a program clears the autoclear bits it does not know (qcow2 specification, bytes 88 to 95 of
/// the header): bit 0 says that the bitmaps belong to the content.
#[tokio::test(flavor = "multi_thread")]
async fn bitmaps_vanish_when_a_program_that_does_not_know_them_writes() {
    let images = with_point_1().await;
    let mut image = std::fs::read(images.path("a.qcow2")).unwrap();
    assert_eq!(image[95] & 1, 1);
    image[95] &= !1;
    std::fs::write(images.path("a.qcow2"), image).unwrap();
    assert_eq!(reason_after(&images, KNOWN).await, FullReason::BitmapMissing);
}

/// What an overlay's backing file recorded ended when the overlay was made.
#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_below_an_overlay_is_not_believed() {
    let images = with_point_1().await;
    std::fs::create_dir(images.path("over")).unwrap();
    let base = images.path("a.qcow2");
    let create = ["create", "-f", "qcow2", "-F", "qcow2", "-b", base.to_str().unwrap()];
    images.run("qemu-img", &[&create[..], &["over/a.qcow2"]].concat());
    let vm = vm(&images, &[("over/a.qcow2", "qcow2")]);
    let snapshot = open(&vm, &request(AUTO, 2, KNOWN)).await.unwrap();
    assert_eq!(reason(snapshot.as_ref(), 0), FullReason::BitmapNotInChain);
    snapshot.abort().await.unwrap();
}

/// The image of another disk under the name of this one: its bitmap says whose it is.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_took_another_disks_place_is_read_in_full() {
    let images = with_point_1().await;
    std::fs::rename(images.path("a.qcow2"), images.path("b.qcow2")).unwrap();
    let vm = vm(&images, &[("b.qcow2", "qcow2")]);
    let known: &[(u8, &[(&str, usize)])] = &[(1, &[("a", LEN), ("b", LEN)])];
    let snapshot = open(&vm, &request(AUTO, 2, known)).await.unwrap();
    assert_eq!(reason(snapshot.as_ref(), 0), FullReason::ImageReplaced);
    snapshot.abort().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bitmaps_of_others_are_not_touched() {
    let images = with_point_1().await;
    for name in ["theirs", "vmb-ffffffff-other"] {
        images.run("qemu-img", &["bitmap", "--add", "a.qcow2", name]);
    }
    take(&vm(&images, &[("a.qcow2", "qcow2")]), &request(AUTO, 2, KNOWN)).await;
    let bitmaps = images.bitmaps("a.qcow2");
    assert_eq!(bitmaps.len(), 3, "{bitmaps:?}");
    assert!(bitmaps.iter().any(|b| b == "theirs"), "{bitmaps:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_that_cannot_hold_bitmaps_is_read_in_full() {
    let images = Images::new();
    images.run("qemu-img", &["create", "-f", "qcow2", "-o", "compat=0.10", "a.qcow2", "4M"]);
    assert_eq!(reason_after(&images, KNOWN).await, FullReason::FormatWithoutBitmaps);
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_left_out_by_name_only() {
    let images = Images::new();
    images.converted("a.qcow2", "qcow2");
    images.raw("b.raw");
    let vm = vm(&images, &[("a.qcow2", "qcow2"), ("b.raw", "raw")]);
    let without = |name: &str| SnapshotRequest {
        exclude_disks: vec![name.to_owned()],
        ..request(FULL, 1, &[])
    };
    let snapshot = open(&vm, &without("b")).await.unwrap();
    assert_eq!((snapshot.disks().len(), snapshot.excluded()[0].name.as_str()), (1, "b"));
    snapshot.abort().await.unwrap();
    let error = open(&vm, &without("vda")).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_before_the_instant_leaves_nothing() {
    let images = Images::new();
    images.converted("a.qcow2", "qcow2");
    let vm = vm(&images, &[("a.qcow2", "qcow2")]);
    let control = Control::new();
    control.cancel();
    let error = vm.open_snapshot(&request(FULL, 1, &[]), &control).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled);
    assert!(images.bitmaps("a.qcow2").is_empty());
}
