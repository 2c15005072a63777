//! What administrators do to a domain between two points: the next incremental misses nothing, and
//! is one where libvirt keeps the bitmaps.

use vmbackup::error::Kind;
use vmbackup::platform::{BackupMode, SnapshotRequest};
use vmbackup::vm::{FullReason, ReadMode};

use crate::bare::{Bare, Taken, backup, point, qcow2, request};
use crate::support::TestEnv;

const SINCE_FIRST: fn() -> ReadMode = || ReadMode::Incremental { base: point(1) };
/// Right, if not as small as it could be: nothing tells that the new image was copied from the old.
const REPLACED: ReadMode = ReadMode::Full { reason: FullReason::ImageReplaced };

/// What is called unchanged is as it was at the base.
fn misses_nothing(base: &Taken, now: &Taken) {
    let mut at = 0;
    let whole = now.bytes.len() as u64;
    for (start, end) in now.changed.iter().copied().chain([(whole, whole)]) {
        let unchanged = usize::try_from(at).expect("the test's own")
            ..usize::try_from(start).expect("the test's own");
        assert!(base.bytes[unchanged.clone()] == now.bytes[unchanged], "before {start}");
        at = end;
    }
}

/// Takes a point, lets the guest write before and after `change`, and takes the next: how it was
/// read. Bytes of all three writes and of the first point are compared.
async fn across(env: &TestEnv, change: impl FnOnce(&Bare<'_>)) -> ReadMode {
    let bare = Bare::start(env, &qcow2(env, 'a', "8M"));
    bare.io(0, "write -P 1 0 8M");
    let (first, before) = backup(&bare, &request(1)).await.expect("the test's own");
    bare.io(0, "write -P 2 1M 64k");
    change(&bare);
    bare.io(0, "write -P 3 2M 64k");
    let next = SnapshotRequest { known_points: vec![first.clone()], ..request(2) };
    let (second, now) = backup(&bare, &next).await.expect("the test's own");
    let at = |mib: usize| now[0].bytes[mib << 20];
    assert_eq!((at(0), at(1), at(2)), (1, 2, 3));
    misses_nothing(&before[0], &now[0]);
    // Whatever it was, the chain goes on from here.
    bare.io(0, "write -P 4 3M 64k");
    let known_points = vec![second, first];
    let third = SnapshotRequest { known_points, mode: BackupMode::Incremental, ..request(3) };
    let (_, later) = backup(&bare, &third).await.expect("the test's own");
    assert_eq!(later[0].read, ReadMode::Incremental { base: point(2) });
    misses_nothing(&now[0], &later[0]);
    now[0].read.clone()
}

fn snapshot(bare: &Bare<'_>) {
    let overlay = format!("vda,file={}", bare.env.path("overlay.qcow2").display());
    let create = ["snapshot-create-as", &bare.name, "s", "--disk-only", "--no-metadata"];
    bare.virsh(&[&create[..], &["--diskspec", &overlay]].concat()).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_snapshot() {
    let env = TestEnv::new();
    assert_eq!(across(&env, snapshot).await, SINCE_FIRST());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_committed_again() {
    let env = TestEnv::new();
    let read = across(&env, |bare| {
        snapshot(bare);
        bare.io(0, "write -P 2 1088k 64k");
        bare.virsh(&["blockcommit", &bare.name, "vda", "--active", "--pivot", "--wait"]).ok();
    });
    assert_eq!(read.await, SINCE_FIRST());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_pulled_up() {
    let env = TestEnv::new();
    let read = across(&env, |bare| {
        snapshot(bare);
        bare.virsh(&["blockpull", &bare.name, "vda", "--wait"]).ok();
    });
    assert_eq!(read.await, REPLACED);
}

/// The storage of a running domain is exchanged.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_copied_to_another_place() {
    let env = TestEnv::new();
    let read = across(&env, |bare| {
        let copy = bare.env.path("copy.qcow2");
        let args = ["blockcopy", &bare.name, "vda", &copy.to_string_lossy(), "--format", "qcow2"];
        bare.virsh(&[&args[..], &["--transient-job", "--wait", "--pivot"]].concat()).ok();
    });
    assert_eq!(read.await, REPLACED);
}

/// A file with what the domain is defined by.
fn description(bare: &Bare<'_>) -> String {
    let xml = bare.virsh(&["dumpxml", "--inactive", &bare.name]).ok().stdout;
    let file = bare.env.path("again.xml");
    std::fs::write(&file, xml).expect("own directory");
    file.to_string_lossy().into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_is_undefined_and_defined_again() {
    let env = TestEnv::new();
    let read = across(&env, |bare| {
        let file = description(bare);
        bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
        bare.virsh(&["undefine", &bare.name]).ok();
        bare.virsh(&["define", &file]).ok();
        bare.virsh(&["start", "--paused", &bare.name]).ok();
    });
    assert_eq!(read.await, SINCE_FIRST());
}

/// The bitmaps outlive what libvirt knew of the domain.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_domain_that_is_undefined_and_defined_again_when_it_has_stopped() {
    let env = TestEnv::new();
    let read = across(&env, |bare| {
        let file = description(bare);
        bare.virsh(&["undefine", &bare.name]).ok();
        bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
        bare.virsh(&["define", &file]).ok();
        bare.virsh(&["start", "--paused", &bare.name]).ok();
    });
    assert_eq!(read.await, SINCE_FIRST());
}

/// As clusters run theirs: on whatever host, libvirt knows nothing of it once it has ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_is_not_defined_anywhere_and_created_again() {
    let env = TestEnv::new();
    let read = across(&env, |bare| {
        let file = description(bare);
        bare.virsh(&["undefine", &bare.name]).ok();
        bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
        bare.virsh(&["create", "--paused", &file]).ok();
    });
    assert_eq!(read.await, SINCE_FIRST());
}

/// It holds content from before, and is not applied under a bitmap of now.
#[tokio::test(flavor = "multi_thread")]
async fn an_internal_snapshot_of_the_running_domain() {
    let env = TestEnv::new();
    let read = across(&env, |bare| {
        bare.virsh(&["snapshot-create-as", &bare.name, "s"]).ok();
        bare.io(0, "write -P 2 1088k 64k");
        bare.virsh(&["snapshot-revert", &bare.name, "s"]).fails();
        // libvirt has ended QEMU by then.
        if bare.virsh(&["domstate", &bare.name]).text().trim() == "shut off" {
            bare.virsh(&["start", "--paused", &bare.name]).ok();
        }
    });
    assert_eq!(read.await, SINCE_FIRST());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_whose_memory_is_saved_and_restored() {
    let env = TestEnv::new();
    let read = across(&env, |bare| {
        bare.virsh(&["managedsave", "--running", &bare.name]).ok();
        bare.virsh(&["start", &bare.name]).ok();
    });
    assert_eq!(read.await, SINCE_FIRST());
}

/// Restored paused, QEMU does not own its images until it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_was_restored_and_does_not_run_yet() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    bare.io(0, "write -P 1 0 8M");
    let (first, before) = backup(&bare, &request(1)).await.unwrap();
    bare.io(0, "write -P 2 1M 64k");
    bare.virsh(&["managedsave", "--paused", &bare.name]).ok();
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    let next = SnapshotRequest { known_points: vec![first], ..request(2) };
    // QEMU 10 refuses; whether it does is its own affair.
    if let Err(error) = backup(&bare, &next).await {
        assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
        assert!(error.hint_text().unwrap().contains("virsh resume"), "{error:?}");
        bare.virsh(&["resume", &bare.name]).ok();
        assert_eq!(bare.bitmaps(), [bare.checkpoint(point(1))]);
        let (_, now) = backup(&bare, &next).await.unwrap();
        assert_eq!(now[0].read, SINCE_FIRST());
        misses_nothing(&before[0], &now[0]);
    }
}
