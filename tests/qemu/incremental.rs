//! Full, incremental, incremental: each equal to what the disks held at its instant.

use vmbackup::platform::{BackupMode, Platform};
use vmbackup::vm::{Consistency, FullReason, ReadMode};

use crate::machine::{Machine, SIZE, UUID};
use crate::reading::Points;

#[tokio::test]
async fn two_disks_full_and_incremental_equal_the_oracle_while_the_guest_writes_on() {
    let mut machine = Machine::start().await;
    let mut points = Points::default();
    for (disk, what) in [
        ("disk-a", "write -P 1 0 3M"),
        ("disk-a", "write -P 2 10M 128k"),
        ("disk-b", "write -P 3 1M 2M"),
        ("disk-b", "write -P 4 15M 1M"),
    ] {
        machine.guest(disk, what).await;
    }
    let oracle = machine.oracle().await;
    let meanwhile = [("disk-a", "write -P 9 1M 3M"), ("disk-b", "write -P 9 0 2M")];
    let (first, reads) = points.back_up(&mut machine, BackupMode::Auto, &meanwhile).await;
    for (read, oracle) in reads.iter().zip(&oracle) {
        assert_eq!(read.mode, ReadMode::Full { reason: FullReason::FirstBackup });
        assert!(read.content == *oracle, "a full backup holds its instant");
    }
    machine.holds_only(&[first]).await;

    // Overwritten, zeroed, discarded, misaligned, and new.
    for (disk, what) in [
        ("disk-a", "write -P 5 64k 200k"),
        ("disk-a", "write -z 10M 64k"),
        ("disk-a", "discard 2M 512k"),
        ("disk-a", "write -P 6 13000192 512"),
        ("disk-b", "write -z -u 1M 1M"),
        ("disk-b", "discard 15M 512k"),
        ("disk-b", "write -P 7 7000064 1536"),
    ] {
        machine.guest(disk, what).await;
    }
    let oracle = machine.oracle().await;
    let meanwhile = [("disk-a", "write -P 8 0 8M"), ("disk-b", "discard 0 4M")];
    let (second, reads) = points.back_up(&mut machine, BackupMode::Incremental, &meanwhile).await;
    for (read, oracle) in reads.iter().zip(&oracle) {
        assert_eq!(read.mode, ReadMode::Incremental { base: first });
        assert!(read.content == *oracle, "an incremental holds its instant");
        assert!(read.data_bytes < SIZE / 2, "{} bytes were read", read.data_bytes);
    }
    machine.holds_only(&[second]).await;

    let oracle = machine.oracle().await;
    let (third, reads) = points.back_up(&mut machine, BackupMode::Incremental, &[]).await;
    assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle));
    let (fourth, reads) = points.back_up(&mut machine, BackupMode::Incremental, &[]).await;
    assert!(reads.iter().all(|read| read.data_bytes == 0), "nothing changed: {reads:?}");
    assert!(reads.iter().all(|read| read.mode == ReadMode::Incremental { base: third }));
    machine.holds_only(&[fourth]).await;
}

/// How a raw disk is tracked beyond the life of its QEMU: the bitmaps are in a qcow2, the data is not.
#[tokio::test]
async fn a_qcow2_with_a_raw_data_file_is_read_incrementally_also_after_a_restart() {
    let mut machine = Machine::with_data_file().await;
    let mut points = Points::default();
    for (disk, what) in [("disk-a", "write -P 1 0 3M"), ("disk-b", "write -P 3 1M 2M")] {
        machine.guest(disk, what).await;
    }
    let oracle = machine.oracle().await;
    assert!(std::fs::read(machine.path("a.raw")).unwrap() == oracle[0], "it is the raw disk");
    let meanwhile = [("disk-a", "write -P 9 1M 3M")];
    let (first, reads) = points.back_up(&mut machine, BackupMode::Auto, &meanwhile).await;
    assert_eq!(reads[0].mode, ReadMode::Full { reason: FullReason::FirstBackup });
    assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle));

    for what in ["write -P 5 64k 200k", "write -z 2M 64k", "discard 3M 128k", "write -P 6 9M 1k"] {
        machine.guest("disk-a", what).await;
    }
    let oracle = machine.oracle().await;
    let meanwhile = [("disk-a", "write -P 8 0 8M")];
    let (second, reads) = points.back_up(&mut machine, BackupMode::Incremental, &meanwhile).await;
    assert_eq!(reads[0].mode, ReadMode::Incremental { base: first });
    assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle));
    assert!(reads[0].data_bytes < SIZE / 2, "{} bytes were read", reads[0].data_bytes);
    machine.holds_only(&[second]).await;

    machine.restart().await;
    machine.guest("disk-a", "write -P 7 12M 64k").await;
    let oracle = machine.oracle().await;
    let point = machine.next_point();
    let platform = machine.platform().await;
    let plan = platform.plan(&points.request(&machine, point)).await.unwrap();
    drop(platform);
    let untracked: Vec<_> =
        plan.problems.iter().filter(|problem| problem.what.contains("cannot hold")).collect();
    assert_eq!(untracked.len(), 1, "{untracked:?}");
    assert!(untracked[0].what.contains("disk-b"), "{untracked:?}");
    let (_, reads) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    assert_eq!(reads[0].mode, ReadMode::Incremental { base: second });
    assert_eq!(reads[1].mode, ReadMode::Full { reason: FullReason::BitmapMissing });
    assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle));
}

#[tokio::test]
async fn a_vm_is_identified_and_its_plan_names_every_disk() {
    let mut machine = Machine::start().await;
    let mut points = Points::default();
    let (first, _) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    machine.guest("disk-a", "write -P 1 1M 64k").await;
    let platform = machine.platform().await;
    let vm = platform.identify().await.unwrap();
    assert_eq!((vm.uuid.to_string().as_str(), vm.name.as_str()), (UUID, "plain"));
    let mut request = points.request(&machine, vmbackup::vm::PointId([77; 16]));
    request.exclude_disks = vec!["disk-b".into()];
    let before = machine.ours().await;
    let plan = platform.plan(&request).await.unwrap();
    assert_eq!(machine.ours().await, before, "a plan changes nothing");
    assert_eq!(plan.disks.len(), 1);
    assert_eq!(plan.disks[0].description.name, "disk-a");
    assert_eq!(plan.disks[0].read, Some(ReadMode::Incremental { base: first }));
    assert_eq!(plan.disks[0].expected_bytes, Some(65536));
    assert_eq!(plan.excluded[0].name, "disk-b");
    assert_eq!(plan.scratch.unwrap().bytes_max, SIZE);
    assert!(plan.problems.iter().all(|problem| problem.fatal.is_none()), "{:?}", plan.problems);
}

#[tokio::test]
async fn without_an_agent_the_level_is_crash_and_says_why() {
    let mut machine = Machine::start().await;
    let points = Points::default();
    let point = machine.next_point();
    let request = points.request(&machine, point);
    let platform = machine.platform().await;
    let snapshot = crate::reading::open(&platform, &request).await;
    assert_eq!(snapshot.quiescence().level, Consistency::Crash);
    assert!(snapshot.quiescence().reason.as_ref().unwrap().contains("--agent"));
    assert!(snapshot.not_captured()[0].what.contains("definition"));
    snapshot.abort().await.unwrap();
    machine.holds_only(&[]).await;
}
