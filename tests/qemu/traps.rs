//! What breaks bitmaps and instants, and that it is noticed.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use vmbackup::error::Kind;
use vmbackup::platform::{BackupMode, SnapshotRequest};
use vmbackup::vm::{FullReason, PointId, ReadMode};

use crate::machine::Machine;
use crate::reading::{Points, Read, open};

fn full(reason: FullReason) -> ReadMode {
    ReadMode::Full { reason }
}

/// Backs up and checks the content; the modes of both disks.
async fn next(machine: &mut Machine, points: &mut Points) -> Vec<ReadMode> {
    next_of("a.qcow2", machine, points).await
}

/// [`next`] with disk-a on another image.
async fn next_of(image: &str, machine: &mut Machine, points: &mut Points) -> Vec<ReadMode> {
    let mut oracle = machine.oracle().await;
    oracle[0] = machine.held_by(image);
    let (_, reads) = points.back_up(machine, BackupMode::Auto, &[]).await;
    let equal = |(read, oracle): (&Read, &Vec<u8>)| read.content == *oracle;
    assert!(reads.iter().zip(&oracle).all(equal));
    reads.into_iter().map(|read| read.mode).collect()
}

/// From here on disk-a, on this image, is as any other: a write is in an incremental.
async fn goes_on(image: &str, machine: &mut Machine, points: &mut Points) {
    machine.guest("disk-a", "write -P 5 1M 64k").await;
    let modes = next_of(image, machine, points).await;
    assert!(modes.iter().all(|mode| matches!(mode, ReadMode::Incremental { .. })), "{modes:?}");
}

async fn begun() -> (Machine, Points, ReadMode) {
    begun_on(Machine::start().await).await
}

async fn begun_on(mut machine: Machine) -> (Machine, Points, ReadMode) {
    let mut points = Points::default();
    machine.guest("disk-a", "write -P 1 0 1M").await;
    machine.guest("disk-b", "write -P 1 0 1M").await;
    let (base, _) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    machine.guest("disk-a", "write -P 2 512k 1M").await;
    machine.guest("disk-b", "write -P 2 512k 1M").await;
    (machine, points, ReadMode::Incremental { base })
}

#[tokio::test]
async fn a_restart_keeps_the_bitmap_of_qcow2_and_loses_that_of_raw() {
    let (mut machine, mut points, incremental) = begun().await;
    machine.restart().await;
    machine.guest("disk-a", "write -P 3 3M 64k").await;
    machine.guest("disk-b", "write -P 3 3M 64k").await;
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [incremental, full(FullReason::BitmapMissing)]);
}

#[tokio::test]
async fn a_crash_makes_the_bitmap_inconsistent_and_the_disk_is_read_in_full() {
    let (mut machine, mut points, _) = begun().await;
    // Stored, so that the image holds it; then in use, then killed.
    machine.restart().await;
    machine.guest("disk-a", "write -P 3 3M 64k").await;
    machine.crash().await;
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [full(FullReason::BitmapInconsistent), full(FullReason::BitmapMissing)]);
    // The broken one is gone, the new one works.
    goes_on("a.qcow2", &mut machine, &mut points).await;
}

#[tokio::test]
async fn a_resized_disk_is_read_in_full() {
    for (size, write) in [(24 << 20, "write -P 3 20M 64k"), (8 << 20, "write -P 3 7M 1M")] {
        let (mut machine, mut points, incremental) = begun().await;
        machine.guest("disk-a", "write -P 4 7M 2M").await;
        let size = json!({ "node-name": "a", "size": size });
        machine.side.execute_raw("block_resize", size).await.unwrap();
        machine.guest("disk-a", write).await;
        let modes = next(&mut machine, &mut points).await;
        assert_eq!(modes, [full(FullReason::Resized), incremental]);
        goes_on("a.qcow2", &mut machine, &mut points).await;
    }
}

