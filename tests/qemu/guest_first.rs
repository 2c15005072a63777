//! `--guest-first`: the backup breaks, never a write of the guest.

use serde_json::json;
use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::{BackupMode, Platform, SnapshotRequest};
use vmbackup::vm::ReadMode;

use crate::machine::{COUNTER, Guest, Machine};
use crate::reading::{Points, open};
use crate::support::{SmallDisk, TestEnv};

fn first(request: SnapshotRequest) -> SnapshotRequest {
    SnapshotRequest { guest_first: true, ..request }
}

#[tokio::test]
async fn a_write_that_fills_scratch_completes_and_the_instant_breaks() {
    let mut machine = Machine::with(Guest::Idle).await;
    machine.guest("disk-a", "write -P 1 0 16M").await;
    let small = SmallDisk::mount(&machine.path("."), "8m");
    let (mut points, point) = (Points::default(), machine.next_point());
    let mut request = first(points.request(&machine, point));
    request.scratch_dir = Some(small.path.clone());
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    assert!(machine.runs().await);
    snapshot.still_valid().await.unwrap();
    // At once, faster than anybody can watch; fails if the write does.
    machine.guest("disk-a", "write -P 2 0 16M").await;
    let error = snapshot.still_valid().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    assert!(error.to_string().contains("guest"), "{error}");
    assert!(points.read_all(snapshot.as_mut()).await.is_err(), "nothing is read as the instant");
    snapshot.abort().await.unwrap();
    drop(platform);
    assert!(small.files().is_empty());
    machine.guest("disk-a", "read -P 2 0 16M").await;
    assert_eq!(machine.tops().await, ["a", "b"]);
    assert!(machine.runs().await);
    machine.holds_only(&[]).await;
    // The next one is whole.
    let oracle = machine.oracle().await;
    let (_, reads) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle));
}

#[tokio::test]
async fn a_backup_whose_instant_broke_fails_says_so_and_leaves_nothing() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::with(Guest::Idle).await;
    machine.guest("disk-a", "write -P 1 0 16M").await;
    let small = SmallDisk::mount(&machine.path("."), "8m");
    let (monitor, scratch) = (machine.path("qmp.sock"), &small.path);
    let (monitor, scratch) = (monitor.to_str().unwrap(), scratch.to_str().unwrap());
    let args = ["full", "--qmp", monitor, "--scratch-dir", scratch, "--guest-first"];
    let backup = env.stopped_at("after:export", &args);
    machine.guest("disk-a", "write -P 2 0 16M").await;
    backup.signal("CONT");
    let outcome = backup.wait();
    assert!(outcome.code.is_some_and(|code| code > 0), "{outcome:?}");
    let said = outcome.stderr;
    assert!(said.contains("scratch directory") && said.contains("guest"), "{said}");
    let list = env.vmbackup(&["list", "--json"]).json();
    assert_eq!(list["points"].as_array().unwrap().len(), 0, "{list}");
    assert!(small.files().is_empty());
    assert_eq!(machine.tops().await, ["a", "b"]);
    machine.holds_only(&[]).await;
    assert_eq!(std::fs::read_dir(env.path("state/journal")).unwrap().count(), 0);
}

#[tokio::test]
async fn points_that_put_the_guest_first_restore_byte_for_byte() {
    let mut machine = Machine::with(Guest::Idle).await;
    let mut points = Points::default();
    machine.guest("disk-a", "write -P 1 1M 2M").await;
    let mut bases = Vec::new();
    for round in 0..4_u64 {
        machine.guest("disk-b", &format!("write -P 3 {}k 100k", round * 300)).await;
        let oracle = machine.oracle().await;
        let point = machine.next_point();
        let request = points.request(&machine, point);
        // The ways may alternate.
        let request = SnapshotRequest { guest_first: round != 2, ..request };
        let meanwhile = [("disk-a", "write -P 4 1536k 1M"), ("disk-b", "write -z 0 1M")];
        let reads = points.back_up_as(&mut machine, &request, &meanwhile).await;
        assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle), "{round}");
        if let Some(base) = bases.last() {
            let incremental = ReadMode::Incremental { base: *base };
            assert!(reads.iter().all(|read| read.mode == incremental), "{round}");
            assert!(reads[1].data_bytes < 4 << 20, "{round}");
        }
        bases.push(point);
        machine.holds_only(&[point]).await;
        assert_eq!(machine.tops().await, ["a", "b"]);
        assert!(machine.runs().await);
    }
}

