//! Clear refusals, before anything is changed.

use std::path::Path;

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::qemu::Qemu;
use vmbackup::platform::{BackupMode, Platform, Quiesce, SnapshotRequest};

use crate::machine::Machine;
use crate::reading::Points;

async fn refused(machine: &mut Machine, change: impl FnOnce(&mut SnapshotRequest)) -> Kind {
    let point = machine.next_point();
    let mut request = Points::default().request(machine, point);
    change(&mut request);
    let platform = machine.platform().await;
    let error = platform.open_snapshot(&request, &Control::new()).await.err().unwrap();
    assert!(machine.ours().await.is_empty(), "nothing is left behind after: {error:?}");
    error.kind()
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_and_leaves_nothing() {
    let mut machine = Machine::start().await;
    let kind = refused(&mut machine, |r| r.mode = BackupMode::Incremental).await;
    assert_eq!(kind, Kind::NoBase);
    let kind = refused(&mut machine, |r| r.exclude_disks = vec!["vdz".into()]).await;
    assert_eq!(kind, Kind::Usage);
    let all = vec!["disk-a".into(), "disk-b".into()];
    assert_eq!(refused(&mut machine, |r| r.exclude_disks = all).await, Kind::NotFound);
    let kind = refused(&mut machine, |r| r.quiesce = Quiesce::Require).await;
    assert_eq!(kind, Kind::Unsupported);
    let kind = refused(&mut machine, |r| r.scratch_dir = Some("/nonexistent".into())).await;
    assert_eq!(kind, Kind::NotFound);
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn an_nbd_server_of_somebody_else_is_respected() {
    let mut machine = Machine::start().await;
    machine.side.nbd_server_start(Path::new("theirs.sock"), 1).await.unwrap();
    assert_eq!(refused(&mut machine, |_| ()).await, Kind::Busy);
    assert!(machine.path("theirs.sock").exists());
    machine.side.nbd_server_stop().await.unwrap();
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn a_monitor_in_use_and_a_monitor_that_is_not_there_are_told_apart() {
    let machine = Machine::start().await;
    let _holder = machine.platform().await;
    let busy = Qemu::connect(machine.options("qmp.sock")).await.err().unwrap();
    assert_eq!(busy.kind(), Kind::Busy);
    assert!(busy.hint_text().unwrap().contains("second socket"), "{busy:?}");
    let gone = Qemu::connect(machine.options("none.sock")).await.err().unwrap();
    assert_eq!(gone.kind(), Kind::NotFound);
}
