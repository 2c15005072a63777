//! Conversations with a QEMU that run twice: live, and against the recording of a live run.
//!
//! They send commands one after the other and wait for events by name, so that a recording always
//! fits. File names are relative to QEMU's working directory.

use std::path::Path;
use std::sync::Arc;

use qmp::block::{BitmapRef, BitmapState, BitmapStorage, NewBitmap, is_missing};
use qmp::export::{ExportAccess, ExportEnd, NewExport};
use qmp::{
    Action, BackupJob, Event, Features, Kind, Monitor, OnTargetFailure, Received, Subscription,
};
use serde_json::json;

/// What each scenario needs: qcow2 or raw files, and arguments for QEMU.
pub(crate) struct Setup {
    pub(crate) images: &'static [(&'static str, &'static str)],
    pub(crate) arguments: &'static [&'static str],
}

pub(crate) const BITMAPS: Setup = Setup {
    images: &[("a.qcow2", "16M")],
    arguments: &[
        "-machine",
        "none",
        "-blockdev",
        "driver=qcow2,node-name=a,file.driver=file,file.filename=a.qcow2",
    ],
};

pub(crate) const PULL_BACKUP: Setup = Setup {
    images: &[
        ("a.qcow2", "16M"),
        ("b.raw", "8M"),
        ("scratch-a.raw", "16M"),
        ("scratch-b.raw", "8M"),
    ],
    arguments: &[
        "-machine",
        "q35",
        "-name",
        "guest=transcript",
        "-uuid",
        "c0ffee00-0000-4000-8000-000000000001",
        "-blockdev",
        "driver=qcow2,node-name=a,file.driver=file,file.filename=a.qcow2",
        "-blockdev",
        "driver=raw,node-name=b,file.driver=file,file.filename=b.raw",
        "-device",
        "virtio-blk-pci,drive=a,id=disk-a",
        "-device",
        "virtio-blk-pci,drive=b,id=disk-b",
    ],
};

pub(crate) const SCHEMA: Setup = Setup { images: &[], arguments: &["-machine", "none"] };

fn at(node: &str, name: &str) -> BitmapRef {
    BitmapRef { node: node.into(), name: name.into() }
}

/// The next event of that name.
pub(crate) async fn wait_for(events: &mut Subscription, name: &str) -> Arc<Event> {
    let wait = async {
        loop {
            match events.recv().await.unwrap() {
                Received::Event(event) if event.name == name => return event,
                Received::Event(_) => {}
                Received::Lagged(lost) => panic!("lost {lost} events"),
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), wait).await.expect("the event comes")
}

/// Adds, merges, stops and removes bitmaps of a qcow2 node.
pub(crate) async fn bitmaps(monitor: &Monitor) {
    let node = |nodes: Vec<qmp::block::Node>| {
        nodes.into_iter().find(|node| node.name() == "a").expect("node a is there")
    };
    let stored = NewBitmap { storage: BitmapStorage::Persistent, ..NewBitmap::default() };
    monitor.bitmap_add(&at("a", "kept"), &stored).await.unwrap();
    let tmp = NewBitmap {
        state: BitmapState::Disabled,
        granularity: Some(65536),
        ..NewBitmap::default()
    };
    monitor.bitmap_add(&at("a", "tmp"), &tmp).await.unwrap();
    monitor.bitmap_merge(&at("a", "tmp"), &[at("a", "kept")]).await.unwrap();

    let a = node(monitor.query_named_block_nodes().await.unwrap());
    assert_eq!((a.drv.as_str(), a.image.virtual_size, a.ro), ("qcow2", 16 << 20, false));
    let kept = a.bitmap("kept").expect("kept is listed");
    assert!(kept.persistent && kept.recording && !kept.busy && !kept.inconsistent);
    let tmp = a.bitmap("tmp").expect("tmp is listed");
    assert!(!tmp.persistent && !tmp.recording);

    monitor.bitmap_disable(&at("a", "kept")).await.unwrap();
    monitor.bitmap_enable(&at("a", "kept")).await.unwrap();
    let again = monitor.bitmap_add(&at("a", "kept"), &stored).await.unwrap_err();
    assert_eq!(again.kind(), Kind::Refused);
    assert_eq!(again.refusal(), Some("Bitmap already exists: kept"));
    monitor.bitmap_remove(&at("a", "tmp")).await.unwrap();
    assert!(is_missing(&monitor.bitmap_remove(&at("a", "tmp")).await.unwrap_err()));
    assert!(is_missing(&monitor.bitmap_remove(&at("none", "tmp")).await.unwrap_err()));
    assert!(is_missing(&monitor.blockdev_del("none").await.unwrap_err()));
    assert!(is_missing(&monitor.job_dismiss("none").await.unwrap_err()));
    let unknown = monitor.execute_raw("no-such-command", json!({})).await.unwrap_err();
    assert_eq!(unknown.kind(), Kind::Unsupported);
}

/// One instant of two disks, exported, torn down.
pub(crate) async fn pull_backup(monitor: &Monitor) {
    identity(monitor).await;
    let mut events = monitor.subscribe();
    for name in ["a", "b"] {
        let file = json!({ "driver": "file", "filename": format!("scratch-{name}.raw") });
        let scratch = format!("scratch-{name}");
        let node = json!({ "driver": "raw", "node-name": scratch, "file": file });
        monitor.blockdev_add(node).await.unwrap();
    }
    let stored = NewBitmap { storage: BitmapStorage::Persistent, ..NewBitmap::default() };
    let tmp = NewBitmap { state: BitmapState::Disabled, ..NewBitmap::default() };
    let job = |name: &str| {
        Action::backup(&BackupJob {
            id: format!("job-{name}"),
            device: name.to_owned(),
            target: format!("scratch-{name}"),
            filter: format!("filter-{name}"),
            on_target_failure: OnTargetFailure::BreakGuestWrite,
        })
    };
    let actions = [
        Action::bitmap_add(&at("a", "point"), &stored),
        Action::bitmap_add(&at("a", "tmp"), &tmp),
        Action::bitmap_merge(&at("a", "tmp"), &[at("a", "point")]),
        Action::bitmap_add(&at("b", "point"), &NewBitmap::default()),
        job("a"),
        job("b"),
    ];
    monitor.transaction(&actions).await.unwrap();
    let jobs = monitor.query_jobs().await.unwrap();
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job.status == "running"), "{jobs:?}");
    assert_eq!(monitor.query_block_jobs().await.unwrap().len(), 2);

    let snapshot =
        json!({ "driver": "snapshot-access", "node-name": "snap-a", "file": "filter-a" });
    monitor.blockdev_add(snapshot).await.unwrap();
    monitor.nbd_server_start(Path::new("nbd.sock"), 4).await.unwrap();
    let second = monitor.nbd_server_start(Path::new("other.sock"), 4).await.unwrap_err();
    assert_eq!(second.refusal(), Some("NBD server already running"));
    let export = NewExport {
        id: "export-a".into(),
        node: "snap-a".into(),
        name: "a".into(),
        bitmap: Some(at("a", "tmp")),
        access: ExportAccess::ReadOnly,
    };
    let features =
        Features { block_export_add: true, export_bitmap_by_node: true, ..Features::default() };
    monitor.export_add(&export, &features).await.unwrap();
    let exports = monitor.query_block_exports().await.unwrap();
    assert_eq!((exports[0].id.as_str(), exports[0].node_name.as_str()), ("export-a", "snap-a"));

    monitor.export_del("export-a", ExportEnd::Hard).await.unwrap();
    assert_eq!(wait_for(&mut events, "BLOCK_EXPORT_DELETED").await.text("id"), Some("export-a"));
    monitor.nbd_server_stop().await.unwrap();
    monitor.blockdev_del("snap-a").await.unwrap();
    for name in ["a", "b"] {
        let job = format!("job-{name}");
        monitor.job_cancel(&job).await.unwrap();
        wait_for(&mut events, "BLOCK_JOB_CANCELLED").await;
        cancelled(monitor, &job).await;
        monitor.job_dismiss(&job).await.unwrap();
        monitor.blockdev_del(&format!("scratch-{name}")).await.unwrap();
    }
    monitor.bitmap_remove(&at("a", "tmp")).await.unwrap();
}

