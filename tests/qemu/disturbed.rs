//! What somebody else does at the worst moment of a `--guest-first` backup: between the steps of
//! its instant, and below its filters.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmbackup::control::Control;
use vmbackup::journal::{Entry, Phase, Place, Run};
use vmbackup::platform::qemu::QemuOptions;
use vmbackup::platform::{BackupMode, Platform, SnapshotRequest};

use crate::machine::{Guest, Machine, SIZE, UUID, qemu_is_since};
use crate::reading::{Points, open};
use crate::support::{Outcome, TestEnv};

/// Runs a backup that stands still at `step` while `meanwhile` happens; also how many points there
/// are.
async fn disturbed(
    machine: &Machine,
    step: &str,
    meanwhile: impl AsyncFnOnce(),
) -> (Outcome, usize) {
    let env = TestEnv::new();
    env.init_repo();
    let (monitor, scratch) = (machine.path("qmp.sock"), machine.path("scratch"));
    let (monitor, scratch) = (monitor.to_str().unwrap(), scratch.to_str().unwrap());
    let args = ["full", "--qmp", monitor, "--scratch-dir", scratch, "--guest-first", "--json"];
    let backup = env.stopped_at(step, &args);
    meanwhile().await;
    backup.signal("CONT");
    let outcome = backup.wait();
    let list = env.vmbackup(&["list", "--json"]).json();
    let journals = std::fs::read_dir(env.path("state/journal")).unwrap().count();
    assert_eq!(journals, 0, "{outcome:?}");
    (outcome, list["points"].as_array().unwrap().len())
}

