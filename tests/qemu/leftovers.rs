//! Aborted, failed and dead runs: the old checkpoint is as it was and nothing of the run remains.

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::qemu::Qemu;
use vmbackup::platform::{BackupMode, Platform, SnapshotRequest};
use vmbackup::vm::ReadMode;

use crate::machine::Machine;
use crate::reading::{Points, open};

#[tokio::test]
async fn an_aborted_run_leaves_the_base_and_costs_only_reading_again() {
    let mut machine = Machine::start().await;
    let mut points = Points::default();
    let (first, _) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    machine.guest("disk-a", "write -P 1 1M 64k").await;
    let point = machine.next_point();
    let platform = machine.platform().await;
    let snapshot = open(&platform, &points.request(&machine, point)).await;
    machine.guest("disk-b", "write -P 2 2M 64k").await;
    snapshot.abort().await.unwrap();
    drop(platform);
    machine.holds_only(&[first]).await;

    let oracle = machine.oracle().await;
    let (_, reads) = points.back_up(&mut machine, BackupMode::Incremental, &[]).await;
    assert!(reads.iter().all(|read| read.mode == ReadMode::Incremental { base: first }));
    assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle));
}

#[tokio::test]
async fn what_a_dead_run_left_is_removed_by_the_next() {
    let mut machine = Machine::start().await;
    let mut points = Points::default();
    let (first, _) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    let point = machine.next_point();
    die_in_the_middle(&machine, points.request(&machine, point)).await;
    assert!(machine.ours().await.len() > 10);

    machine.guest("disk-a", "write -P 3 3M 64k").await;
    let oracle = machine.oracle().await;
    let (third, reads) = points.back_up(&mut machine, BackupMode::Incremental, &[]).await;
    assert!(reads.iter().all(|read| read.mode == ReadMode::Incremental { base: first }));
    assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle));
    // The dead run's checkpoint went with the commit: nobody knows its point.
    machine.holds_only(&[third]).await;
}

/// Opens a snapshot and a source of it, and ends like a killed process: no clean-up runs, and all
/// sockets are closed because the runtime that owned them is gone.
async fn die_in_the_middle(machine: &Machine, request: SnapshotRequest) {
    let options = machine.options("qmp.sock");
    let run = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let platform = Qemu::connect(options).await.unwrap();
            let mut snapshot = open(&platform, &request).await;
            std::mem::forget(snapshot.source(0).await.unwrap());
            std::mem::forget(snapshot);
        });
    });
    tokio::task::spawn_blocking(|| run.join().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_run_that_fails_while_it_opens_undoes_what_it_did() {
    let mut machine = Machine::start().await;
    let mut points = Points::default();
    let (first, _) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    // A job of somebody else holds disk b: the transaction fails as a whole.
    let target = serde_json::json!({ "driver": "null-co", "node-name": "theirs",
        "size": crate::machine::SIZE, "read-zeroes": true });
    machine.side.blockdev_add(target).await.unwrap();
    let mirror = serde_json::json!({ "device": "b", "target": "theirs", "sync": "none",
        "job-id": "their-job" });
    machine.side.execute_raw("blockdev-mirror", mirror).await.unwrap();
    let platform = machine.platform().await;
    let point = machine.next_point();
    let failed = platform.open_snapshot(&points.request(&machine, point), &Control::new()).await;
    let error = failed.err().unwrap();
    assert_eq!(error.kind(), Kind::Busy, "{error:?}");
    assert!(machine.side.query_jobs().await.unwrap().iter().any(|job| job.id == "their-job"));
    machine.holds_only(&[first]).await;
}

#[tokio::test]
async fn a_run_that_is_cancelled_while_it_opens_undoes_what_it_did() {
    let mut machine = Machine::start().await;
    let points = Points::default();
    let control = Control::new();
    control.cancel();
    let point = machine.next_point();
    let platform = machine.platform().await;
    let opened = platform.open_snapshot(&points.request(&machine, point), &control).await;
    assert_eq!(opened.err().unwrap().kind(), Kind::Cancelled);
    machine.holds_only(&[]).await;
}