/// The guest counts on both disks in turn: at any instant disk-a has the number of disk-b or the
/// next.
#[tokio::test]
async fn several_disks_have_one_instant_without_a_transaction() {
    let mut machine = Machine::with(Guest::Boots(COUNTER)).await;
    let number = |content: &[u8]| {
        let bytes = content[64 * 512..].first_chunk::<4>().unwrap();
        u32::from_le_bytes(*bytes)
    };
    let mut points = Points::default();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while number(&std::fs::read(machine.path("b.raw")).unwrap()) == 0 {
        assert!(std::time::Instant::now() < deadline, "the guest does not boot");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let mut last = 0;
    for _ in 0..10 {
        let point = machine.next_point();
        let request = first(points.request(&machine, point));
        let reads = points.back_up_as(&mut machine, &request, &[]).await;
        let (a, b) = (number(&reads[0].content), number(&reads.last().unwrap().content));
        assert!(a == b || a == b + 1, "disk-a has {a} and disk-b has {b}");
        assert!(b > last, "the guest went on: {b} after {last}");
        last = b;
    }
}

#[tokio::test]
async fn a_guest_that_somebody_else_paused_stays_paused() {
    let mut machine = Machine::with(Guest::Idle).await;
    machine.side.stop().await.unwrap();
    let mut points = Points::default();
    let point = machine.next_point();
    let request = first(points.request(&machine, point));
    points.back_up_as(&mut machine, &request, &[]).await;
    assert!(!machine.runs().await);
    machine.holds_only(&[point]).await;
}

/// Past its filter the guest would change the instant under whoever reads it.
#[tokio::test]
async fn a_device_cannot_leave_its_filter_as_long_as_its_instant_is_read() {
    let mut machine = Machine::with(Guest::Idle).await;
    let (points, point) = (Points::default(), machine.next_point());
    let request = first(points.request(&machine, point));
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    let device = "/machine/peripheral/disk-a/virtio-backend";
    assert!(machine.side.qom_set(device, "drive", json!("a")).await.is_err());
    snapshot.still_valid().await.unwrap();
    snapshot.abort().await.unwrap();
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn a_block_job_of_somebody_else_is_never_cut_off() {
    let mut machine = Machine::with(Guest::Idle).await;
    let (points, point) = (Points::default(), machine.next_point());
    let request = first(points.request(&machine, point));
    let target = json!({ "driver": "null-co", "node-name": "theirs",
        "size": crate::machine::SIZE, "read-zeroes": true });
    machine.side.blockdev_add(target).await.unwrap();
    let mirror = |device: &str| {
        json!({ "device": device, "target": "theirs",
        "sync": "none", "job-id": "their-job" })
    };
    machine.side.execute_raw("blockdev-mirror", mirror("b")).await.unwrap();
    let platform = machine.platform().await;
    let refused = platform.open_snapshot(&request, &Control::new()).await.err().unwrap();
    assert_eq!(refused.kind(), Kind::Busy, "{refused:?}");
    end(&machine).await;
    // While the backup runs QEMU itself lets none begin on a disk whose instant is read.
    let snapshot = open(&platform, &request).await;
    for node in [machine.tops().await[1].as_str(), "b"] {
        assert!(machine.side.execute_raw("blockdev-mirror", mirror(node)).await.is_err(), "{node}");
    }
    snapshot.abort().await.unwrap();
    assert_eq!(machine.tops().await, ["a", "b"]);
    machine.holds_only(&[]).await;
}

pub(crate) async fn end(machine: &Machine) {
    machine.side.job_cancel("their-job").await.unwrap();
    while !machine.side.query_jobs().await.unwrap().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
