//! Bitmaps under names of ours that are not what their name says, or cease to be at the last moment.

use serde_json::Value;
use vmbackup::control::Control;
use vmbackup::platform::{KnownPoint, Platform, SnapshotRequest};
use vmbackup::vm::{FullReason, ReadMode};

use crate::bare::{Bare, backup, point, qcow2, request, take};
use crate::support::{TestEnv, assert_same_content};

const MIB: u64 = 1 << 20;
const IMAGE: &str = "vda.qcow2";

fn full(reason: FullReason) -> ReadMode {
    ReadMode::Full { reason }
}

fn next(id: u8, known: &KnownPoint) -> SnapshotRequest {
    SnapshotRequest { known_points: vec![known.clone()], ..request(id) }
}

/// Nothing is lost, and the name is free again when libvirt learns of the bitmap.
#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_that_has_the_name_of_the_point_to_come_fails_that_backup_only() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    bare.io(0, "write -P 1 0 8M");
    let (first, _) = backup(&bare, &request(1)).await.expect("backs up");
    bare.io(0, "write -P 2 1M 64k");
    let taken = bare.checkpoint(point(2));
    bare.change_bitmap("block-dirty-bitmap-add", IMAGE, &taken);
    let error = backup(&bare, &next(2, &first)).await.expect_err("the name is taken");
    assert!(error.in_one_line().contains("Bitmap already exists"), "{error:?}");
    assert!(!bare.has_backup_job());
    assert_eq!((bare.checkpoints(), bare.sockets()), (Vec::new(), Vec::new()));
    assert_eq!(std::fs::read_dir(env.path("state/journal")).expect("there").count(), 0);

    let (third, read) = backup(&bare, &next(3, &first)).await.expect("backs up");
    assert_eq!(read[0].read, ReadMode::Incremental { base: point(1) });
    assert_eq!(read[0].changed, [(MIB, MIB + 65536)]);
    // QEMU stores it when it ends: it is of no point, and goes.
    bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    assert!(bare.bitmaps().contains(&taken));
    let (_, read) = backup(&bare, &next(4, &third)).await.expect("backs up");
    assert_eq!(read[0].read, ReadMode::Incremental { base: point(3) });
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(4))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_that_does_not_record_under_libvirt_is_not_believed() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &(qcow2(&env, 'a', "8M") + &qcow2(&env, 'b', "8M")));
    let (first, _) = backup(&bare, &request(1)).await.expect("backs up");
    bare.change_bitmap("block-dirty-bitmap-disable", IMAGE, &bare.checkpoint(point(1)));
    bare.io(0, "write -P 3 4M 64k");
    // Stored, it says so of itself.
    for (id, reason) in [(2, FullReason::BitmapMissing), (3, FullReason::BitmapNotRecording)] {
        let platform = bare.platform().await;
        let opened = platform.open_snapshot(&next(id, &first), &Control::new()).await;
        let mut snapshot = opened.expect("opens");
        let read = take(&mut *snapshot).await;
        assert_eq!(read[0].read, full(reason));
        assert_eq!(read[1].read, ReadMode::Incremental { base: point(1) });
        assert_eq!(read[0].bytes[4 << 20], 3);
        snapshot.abort().await.expect("aborts");
        bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
        bare.virsh(&["start", "--paused", &bare.name]).ok();
    }
}

/// A domain with a disk of 16 MiB of data, of which an audit looks at every block, and another, and a point.
fn begun(env: &TestEnv) -> Bare<'_> {
    env.init_repo();
    let bare = Bare::start(env, &(qcow2(env, 'a', "16M") + &qcow2(env, 'b', "4M")));
    bare.io(0, "write -P 1 0 16M");
    env.vmbackup(&["full", "--domain", &bare.name]).ok();
    bare
}

/// Restores a point: it equals what the image holds, which nobody writes to meanwhile.
#[track_caller]
pub(crate) fn prove(bare: &Bare<'_>, report: &Value) {
    let (env, point) = (bare.env, report["point"].as_str().expect("a point id"));
    bare.io(0, "flush");
    let (image, to, oracle) = (env.path(IMAGE), env.path(point), env.path("oracle.raw"));
    let paths = [&image, &oracle].map(|path| path.to_str().expect("UTF-8"));
    env.run("qemu-img", &[&["convert", "-U", "-O", "raw"], &paths[..]].concat()).ok();
    let to_directory = to.to_str().expect("UTF-8");
    env.vmbackup(&["restore", point, "--to", to_directory, "--format", "raw"]).ok();
    assert_same_content(env, (&to.join("vda.raw"), "raw"), (&oracle, "raw"));
}

/// The next point is an incremental again, and right.
#[track_caller]
fn goes_on(bare: &Bare<'_>) {
    bare.io(0, "write -P 9 9M 64k");
    let report = bare.env.vmbackup(&["backup", "--domain", &bare.name, "--json"]).json();
    assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{report}");
    prove(bare, &report);
    assert_eq!((bare.bitmaps().len(), bare.checkpoints().len()), (1, 0), "{:?}", bare.bitmaps());
}

