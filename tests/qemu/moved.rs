//! A VM that moves to another QEMU while it is backed up: whatever keeps the instant, it is lost,
//! since the other end writes past it.

use std::time::{Duration, Instant};

use qmp::export::ExportEnd;
use serde_json::json;
use vmbackup::error::Kind;
use vmbackup::platform::qemu::Qemu;
use vmbackup::platform::{SnapshotRequest, VmSnapshot};

use crate::machine::{Guest, Machine, qemu_is_since};
use crate::reading::{Points, open};

/// A VM and an open snapshot of it.
async fn begun(guest_first: bool) -> (Machine, Qemu, Box<dyn VmSnapshot>) {
    let mut machine = Machine::with(Guest::Idle).await;
    let (points, point) = (Points::default(), machine.next_point());
    let request = SnapshotRequest { guest_first, ..points.request(&machine, point) };
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    snapshot.still_valid().await.unwrap();
    (machine, platform, snapshot)
}

async fn is_lost(snapshot: &mut dyn VmSnapshot) {
    let lost = snapshot.still_valid().await.unwrap_err();
    assert_eq!(lost.kind(), Kind::SnapshotLost, "{lost:?}");
    assert!(lost.to_string().contains("migrated"), "{lost:?}");
}

/// Waits until a migration has ended, and gives how: `completed`, `failed`, ….
async fn end_of_migration(machine: &Machine) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let told = machine.side.query_migrate().await.unwrap();
        let status = told["status"].as_str().unwrap_or_default();
        if ["completed", "failed", "cancelled"].contains(&status) {
            return status.to_owned();
        }
        assert!(Instant::now() < deadline, "{told:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Nobody reads what it sends, which is more than a pipe takes: it goes on until it is cancelled.
#[tokio::test]
async fn a_migration_that_is_under_way_after_the_last_read_loses_the_instant() {
    for guest_first in [false, true] {
        let (machine, _platform, mut snapshot) = begun(guest_first).await;
        let to = json!({ "uri": "exec:sleep 5" });
        machine.side.execute_raw("migrate", to).await.unwrap();
        is_lost(snapshot.as_mut()).await;
        machine.side.execute_raw("migrate_cancel", json!({})).await.unwrap();
        snapshot.abort().await.unwrap();
        machine.holds_only(&[]).await;
    }
}

/// QEMU 10.0 lets one end only when our exports are gone, and then nobody can read the instant
/// anyway; but it is not said that it has to be so.
#[tokio::test]
async fn a_vm_that_is_elsewhere_after_the_last_read_has_lost_the_instant() {
    let (machine, _platform, mut snapshot) = begun(false).await;
    for export in machine.side.query_block_exports().await.unwrap() {
        machine.side.export_del(&export.id, ExportEnd::Hard).await.unwrap();
    }
    let to = json!({ "uri": format!("exec:cat >{}", machine.path("state").display()) });
    machine.side.execute_raw("migrate", to).await.unwrap();
    if end_of_migration(&machine).await == "failed" {
        // 7.2 cannot inactivate the images under a backup job: the guest is where it was.
        assert!(!qemu_is_since(10, 0));
        assert!(machine.runs().await);
        snapshot.abort().await.unwrap();
        return machine.holds_only(&[]).await;
    }
    assert_eq!(machine.side.query_status().await.unwrap().status, "postmigrate");
    is_lost(snapshot.as_mut()).await;
    // Let go on here, it is the same: it may have run there.
    machine.side.cont().await.unwrap();
    is_lost(snapshot.as_mut()).await;
    snapshot.abort().await.unwrap();
    machine.holds_only(&[]).await;
}

/// The one sort of migration that QEMU completes beside our exports leaves the guest here; QEMU
/// does not tell it from others.
#[tokio::test]
async fn a_migration_that_began_and_ended_during_the_backup_loses_the_instant_and_not_the_next() {
    for guest_first in [false, true] {
        let (mut machine, platform, mut snapshot) = begun(guest_first).await;
        let on =
            json!({ "capabilities": [{ "capability": "background-snapshot", "state": true }] });
        machine.side.execute_raw("migrate-set-capabilities", on).await.unwrap();
        let to = json!({ "uri": format!("exec:cat >{}", machine.path("state").display()) });
        machine.side.execute_raw("migrate", to).await.unwrap();
        assert_eq!(end_of_migration(&machine).await, "completed");
        assert!(machine.runs().await);
        is_lost(snapshot.as_mut()).await;
        snapshot.abort().await.unwrap();
        machine.holds_only(&[]).await;
        let (points, point) = (Points::default(), machine.next_point());
        let request = SnapshotRequest { guest_first, ..points.request(&machine, point) };
        let mut next = open(&platform, &request).await;
        next.still_valid().await.unwrap();
        next.abort().await.unwrap();
    }
}
