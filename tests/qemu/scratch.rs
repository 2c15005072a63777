//! Scratch that runs short: the guest comes first.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use vmbackup::control::Control;
use vmbackup::error::{Error, Kind};
use vmbackup::platform::{Platform, SnapshotRequest, VmSnapshot};
use vmbackup::vm::PointId;

use crate::machine::{FILLER, Guest, Machine};
use crate::reading::{Points, open};
use crate::support::{HangingDisk, SmallDisk};

/// Waits until the snapshot says that it was lost.
async fn loss(snapshot: &mut dyn VmSnapshot) -> Error {
    for _ in 0..100 {
        if let Err(error) = snapshot.still_valid().await {
            return error;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the snapshot was not given up");
}

#[tokio::test]
async fn a_guest_of_a_plain_qemu_that_fills_scratch_writes_on_and_the_backup_is_given_up() {
    let machine = Machine::start().await;
    machine.guest("disk-a", "write -P 1 0 16M").await;
    let small = SmallDisk::mount(&machine.path("."), "4m");
    let points = Points::default();
    let request = SnapshotRequest {
        scratch_dir: Some(small.path.clone()),
        ..points.request(&machine, PointId([1; 16]))
    };
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    // Nobody reads; the guest overwrites more than fits, and each of its writes succeeds.
    for at in 0..48 {
        machine.guest("disk-a", &format!("write -P 2 {}k 128k", at * 128)).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let error = loss(snapshot.as_mut()).await;
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    assert!(error.to_string().contains("the guest comes first"), "{error}");
    assert!(points.read_all(snapshot.as_mut()).await.is_err(), "nothing is read as the instant");
    // The same reason however often it is asked for.
    assert_eq!(snapshot.still_valid().await.unwrap_err().kind(), Kind::NoSpace);
    snapshot.abort().await.unwrap();
    assert!(small.files().is_empty());
    machine.holds_only(&[]).await;
    machine.guest("disk-a", "read -P 2 0 6M").await;
}

/// With nobody to end the jobs in time the guest stands still; its writes are not lost.
#[tokio::test]
async fn a_guest_that_a_killed_run_left_without_scratch_runs_on_with_the_next_on_a_plain_qemu() {
    let mut machine = Machine::with(Guest::WillBoot(FILLER)).await;
    machine.guest("disk-a", "write -P 1 1M 15M").await;
    let small = SmallDisk::mount(&machine.path("."), "4m");
    let (points, point) = (Points::default(), machine.next_point());
    let request = SnapshotRequest {
        scratch_dir: Some(small.path.clone()),
        ..points.request(&machine, point)
    };
    let platform = machine.platform().await;
    // Dropped, nobody watches; the jobs go on.
    drop(open(&platform, &request).await);
    machine.side.cont().await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while machine.side.query_status().await.unwrap().status != "io-error" {
        assert!(Instant::now() < deadline, "the guest does not fill scratch");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let point = machine.next_point();
    let next = open(&platform, &points.request(&machine, point)).await;
    assert!(small.files().is_empty());
    // Each of its writes arrives: it stops at the first that fails.
    while !machine.reads("disk-a", "read -P 0x77 1M 15M").await {
        assert!(Instant::now() < deadline, "{:?}", machine.side.query_status().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(machine.runs().await);
    next.abort().await.unwrap();
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn scratch_of_a_plain_qemu_that_is_short_or_vanishes_gives_the_backup_up() {
    let machine = Machine::start().await;
    let small = SmallDisk::mount(&machine.path("."), "8m");
    let points = Points::default();
    let wanted = SnapshotRequest {
        scratch_dir: Some(small.path.clone()),
        ..points.request(&machine, PointId([1; 16]))
    };
    std::fs::write(small.path.join("theirs"), vec![1; 7 << 20 | 1]).unwrap();
    let platform = machine.platform().await;
    let full = platform.open_snapshot(&wanted, &Control::new()).await.err().unwrap();
    assert_eq!(full.kind(), Kind::NoSpace, "{full:?}");
    std::fs::remove_file(small.path.join("theirs")).unwrap();
    let mut snapshot = open(&platform, &wanted).await;
    snapshot.still_valid().await.unwrap();
    let run = std::fs::read_dir(&small.path).unwrap().next().unwrap().unwrap().path();
    std::fs::rename(&run, small.path.join("moved")).unwrap();
    let error = loss(snapshot.as_mut()).await;
    assert!(format!("{error:?}").contains("space for scratch is not known"), "{error:?}");
    machine.guest("disk-a", "write -P 2 0 16M").await;
    snapshot.abort().await.unwrap();
    std::fs::remove_dir_all(small.path.join("moved")).unwrap();
    machine.holds_only(&[]).await;
}

/// Freezes the file system of an image, says so, and thaws it when it is told to, or after a while.
const FREEZE: &str = "mkfs.ext4 -q -F $1 && mount -o loop $1 $2 && fsfreeze -f $2 && echo frozen; \
                      timeout 60 cat; fsfreeze -u $2; echo thawed; cat; umount -l $2";

/// Who waits in such a file system cannot be told to stop. An earlier run's pause ends first.
#[tokio::test]
async fn a_scratch_directory_that_hangs_is_named_in_time_and_holds_up_no_guest() {
    let mut machine = Machine::with(Guest::Idle).await;
    let (image, hanging) = (machine.path("hanging.img"), machine.path("hanging"));
    std::fs::File::create_new(&image).unwrap().set_len(64 << 20).unwrap();
    std::fs::create_dir(&hanging).unwrap();
    let link = machine.path("link");
    std::os::unix::fs::symlink(&hanging, &link).unwrap();
    // Not in our group: whoever ends this test ends it with the pipe.
    let mut freezer = Command::new("setsid")
        .args(["sh", "-c", FREEZE, "sh"])
        .args([&image, &hanging])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(freezer.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "frozen");
    let (points, dead) = (Points::default(), machine.next_point());
    let marker = format!("vmb-pse-{}-0", dead.short());
    let marker = json!({ "driver": "null-co", "node-name": marker, "size": 0 });
    machine.side.blockdev_add(marker).await.unwrap();
    machine.side.stop().await.unwrap();
    let point = machine.next_point();
    let request = points.request(&machine, point);
    let request = SnapshotRequest { scratch_dir: Some(link.clone()), ..request };
    let platform = machine.platform().await;
    let begun = Instant::now();
    let error = platform.open_snapshot(&request, &Control::new()).await.err().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(55), "{:?}", begun.elapsed());
    assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
    assert!(error.to_string().contains(link.to_str().unwrap()), "{error}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("--scratch-dir")), "{error:?}");
    assert!(machine.runs().await);
    machine.holds_only(&[]).await;
    drop(freezer.stdin.take());
    assert_eq!(said.next().unwrap().unwrap(), "thawed");
    freezer.wait().unwrap();
}

#[tokio::test]
async fn scratch_that_stops_answering_gives_the_backup_up_and_says_what_helps() {
    let machine = Machine::start().await;
    let mut disk = HangingDisk::mount(&machine.path("."));
    let request = SnapshotRequest {
        scratch_dir: Some(disk.path.clone()),
        ..Points::default().request(&machine, PointId([1; 16]))
    };
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    disk.stall();
    let begun = Instant::now();
    let lost = loop {
        if let Err(error) = snapshot.still_valid().await {
            break error;
        }
        assert!(begun.elapsed() < Duration::from_secs(40), "it is not given up");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert_eq!(lost.kind(), Kind::SnapshotLost, "{lost:?}");
    assert!(lost.to_string().contains("does not answer"), "{lost:?}");
    assert!(lost.hint_text().is_some_and(|hint| hint.contains("--scratch-dir")), "{lost:?}");
    disk.answer();
    snapshot.abort().await.unwrap();
    assert!(disk.files().is_empty());
    machine.holds_only(&[]).await;
}