/// QEMU lets none begin on the disks themselves once the filters are above their nodes.
#[tokio::test]
async fn a_block_job_that_begins_before_the_devices_move_keeps_them_where_they_are() {
    let machine = Machine::with(Guest::Idle).await;
    let (outcome, points) = disturbed(&machine, "before:pause", async || {
        for node in ["source", "theirs"] {
            let node = json!({ "driver": "null-co", "node-name": node, "size": SIZE,
                "read-zeroes": true });
            machine.side.blockdev_add(node).await.unwrap();
        }
        let mirror = |device: &str| {
            json!({ "device": device, "target": "theirs", "sync": "none",
            "job-id": "their-job" })
        };
        assert!(machine.side.execute_raw("blockdev-mirror", mirror("b")).await.is_err());
        machine.side.execute_raw("blockdev-mirror", mirror("source")).await.unwrap();
    })
    .await;
    assert_eq!((outcome.code, points), (Some(7), 0), "busy: {outcome:?}");
    assert!(outcome.stderr.contains("their-job"), "{outcome:?}");
    assert_eq!(machine.tops().await, ["a", "b"]);
    assert_eq!(machine.side.query_jobs().await.unwrap().len(), 1);
    assert!(machine.runs().await);
    crate::guest_first::end(&machine).await;
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn a_disk_that_gets_an_overlay_before_the_devices_move_keeps_it() {
    let machine = Machine::with(Guest::Idle).await;
    let (outcome, points) = disturbed(&machine, "before:pause", async || {
        let overlay = json!({ "node-name": "b", "snapshot-file": machine.path("overlay.qcow2"),
            "snapshot-node-name": "overlay", "format": "qcow2" });
        machine.side.execute_raw("blockdev-snapshot-sync", overlay).await.unwrap();
    })
    .await;
    assert_eq!((outcome.code, points), (Some(16), 0), "lost: {outcome:?}");
    assert!(outcome.stderr.contains("another image"), "{outcome:?}");
    assert_eq!(machine.tops().await, ["a", "overlay"]);
    assert!(machine.runs().await);
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn a_guest_that_somebody_lets_go_on_between_the_instants_of_its_disks_has_none() {
    let machine = Machine::with(Guest::Idle).await;
    let (outcome, points) = disturbed(&machine, "before:filter", async || {
        assert!(!machine.runs().await, "the backup has paused it");
        machine.side.cont().await.unwrap();
    })
    .await;
    assert_eq!((outcome.code, points), (Some(16), 0), "lost: {outcome:?}");
    assert!(outcome.stderr.contains("let the guest go on"), "{outcome:?}");
    assert!(machine.runs().await);
    assert_eq!(machine.tops().await, ["a", "b"]);
    machine.holds_only(&[]).await;
}

/// Whether an image that is not active can be given to the QEMU here; says so if not. Before, images
/// are only inactive where the VM itself was migrated to or from.
fn takes_inactive_images() -> bool {
    qemu_is_since(10, 0)
}

/// Gives QEMU an image of somebody else, which breaks.
async fn broken_image(machine: &Machine) {
    let image = machine.path("theirs.qcow2");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1M");
    assert!(make.status().unwrap().success());
    let file = json!({ "driver": "file", "filename": image, "active": false });
    let theirs = json!({ "driver": "qcow2", "node-name": "theirs", "active": false, "file": file });
    machine.side.blockdev_add(theirs).await.unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&[0; 4096], 0).unwrap();
}

/// As a run leaves it that was killed in its pause, and its guardian with it.
#[tokio::test]
async fn a_guest_that_was_left_paused_goes_on_although_qemu_tells_of_no_node() {
    if !takes_inactive_images() {
        return;
    }
    let mut machine = Machine::with(Guest::Idle).await;
    let (points, dead) = (Points::default(), machine.next_point());
    let QemuOptions { monitor, agent, name, journals } = machine.options("qmp.sock");
    let mut journal = journals.open(UUID.parse().unwrap()).unwrap();
    journal.begin(Run::new(dead, "plain", "theirs", Place::Qemu { monitor, agent, name }));
    journal.note([Entry::of(Phase::Pause)]).unwrap();
    drop(journal);
    let marker = format!("vmb-pse-{}-0", dead.short());
    let marker = json!({ "driver": "null-co", "node-name": marker, "size": 0 });
    machine.side.blockdev_add(marker).await.unwrap();
    machine.side.stop().await.unwrap();
    broken_image(&machine).await;
    // It breaks for QEMU when it is activated, as for a guest that goes on.
    assert!(machine.side.cont().await.is_err());
    assert!(machine.side.query_named_block_nodes().await.is_err() && !machine.runs().await);
    let next = machine.next_point();
    let request = points.request(&machine, next);
    let platform = machine.platform().await;
    let control = Control::new();
    let refused = platform.open_snapshot(&request, &control).await.err().unwrap();
    assert!(refused.to_string().contains("VM 'plain' goes on"), "{refused:?}");
    assert!(refused.to_string().contains("what else that left is not known"), "{refused:?}");
    let told = control.notices_from(0);
    assert!(told.iter().any(|told| told.text.contains("pause of VM 'plain'")), "{told:?}");
    assert!(machine.runs().await);
}

/// QEMU tries to activate all images first, fails for one of somebody else, and does not try that
/// again; nor does it tell of any node while that one is there.
#[tokio::test]
async fn a_guest_that_does_not_go_on_at_once_is_let_go_on_once_more() {
    if !takes_inactive_images() {
        return;
    }
    let machine = Machine::with(Guest::Idle).await;
    let (outcome, points) =
        disturbed(&machine, "before:filter", async || broken_image(&machine).await).await;
    // What the broken image keeps QEMU from telling costs a full read next time, no more.
    assert_eq!((outcome.code, points), (Some(19), 1), "unfinished: {outcome:?}");
    assert!(outcome.stderr.contains("theirs is ejected"), "QEMU did fail once: {outcome:?}");
    assert!(machine.runs().await);
    assert_eq!(machine.tops().await, ["a", "b"]);
}

/// Gives QEMU an image that somebody else has open for so many seconds: until then it cannot activate
/// it, and lets no guest go on.
async fn held_image(machine: &Machine, seconds: u32) -> Child {
    let image = machine.path("theirs.qcow2");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1M");
    assert!(make.status().unwrap().success());
    let file = json!({ "driver": "file", "filename": image, "active": false });
    let theirs = json!({ "driver": "qcow2", "node-name": "theirs", "active": false, "file": file });
    machine.side.blockdev_add(theirs).await.unwrap();
    let mut holder = Command::new("stdbuf")
        .args(["-o0", "qemu-io", "-f", "qcow2", "-c", "read 0 512", "-c"])
        .arg(format!("sleep {}", seconds * 1000))
        .arg(&image)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("512/512"), "{line}");
    assert!(machine.side.cont().await.is_err());
    holder
}

#[tokio::test]
async fn a_guest_that_does_not_go_on_for_some_seconds_is_let_go_on_before_anything_else() {
    if !takes_inactive_images() {
        return;
    }
    let machine = Machine::with(Guest::Idle).await;
    let mut holder = None;
    let (outcome, points) = disturbed(&machine, "before:filter", async || {
        holder = Some(held_image(&machine, 3).await);
    })
    .await;
    assert!(holder.unwrap().wait().unwrap().success());
    assert_eq!((outcome.code, points), (Some(0), 1), "{outcome:?}");
    assert!(machine.runs().await);
    assert_eq!(machine.tops().await, ["a", "b"]);
}

