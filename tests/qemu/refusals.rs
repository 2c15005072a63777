//! Clear refusals, before anything is changed.

use std::path::Path;

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::qemu::Qemu;
use vmbackup::platform::{BackupMode, Platform, Quiesce, SnapshotRequest};

use crate::machine::{Machine, UUID};
use crate::reading::{Points, open};

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
    assert_eq!(refused(&mut machine, |r| r.exclude_disks = all).await, Kind::Usage);
    let kind = refused(&mut machine, |r| r.quiesce = Quiesce::Require).await;
    assert_eq!(kind, Kind::Unsupported);
    let kind = refused(&mut machine, |r| r.scratch_dir = Some("/nonexistent".into())).await;
    assert_eq!(kind, Kind::NotFound);
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn no_backup_takes_the_place_of_a_journal_that_may_tell_of_a_frozen_guest() {
    let mut machine = Machine::start().await;
    let journal = machine.path("journal").join(format!("{UUID}.json"));
    std::fs::create_dir(journal.parent().unwrap()).unwrap();
    std::fs::write(&journal, "{\"version\":99,\"runs\":[]}").unwrap();
    assert_eq!(refused(&mut machine, |_| ()).await, Kind::Busy);
    let files = std::fs::read_dir(machine.path("journal")).unwrap();
    let files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    assert_eq!(files, std::slice::from_ref(&journal));
    assert_eq!(std::fs::read_to_string(&journal).unwrap(), "{\"version\":99,\"runs\":[]}");
    // As the message says.
    std::fs::remove_file(&journal).unwrap();
    let (points, point) = (Points::default(), machine.next_point());
    let platform = machine.platform().await;
    open(&platform, &points.request(&machine, point)).await.abort().await.unwrap();
    machine.holds_only(&[]).await;
}

/// Nobody reads what it sends, which is more than a pipe takes: it goes on until it is cancelled.
#[tokio::test]
async fn a_vm_that_is_being_migrated_is_busy_and_the_migration_is_named() {
    let mut machine = Machine::start().await;
    let to = serde_json::json!({ "uri": "exec:sleep 20" });
    machine.side.execute_raw("migrate", to).await.unwrap();
    let point = machine.next_point();
    let request = Points::default().request(&machine, point);
    let platform = machine.platform().await;
    let error = platform.open_snapshot(&request, &Control::new()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains("VM 'plain' is being migrated"), "{error:?}");
    assert!(error.hint_text().unwrap().contains("once the migration has ended"), "{error:?}");
    let plan = platform.plan(&request).await.unwrap();
    let fatal = plan.problems.iter().find(|problem| problem.fatal == Some(Kind::Busy));
    assert!(fatal.is_some_and(|problem| problem.what.contains("migrated")), "{plan:?}");
    machine.side.execute_raw("migrate_cancel", serde_json::json!({})).await.unwrap();
    loop {
        let error = platform.open_snapshot(&request, &Control::new()).await;
        match error {
            Ok(snapshot) => break snapshot.abort().await.unwrap(),
            Err(error) => assert_eq!(error.kind(), Kind::Busy, "{error:?}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
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
    assert_eq!(gone.kind(), Kind::Connection);
}
