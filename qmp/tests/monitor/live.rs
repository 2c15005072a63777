//! The same scenarios against the QEMU that is installed, and what only a live one can show.

use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp::{Address, Error, Kind, Monitor, Options};
use serde_json::json;

use crate::peer::{self, Listener};
use crate::qemu::Qemu;
use crate::scenarios::{self, Setup};

/// A QEMU for the scenario and a connection to it; with `QMP_RECORD` set, through the recorder.
struct Stage {
    monitor: Monitor,
    recording: Option<tokio::task::JoinHandle<()>>,
    qemu: Qemu,
}

async fn stage(name: &str, setup: &Setup) -> Stage {
    let qemu = Qemu::start(setup.images, setup.arguments);
    if std::env::var_os("QMP_RECORD").is_none() {
        let monitor = qemu.connect().await;
        return Stage { monitor, recording: None, qemu };
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/monitor/transcripts");
    let (listener, socket, file) = (Listener::new(), qemu.socket(), format!("{name}-10.0.2.txt"));
    let address = listener.address();
    let to: PathBuf = dir.join(file);
    let recording = tokio::spawn(async move { peer::record(socket, listener, &to).await });
    let monitor = Monitor::connect(&address, Options::default()).await.unwrap();
    Stage { monitor, recording: Some(recording), qemu }
}

impl Stage {
    async fn end(self) {
        drop(self.monitor);
        if let Some(recording) = self.recording {
            recording.await.unwrap();
        }
        drop(self.qemu);
    }
}

#[tokio::test]
async fn bitmaps_are_added_merged_stopped_and_removed() {
    let stage = stage("bitmaps", &scenarios::BITMAPS).await;
    scenarios::bitmaps(&stage.monitor).await;
    stage.end().await;
}

#[tokio::test]
async fn two_disks_are_kept_at_one_instant_and_exported() {
    let stage = stage("pull_backup", &scenarios::PULL_BACKUP).await;
    scenarios::pull_backup(&stage.monitor).await;
    stage.end().await;
}

#[tokio::test]
async fn features_come_from_the_schema() {
    let stage = stage("schema", &scenarios::SCHEMA).await;
    let (major, minor, _) = stage.monitor.greeting().version.number;
    let features = stage.monitor.query_schema().await.unwrap().features();
    // The table of all fields is the replay's, for one version; here what the floor (7.2) has.
    assert!((major, minor) >= (7, 2));
    assert!(features.snapshot_access && features.export_bitmap_by_node && features.cbw_on_error);
    stage.end().await;
}

#[tokio::test]
async fn a_monitor_that_another_client_holds_says_so() {
    let qemu = Qemu::start(&[], &["-machine", "none"]);
    let first = qemu.connect().await;
    let options = Options { greeting: Duration::from_millis(300), ..Options::default() };
    let second = Monitor::connect(&Address::Unix(qemu.socket()), options).await.err().unwrap();
    assert_eq!(second.kind(), Kind::Occupied);
    assert!(second.to_string().contains("another client holds it"), "{second}");
    // The first is unharmed, and its end frees the monitor.
    first.query_status().await.unwrap();
    drop(first);
    qemu.connect().await.query_status().await.unwrap();
}

#[tokio::test]
async fn commands_dropped_at_any_time_hurt_no_other() {
    let qemu = Qemu::start(&[], &["-machine", "none"]);
    let monitor = qemu.connect().await;
    for micros in 0..24 {
        let brief = Duration::from_micros(micros * 50);
        let _ = tokio::time::timeout(brief, monitor.query_schema()).await;
        let (name, status) = tokio::join!(monitor.query_name(), monitor.query_status());
        assert_eq!(name.unwrap(), None);
        assert_eq!(status.unwrap().status, "prelaunch");
    }
}

#[tokio::test]
async fn out_of_band_commands_are_answered() {
    let qemu = Qemu::start(&[], &["-machine", "none"]);
    let monitor = qemu.connect().await;
    let (yank, status) =
        tokio::join!(monitor.execute_oob("query-yank", json!({})), monitor.query_status());
    assert!(yank.unwrap().is_array());
    status.unwrap();
}

#[tokio::test]
async fn a_killed_qemu_ends_commands_and_subscriptions_with_closed() {
    let mut qemu = Qemu::start(&[], &["-machine", "none"]);
    let monitor = qemu.connect().await;
    let mut events = monitor.subscribe();
    qemu.kill();
    assert!(matches!(events.recv().await, Err(Error::Closed { .. })));
    assert_eq!(monitor.query_status().await.unwrap_err().kind(), Kind::Connection);
    assert!(matches!(monitor.subscribe().recv().await, Err(Error::Closed { .. })));
    let gone = Monitor::connect(&Address::Unix(qemu.socket()), Options::default()).await;
    assert_eq!(gone.err().unwrap().kind(), Kind::Connection);
    assert!(qemu.dir().exists());
}

#[tokio::test]
async fn a_monitor_on_tcp_is_a_monitor() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let tcp = format!("tcp:127.0.0.1:{port},server=on,wait=off");
    let _qemu = Qemu::start(&[], &["-machine", "none", "-qmp", &tcp]);
    let address = Address::Tcp(format!("127.0.0.1:{port}"));
    let monitor = Monitor::connect(&address, Options::default()).await.unwrap();
    assert!(!monitor.query_status().await.unwrap().running);
}
