//! The way to libvirt ends where a new point is to take the place of an older one, whose bitmap only QEMU's
//! memory has: no image names it.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use vmbackup::control::Control;
use vmbackup::error::{Kind, Result};
use vmbackup::journal::{Moment, Phase, Place, Run};
use vmbackup::platform::{KnownPoint, Platform, SnapshotRequest};
use vmbackup::vm::ReadMode;

use crate::bare::{Bare, REPOSITORY, backup, known, point, qcow2, recover, request};
use crate::proxy::Proxy;
use crate::support::{OwnLibvirt, TestEnv, libvirt};

/// The domain has two disks, because checkpoints may be dropped on one of them only.
fn started(env: &TestEnv) -> Bare<'_> {
    Bare::start(env, &(qcow2(env, 'a', "8M") + &qcow2(env, 'b', "8M")))
}

/// A backup after these points, the newest first.
fn next(id: u8, known: &[KnownPoint]) -> SnapshotRequest {
    let point_ids = known.iter().map(|point| point.id).collect();
    SnapshotRequest { known_points: known.to_vec(), point_ids, ..request(id) }
}

/// Takes a backup through a way that something happens to right before the hand-over; how its commit ends.
async fn disturbed(
    (bare, proxy): (&Bare<'_>, &Proxy),
    request: &SnapshotRequest,
    act: impl Fn(&Proxy) + Send + Sync + 'static,
) -> (KnownPoint, Result<()>) {
    let way = proxy.clone();
    let platform = proxy.at(bare, (Phase::Handover, Moment::Before), move || act(&way)).await;
    let snapshot = platform.open_snapshot(request, &Control::new()).await.expect("opens");
    let known = known(request.point, &*snapshot);
    (known, snapshot.commit().await)
}

/// Requires that nothing but the bitmap of a point is left.
#[track_caller]
fn assert_only(bare: &Bare<'_>, id: u8) {
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(id))]);
    assert_eq!((bare.checkpoints(), bare.journals()), (Vec::new(), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_at_the_hand_over_is_made_anew() {
    let env = TestEnv::new();
    let bare = started(&env);
    let proxy = Proxy::start(&env);
    let (first, _) = backup(&bare, &request(1)).await.expect("backs up");
    let (_, committed) = disturbed((&bare, &proxy), &next(2, &[first]), Proxy::cut).await;
    committed.expect("commits");
    assert_only(&bare, 2);
}

/// As when the call that deletes it was cut off half way: "there is none of that name" is no proof then.
#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_goes_although_libvirt_has_lost_its_checkpoint_while_the_connection_was_cut() {
    let env = TestEnv::new();
    let bare = started(&env);
    let proxy = Proxy::start(&env);
    let (first, _) = backup(&bare, &request(1)).await.expect("backs up");
    let (name, checkpoint) = (bare.name.clone(), bare.checkpoint(point(1)));
    let lost = move |proxy: &Proxy| {
        proxy.cut();
        let delete = ["checkpoint-delete", "--metadata", &name, &checkpoint];
        let status = Command::new("virsh").args(["-q", "-c", libvirt::URI]).args(delete).status();
        assert!(status.expect("virsh runs").success());
    };
    let (_, committed) = disturbed((&bare, &proxy), &next(2, &[first]), lost).await;
    committed.expect("commits");
    assert_only(&bare, 2);
}

/// The record of it was closed with the run's own.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_handed_over_is_left_to_the_next_backup_however_often() {
    let env = TestEnv::new();
    let bare = started(&env);
    let proxy = Proxy::start(&env);
    let mut points = vec![backup(&bare, &request(1)).await.expect("backs up").0];
    for id in [2, 3] {
        let (taken, committed) = disturbed((&bare, &proxy), &next(id, &points), Proxy::stop).await;
        let error = committed.expect_err("there is no way to libvirt");
        assert_eq!(error.kind(), Kind::Connection, "{error:?}");
        assert!(error.to_string().contains("is complete, but"), "{error}");
        points.insert(0, taken);
        proxy.go_on();
        // It takes libvirt's records away, which tell of the newest two of the bitmaps.
        let found = recover(&bare, next(9, &points)).await;
        assert_eq!(found.lines().filter(|line| line.starts_with("checkpoint of")).count(), 2);
        assert_eq!(recover(&bare, next(9, &points)).await, "");
        assert_eq!((bare.bitmaps().len(), bare.checkpoints().len()), (points.len(), 0));
        assert_eq!(bare.journals(), 1);
    }
    let (_, read) = backup(&bare, &next(4, &points)).await.expect("backs up");
    assert!(read.iter().all(|disk| disk.read == ReadMode::Incremental { base: point(3) }));
    assert_only(&bare, 4);
}

/// Lets a QEMU go on.
struct Stopped(String);

impl Stopped {
    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.0]).status();
        assert!(status.expect("kill runs").success(), "QEMU is gone");
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-CONT", &self.0]).status();
    }
}

/// A command waits 30 seconds for its turn.
#[test]
fn what_libvirt_has_no_time_for_is_left_to_the_next_backup() {
    // A QEMU that says nothing holds up the events of all domains.
    OwnLibvirt::with(|_| {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(left_to_the_next_backup());
    });
}

async fn left_to_the_next_backup() {
    let env = TestEnv::new();
    let bare = started(&env);
    let proxy = Proxy::start(&env);
    let mut points = vec![backup(&bare, &request(1)).await.expect("backs up").0];
    let pid = std::fs::read_to_string(format!("/run/libvirt/qemu/{}.pid", bare.name));
    let qemu = Arc::new(Stopped(pid.expect("it runs").trim().to_owned()));
    let (name, stopped) = (bare.name.clone(), Arc::clone(&qemu));
    // Somebody's command that takes its time.
    let busy = move |_: &Proxy| {
        stopped.signal("-STOP");
        let command = ["qemu-monitor-command", &name, r#"{"execute":"query-status"}"#];
        let mut virsh = Command::new("virsh");
        virsh.args(["-q", "-c", libvirt::URI]).args(command).stdout(Stdio::null());
        let mut virsh = virsh.spawn().expect("virsh runs");
        std::thread::spawn(move || virsh.wait());
        std::thread::sleep(Duration::from_millis(500));
    };
    let (taken, committed) = disturbed((&bare, &proxy), &next(2, &points), busy).await;
    qemu.signal("-CONT");
    let error = committed.expect_err("nobody else gets a turn");
    assert!(matches!(error.kind(), Kind::Timeout | Kind::Busy), "{error:?}");
    assert!(error.to_string().contains("is complete, but"), "{error}");
    assert_eq!((bare.bitmaps().len(), bare.journals()), (2, 1));
    points.insert(0, taken);
    let (_, read) = backup(&bare, &next(3, &points)).await.expect("backs up");
    assert!(read.iter().all(|disk| disk.read == ReadMode::Incremental { base: point(2) }));
    assert_only(&bare, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_domain_has_nothing_that_was_left_to_the_next_backup() {
    let env = TestEnv::new();
    let bare = Bare::define(&env, "", &qcow2(&env, 'a', "8M"), "");
    let mut journal = bare.options().journals.open(bare.uuid).expect("readable");
    let place = Place::Libvirt { uri: libvirt::URI.into() };
    journal.begin(Run::new(point(2), &bare.name, REPOSITORY, place));
    journal.hand_over(REPOSITORY, &[point(1)]).expect("written");
    drop(journal);
    assert_eq!(bare.journals(), 1);
    backup(&bare, &request(3)).await.expect("backs up");
    assert_eq!(bare.journals(), 0);
}