#[tokio::test]
async fn a_bitmap_that_did_not_record_is_not_believed() {
    let (mut machine, mut points, incremental) = begun().await;
    let name = machine.ours().await.into_iter().find(|name| name.ends_with("disk-a")).unwrap();
    let bitmap = qmp::block::BitmapRef { node: "a".into(), name };
    machine.side.bitmap_disable(&bitmap).await.unwrap();
    machine.guest("disk-a", "write -P 3 4M 64k").await;
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [full(FullReason::BitmapNotRecording), incremental]);
}

/// Bitmaps of such an image are in memory only.
#[tokio::test]
async fn a_qcow2_of_version_2_is_tracked_until_qemu_ends() {
    let (mut machine, mut points, incremental) = begun_on(Machine::of_version_2().await).await;
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [incremental.clone(), incremental]);
    machine.restart().await;
    machine.guest("disk-a", "write -P 3 3M 64k").await;
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [full(FullReason::BitmapMissing), full(FullReason::BitmapMissing)]);
}

/// As the bitmaps were stored with the content, they are right for it.
#[tokio::test]
async fn an_image_of_a_plain_qemu_that_was_rolled_back_builds_on_the_point_its_bitmap_names() {
    let (mut machine, mut points, incremental) = begun().await;
    let copy = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            std::fs::copy(dir.join(from), dir.join(to)).unwrap();
        }
    };
    machine.restart_after(copy("a.qcow2", "kept")).await;
    machine.guest("disk-a", "write -P 3 3M 64k").await;
    next(&mut machine, &mut points).await;
    goes_on("a.qcow2", &mut machine, &mut points).await;
    machine.restart_after(copy("kept", "a.qcow2")).await;
    machine.guest("disk-a", "write -P 4 4M 64k").await;
    assert!(machine.reads("disk-a", "read -P 0 3M 64k").await);
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [incremental, full(FullReason::BitmapMissing)]);
    goes_on("a.qcow2", &mut machine, &mut points).await;

    // Nobody knows the point any more: nothing is built on its bitmap, and it goes.
    machine.restart_after(copy("kept", "a.qcow2")).await;
    let mut points = Points::default();
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [full(FullReason::FirstBackup), full(FullReason::FirstBackup)]);
    assert_eq!(machine.ours().await.len(), 2);
}

/// It is of no point yet, and goes before the new one is made.
#[tokio::test]
async fn a_bitmap_of_a_plain_qemu_that_has_the_name_of_the_point_to_come_makes_room() {
    for guest_first in [false, true] {
        let (mut machine, mut points, incremental) = begun().await;
        let point = machine.next_point();
        let ours = machine.ours().await;
        let base = ours.iter().find(|name| name.ends_with("disk-b")).unwrap();
        let name = base.replace(&PointId([1; 16]).to_string(), &point.to_string());
        let stale = qmp::block::BitmapRef { node: "b".into(), name };
        let disabled = qmp::block::NewBitmap {
            state: qmp::block::BitmapState::Disabled,
            ..qmp::block::NewBitmap::default()
        };
        machine.side.bitmap_add(&stale, &disabled).await.unwrap();
        let oracle = machine.oracle().await;
        let request = SnapshotRequest { guest_first, ..points.request(&machine, point) };
        let reads = points.back_up_as(&mut machine, &request, &[]).await;
        for (read, oracle) in reads.iter().zip(&oracle) {
            assert_eq!(read.mode, incremental);
            assert!(read.content == *oracle);
        }
        machine.holds_only(&[point]).await;
        machine.guest("disk-b", "write -P 4 4M 64k").await;
        goes_on("a.qcow2", &mut machine, &mut points).await;
    }
}