/// Waits until a job has concluded, as one that was cancelled does.
async fn cancelled(monitor: &Monitor, job: &str) {
    loop {
        let jobs = monitor.query_jobs().await.unwrap();
        let ended = jobs.iter().find(|each| each.id == job).expect("it waits for dismissal");
        if ended.status == qmp::jobs::status::CONCLUDED {
            assert_eq!(ended.error.as_deref(), Some("Operation canceled"));
            return;
        }
    }
}

async fn identity(monitor: &Monitor) {
    let uuid = monitor.query_uuid().await.unwrap();
    assert_eq!(uuid, "c0ffee00-0000-4000-8000-000000000001");
    assert_eq!(monitor.query_name().await.unwrap().as_deref(), Some("transcript"));
    let status = monitor.query_status().await.unwrap();
    assert_eq!((status.running, status.status.as_str()), (false, "prelaunch"));
    assert_eq!(monitor.query_migrate().await.unwrap(), json!({}));
    let devices = monitor.query_block().await.unwrap();
    let top = |device: &qmp::block::Device| device.inserted.as_ref().unwrap().name().to_owned();
    let tops: Vec<_> = devices.iter().map(top).collect();
    assert_eq!(tops, ["a", "b"]);
    assert_eq!(devices[0].qdev.as_deref(), Some("/machine/peripheral/disk-a/virtio-backend"));
    let properties = monitor.qom_list("/machine/peripheral/disk-a").await.unwrap();
    assert!(properties.iter().any(|property| property.name == "drive"));
    let drive = monitor.qom_get("/machine/peripheral/disk-a", "drive").await.unwrap();
    assert_eq!(drive, json!("a"));
    assert!(monitor.human("info name").await.unwrap().contains("transcript"));
}

/// The schema of this version, and what is read from it.
pub(crate) async fn schema(monitor: &Monitor) {
    let features = monitor.query_schema().await.unwrap().features();
    let expected = Features {
        block_export_add: true,
        nbd_server_add: true,
        export_bitmap_by_node: true,
        snapshot_access: true,
        copy_before_write: true,
        cbw_on_error: true,
        cbw_timeout: true,
        cbw_min_cluster_size: true,
        backup_on_cbw_error: false,
        backup_discard_source: true,
        backup_filter_node_name: true,
        transaction_bitmap_merge: true,
        nbd_handshake_limit: true,
    };
    assert_eq!(features, expected);
}
