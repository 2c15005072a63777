//! What becomes of scratch when a snapshot cannot be taken down: it goes with QEMU, and stays as
//! long as QEMU may use it.

use serde_json::json;
use vmbackup::platform::{BackupMode, SnapshotRequest};

use crate::machine::{Guest, Machine};
use crate::reading::{Points, open};

#[tokio::test]
async fn a_qemu_that_has_ended_under_a_backup_leaves_nothing() {
    for guest_first in [false, true] {
        let mut machine = Machine::with(Guest::Idle).await;
        let (points, point) = (Points::default(), machine.next_point());
        let request = SnapshotRequest { guest_first, ..points.request(&machine, point) };
        let platform = machine.platform().await;
        let snapshot = open(&platform, &request).await;
        machine.guest("disk-a", "write -P 2 0 1M").await;
        assert_eq!(machine.scratch().len(), 1);
        machine.kill();
        snapshot.abort().await.unwrap();
        assert!(machine.scratch().is_empty(), "{:?}", machine.scratch());
        assert_eq!(std::fs::read_dir(machine.path("journal")).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn scratch_stays_as_long_as_qemu_may_write_to_it() {
    for guest_first in [false, true] {
        let mut machine = Machine::with(Guest::Idle).await;
        let (mut points, point) = (Points::default(), machine.next_point());
        let request = SnapshotRequest { guest_first, ..points.request(&machine, point) };
        let platform = machine.platform().await;
        let snapshot = open(&platform, &request).await;
        // Somebody else uses a node of ours, so that it cannot go.
        let ours = machine.ours().await.into_iter().find(|name| name.starts_with("vmb-snp-"));
        let theirs = json!({ "driver": "raw", "node-name": "theirs", "read-only": true,
            "file": ours.unwrap() });
        machine.side.blockdev_add(theirs).await.unwrap();
        let error = snapshot.abort().await.unwrap_err();
        // A job goes all the same; from its filter a device cannot.
        let told = error.to_string().contains("the guest's writes still go");
        assert_eq!(told, guest_first, "{error:?}");
        assert_eq!(machine.tops().await[0] != "a", guest_first);
        drop(platform);
        let files = std::fs::read_dir(&machine.scratch()[0]).unwrap();
        assert!(files.count() >= 2, "the scratch files are where they are seen");
        machine.guest("disk-a", "write -P 2 0 1M").await;
        machine.side.blockdev_del("theirs").await.unwrap();
        let (next, _) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
        machine.holds_only(&[next]).await;
        assert_eq!(machine.tops().await, ["a", "b"]);
    }
}