/// An agent, which answers no thaw as long as its guest is paused.
pub(crate) fn agent(socket: &Path, runs: Arc<AtomicBool>) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut answers = stream.try_clone().unwrap();
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let command = line.strip_prefix(&[0xff]).unwrap_or(&line);
                let command: Value = serde_json::from_slice(command).unwrap();
                let (mut delimiter, mut answer) = (&[][..], json!(2));
                match command["execute"].as_str().unwrap() {
                    "guest-sync-delimited" => {
                        (delimiter, answer) = (&[0xff], command["arguments"]["id"].clone());
                    }
                    "guest-get-fsinfo" => answer = json!([]),
                    "guest-fsfreeze-thaw" => {
                        while !runs.load(Ordering::SeqCst) {
                            std::thread::sleep(Duration::from_millis(50));
                        }
                    }
                    _ => {}
                }
                let text = format!("{}\n", json!({ "return": answer }));
                // Whoever asked may have gone.
                let _ = answers.write_all(&[delimiter, text.as_bytes()].concat());
            }
        }
    });
}

/// Found in review: its agent, which does not answer as long as it is paused, was waited for first.
#[tokio::test]
async fn a_frozen_guest_that_does_not_go_on_is_let_go_on_while_its_thaw_is_waited_for() {
    if !takes_inactive_images() {
        return;
    }
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::with(Guest::Idle).await;
    let (runs, socket) = (Arc::<AtomicBool>::default(), machine.path("agent.sock"));
    agent(&socket, Arc::clone(&runs));
    let (monitor, scratch) = (machine.path("qmp.sock"), machine.path("scratch"));
    let [monitor, scratch, socket] = [&monitor, &scratch, &socket].map(|p| p.to_str().unwrap());
    let args = ["full", "--qmp", monitor, "--agent", socket, "--scratch-dir", scratch];
    let args = [&args[..], &["--guest-first", "--freeze-budget=60s"]].concat();
    let backup = env.stopped_at("before:filter", &args);
    // Longer than it is tried before the thaw.
    let mut holder = held_image(&machine, 9).await;
    backup.signal("CONT");
    let begun = Instant::now();
    while !machine.runs().await {
        assert!(begun.elapsed() < Duration::from_secs(25), "it is still paused");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    runs.store(true, Ordering::SeqCst);
    let outcome = backup.wait();
    assert!(holder.wait().unwrap().success());
    assert!(outcome.code.is_some_and(|code| code > 0), "{outcome:?}");
    assert!(outcome.stderr.contains("cannot let the guest go on"), "{outcome:?}");
    assert_eq!(machine.tops().await, ["a", "b"]);
    machine.holds_only(&[]).await;
}

/// Moved to the node it had, the device would write below what it wrote meanwhile; QEMU does not
/// let it.
#[tokio::test]
async fn a_device_whose_disk_got_an_overlay_below_the_filter_goes_on_with_the_overlay() {
    let mut machine = Machine::with(Guest::Idle).await;
    machine.guest("disk-b", "write -P 1 0 4M").await;
    let oracle = machine.oracle().await;
    let (mut points, point) = (Points::default(), machine.next_point());
    let request = SnapshotRequest { guest_first: true, ..points.request(&machine, point) };
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    let overlay = json!({ "node-name": "b", "snapshot-file": machine.path("overlay.qcow2"),
        "snapshot-node-name": "overlay", "format": "qcow2" });
    machine.side.execute_raw("blockdev-snapshot-sync", overlay).await.unwrap();
    machine.guest("disk-b", "write -P 2 1M 1M").await;
    let reads = points.read_all(snapshot.as_mut()).await.unwrap();
    assert!(reads.iter().zip(&oracle).all(|(read, oracle)| read.content == *oracle));
    snapshot.still_valid().await.unwrap();
    snapshot.commit().await.unwrap();
    drop(platform);
    assert_eq!(machine.tops().await, ["a", "overlay"]);
    machine.holds_only(&[point]).await;
    machine.guest("disk-b", "write -P 3 3M 1M").await;
    assert!(machine.reads("disk-b", "read -P 2 1M 1M").await);
    let (_, reads) = points.back_up(&mut machine, BackupMode::Auto, &[]).await;
    let at = |mib: usize| reads[1].content[mib << 20];
    assert_eq!((at(0), at(1), at(2), at(3), at(4)), (1, 2, 1, 3, 0));
}