/// libvirt asks QEMU for the bitmaps as it begins the job, after we have.
#[test]
fn a_bitmap_that_breaks_right_before_the_job_begins_is_not_believed() {
    let env = TestEnv::new();
    let bare = begun(&env);
    for (at, how) in ["block-dirty-bitmap-disable", "block-dirty-bitmap-remove"].iter().enumerate()
    {
        let of_base = bare.bitmaps().remove(0);
        let backup = env.stopped_at("before:job", &["backup", "--domain", &bare.name, "--json"]);
        bare.change_bitmap(how, IMAGE, &of_base);
        bare.io(0, &format!("write -P 3 {}M 64k", 4 + at));
        backup.signal("CONT");
        let report = backup.wait().json();
        assert_eq!(report["disks"][0]["read"]["reason"], "bitmap-inconsistent", "{how}: {report}");
        prove(&bare, &report);
        goes_on(&bare);
    }
    // Who wants an incremental gets no other.
    let held = bare.bitmaps();
    let args = ["incremental", "--domain", &bare.name, "--json"];
    let backup = env.stopped_at("before:job", &args);
    bare.change_bitmap("block-dirty-bitmap-disable", IMAGE, &held[0]);
    backup.signal("CONT");
    let outcome = backup.wait();
    let outcome = outcome.fails_with(&["bitmap", "take a full backup first: 'vmbackup full'"]);
    assert_eq!(outcome.code, Some(17), "{outcome:?}");
    assert!(!bare.has_backup_job());
    assert_eq!((bare.checkpoints(), bare.bitmaps()), (Vec::new(), held));
}

/// A bitmap under the base's name that has not recorded all along does not show it: the audit finds out.
#[test]
fn a_bitmap_of_the_name_of_the_base_that_is_not_its_bitmap_is_caught_by_the_audit() {
    let env = TestEnv::new();
    let bare = begun(&env);
    let lies: [&dyn Fn(&str); 3] = [
        &|name| {
            bare.change_bitmap("block-dirty-bitmap-disable", IMAGE, name);
            bare.io(0, "write -P 4 4M 64k");
            bare.change_bitmap("block-dirty-bitmap-enable", IMAGE, name);
        },
        &|name| {
            bare.io(0, "write -P 5 5M 64k");
            bare.change_bitmap("block-dirty-bitmap-remove", IMAGE, name);
            bare.change_bitmap("block-dirty-bitmap-add", IMAGE, name);
        },
        &|name| {
            bare.io(0, "write -P 6 6M 64k");
            bare.change_bitmap("block-dirty-bitmap-clear", IMAGE, name);
        },
    ];
    for lie in lies {
        bare.io(0, "write -P 7 8M 64k");
        lie(&bare.bitmaps().remove(0));
        bare.io(0, "write -P 8 10M 64k");
        let report = env.vmbackup(&["incremental", "--domain", &bare.name, "--json"]).json();
        assert_eq!(report["disks"][0]["read"]["reason"], "bitmap-distrusted", "{report}");
        prove(&bare, &report);
        goes_on(&bare);
    }
}

/// One that a killed or forgotten run left behind in libvirt's records.
#[test]
fn a_checkpoint_of_ours_without_a_bitmap_and_without_a_point_goes() {
    let env = TestEnv::new();
    let bare = begun(&env);
    let of_base = bare.bitmaps().remove(0);
    let (chain, _) = of_base.rsplit_once('-').expect("a name of ours");
    let stale = format!("{chain}-{}", "ab".repeat(16));
    let xml = env.path("stale.xml");
    let text = format!(
        "<domaincheckpoint><name>{stale}</name><creationTime>1</creationTime><disks>\
         <disk name='vda' checkpoint='bitmap' bitmap='{stale}'/></disks></domaincheckpoint>"
    );
    std::fs::write(&xml, text).expect("own directory");
    let path = xml.to_string_lossy();
    bare.virsh(&["checkpoint-create", &bare.name, &path, "--redefine"]).ok();
    assert_eq!(bare.checkpoints(), [stale]);
    goes_on(&bare);
}

/// libvirt refuses a checkpoint of such a disk, and with it the whole job.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_disk_of_qcow2_version_2_is_read_in_full_beside_an_incremental_one() {
    let env = TestEnv::new();
    let disks = qcow2(&env, 'a', "8M") + &qcow2(&env, 'b', "8M");
    let image = env.path(IMAGE);
    let old = ["create", "-q", "-f", "qcow2", "-o", "compat=0.10", image.to_str().expect("UTF-8")];
    env.run("qemu-img", &[&old[..], &["8M"]].concat()).ok();
    let bare = Bare::start(&env, &disks);
    let (first, _) = backup(&bare, &request(1)).await.expect("backs up");
    bare.io(0, "write -P 3 4M 64k");
    bare.io(1, "write -P 4 4M 64k");
    let (_, read) = backup(&bare, &next(2, &first)).await.expect("backs up");
    assert_eq!(read[0].read, full(FullReason::FormatWithoutBitmaps));
    assert_eq!(read[1].read, ReadMode::Incremental { base: point(1) });
    assert_eq!(read[1].changed, [(4 * MIB, 4 * MIB + 65536)]);
    assert_eq!((read[0].bytes[4 << 20], read[1].bytes[4 << 20]), (3, 4));
}