/// It holds content from before, and QEMU does not apply it under a bitmap of now.
#[tokio::test]
async fn an_internal_snapshot_between_two_points_costs_nothing_and_is_not_applied() {
    let (mut machine, mut points, incremental) = begun().await;
    let snapshot = json!({ "device": "a", "name": "theirs" });
    machine.side.execute_raw("blockdev-snapshot-internal-sync", snapshot).await.unwrap();
    machine.guest("disk-a", "write -P 3 4M 64k").await;
    machine
        .restart_after(|dir| {
            let mut apply = std::process::Command::new("qemu-img");
            let said =
                apply.args(["snapshot", "-a", "theirs", "a.qcow2"]).current_dir(dir).output();
            assert!(!said.unwrap().status.success());
        })
        .await;
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [incremental, full(FullReason::BitmapMissing)]);
    goes_on("a.qcow2", &mut machine, &mut points).await;
}

#[tokio::test]
async fn an_overlay_put_over_the_disk_is_read_in_full() {
    let (mut machine, mut points, incremental) = begun().await;
    let snapshot = json!({ "node-name": "a", "snapshot-file": "overlay.qcow2",
        "snapshot-node-name": "overlay", "format": "qcow2" });
    machine.side.execute_raw("blockdev-snapshot-sync", snapshot).await.unwrap();
    machine.guest("disk-a", "write -P 3 4M 64k").await;
    let (_, reads) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    assert_eq!(reads[0].mode, full(FullReason::BitmapNotInChain));
    assert_eq!(reads[1].mode, incremental);
    let at = |mib: usize| reads[0].content[mib << 20];
    assert_eq!((at(0), at(1), at(4), at(5)), (1, 2, 3, 0));
}

/// Puts an overlay over disk-a and lets the guest write, empty and overwrite parts of what is below.
async fn overlay(machine: &Machine) {
    let snapshot = json!({ "node-name": "a", "snapshot-file": "overlay.qcow2",
        "snapshot-node-name": "overlay", "format": "qcow2" });
    machine.side.execute_raw("blockdev-snapshot-sync", snapshot).await.unwrap();
    for what in ["write -P 3 4M 64k", "write -P 4 1M 64k", "write -z 512k 64k"] {
        machine.guest("disk-a", what).await;
    }
}

/// Waits until no block job is left; one that waits for its pivot is told to make it. The guest writes on
/// before that.
async fn finish_jobs(machine: &Machine) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut wrote = false;
    loop {
        let jobs = machine.side.query_jobs().await.unwrap();
        let Some(job) = jobs.first() else { break };
        if job.status == "ready" && !wrote {
            machine.guest("disk-a", "write -P 6 6M 64k").await;
            let id = json!({ "id": job.id });
            machine.side.execute_raw("job-complete", id).await.unwrap();
            wrote = true;
        }
        assert!(Instant::now() < deadline, "{jobs:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    machine.guest("disk-a", "write -P 7 8M 64k").await;
}

/// What was committed is in the bitmap of the image it came to, as any write is.
#[tokio::test]
async fn an_overlay_that_is_committed_again_is_part_of_the_incremental() {
    let (mut machine, mut points, incremental) = begun().await;
    overlay(&machine).await;
    let commit = json!({ "job-id": "theirs", "device": "overlay" });
    machine.side.execute_raw("block-commit", commit).await.unwrap();
    finish_jobs(&machine).await;
    assert_eq!(machine.tops().await, ["a", "b"]);
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [incremental.clone(), incremental]);
    goes_on("a.qcow2", &mut machine, &mut points).await;
}

/// The overlay holds everything now, and no bitmap; the image below is out of the chain.
#[tokio::test]
async fn an_overlay_that_everything_is_pulled_into_is_read_in_full() {
    let (mut machine, mut points, incremental) = begun().await;
    overlay(&machine).await;
    let stream = json!({ "job-id": "theirs", "device": "overlay" });
    machine.side.execute_raw("block-stream", stream).await.unwrap();
    finish_jobs(&machine).await;
    assert_eq!(machine.tops().await, ["overlay", "b"]);
    let modes = next_of("overlay.qcow2", &mut machine, &mut points).await;
    assert_eq!(modes, [full(FullReason::BitmapNotInChain), incremental]);
    goes_on("overlay.qcow2", &mut machine, &mut points).await;
}

/// A copy has the content and no bitmap, also when the image it was made of is closed.
#[tokio::test]
async fn a_disk_that_is_mirrored_to_another_image_is_read_in_full() {
    for (closed, reason) in
        [(false, FullReason::BitmapNotInChain), (true, FullReason::BitmapMissing)]
    {
        let (mut machine, mut points, incremental) = begun().await;
        machine.make_image("copy.qcow2");
        let copy = json!({ "driver": "qcow2", "node-name": "copy", "discard": "unmap",
            "file": { "driver": "file", "filename": "copy.qcow2" } });
        machine.side.blockdev_add(copy).await.unwrap();
        let mirror = json!({ "job-id": "theirs", "device": "a", "target": "copy", "sync": "full" });
        machine.side.execute_raw("blockdev-mirror", mirror).await.unwrap();
        finish_jobs(&machine).await;
        assert_eq!(machine.tops().await, ["copy", "b"]);
        if closed {
            machine.side.blockdev_del("a").await.unwrap();
        }
        let modes = next_of("copy.qcow2", &mut machine, &mut points).await;
        assert_eq!(modes, [full(reason), incremental]);
        goes_on("copy.qcow2", &mut machine, &mut points).await;
    }
}

#[tokio::test]
async fn a_foreign_bitmap_and_another_repositorys_chain_stay_as_they_are() {
    let (mut machine, mut points, incremental) = begun().await;
    let foreign = qmp::block::BitmapRef { node: "a".into(), name: "virtnbdbackup.0".into() };
    machine.side.bitmap_add(&foreign, &qmp::block::NewBitmap::default()).await.unwrap();
    let point = machine.next_point();
    let platform = machine.platform().await;
    let mut other = points.request(&machine, point);
    other.repository = "fedcba9876543210".into();
    other.known_points.clear();
    open(&platform, &other).await.commit().await.unwrap();
    drop(platform);
    let modes = next(&mut machine, &mut points).await;
    assert_eq!(modes, [incremental.clone(), incremental]);
    let names = machine.ours().await;
    assert_eq!(names.iter().filter(|name| name.starts_with("vmb-fedcba98-")).count(), 2);
    let nodes = machine.side.query_named_block_nodes().await.unwrap();
    assert!(nodes.iter().any(|node| node.bitmap("virtnbdbackup.0").is_some()));
}

#[tokio::test]
async fn an_ended_job_makes_the_snapshot_invalid_and_its_reads_fail() {
    let (mut machine, points, _) = begun().await;
    let point = machine.next_point();
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &points.request(&machine, point)).await;
    snapshot.still_valid().await.unwrap();
    let jobs = machine.side.query_jobs().await.unwrap();
    machine.side.job_cancel(&jobs[0].id).await.unwrap();
    loop {
        let jobs = machine.side.query_jobs().await.unwrap();
        if jobs[0].status == "concluded" {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    machine.guest("disk-a", "write -P 9 0 1M").await;
    let reads = points.read_all(snapshot.as_mut()).await;
    assert!(reads.is_err(), "live data is never served as the instant");
    assert_eq!(snapshot.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
    snapshot.abort().await.unwrap();
    assert_eq!(machine.ours().await.len(), 2);
}

#[tokio::test]
async fn a_lost_qemu_makes_the_snapshot_invalid() {
    let (mut machine, points, _) = begun().await;
    let point = machine.next_point();
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &points.request(&machine, point)).await;
    machine.crash().await;
    assert_eq!(snapshot.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
    assert!(snapshot.abort().await.is_err(), "the clean-up that was not possible is reported");
    drop(platform);
    let mut points = points;
    next(&mut machine, &mut points).await;
}
