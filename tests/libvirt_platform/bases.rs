//! An incremental never builds on the wrong base: images that changed places, were copied, got
//! overlays, or changed between the first look and the lock.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use vmbackup::control::Control;
use vmbackup::platform::{BackupMode, KnownPoint, Platform, SnapshotRequest};
use vmbackup::vm::{FullReason, ReadMode};

use crate::bare::{Bare, backup, point, qcow2, request};
use crate::support::{Outcome, TestEnv};

const MIB: u64 = 1 << 20;
const REPLACED: ReadMode = ReadMode::Full { reason: FullReason::ImageReplaced };

fn next(id: u8, known: &KnownPoint) -> SnapshotRequest {
    SnapshotRequest { known_points: vec![known.clone()], ..request(id) }
}

/// A stopped domain with two disks of one size, each full of its own byte, and point 1 of it.
async fn twins(env: &TestEnv) -> (Bare<'_>, KnownPoint) {
    let bare = Bare::define(env, "", &(qcow2(env, 'a', "4M") + &qcow2(env, 'b', "4M")), "");
    write(env, "vda.qcow2", "write -P 0xa 0 4M");
    write(env, "vdb.qcow2", "write -P 0xb 0 4M");
    let (known, _) = backup(&bare, &request(1)).await.expect("the test's own");
    (bare, known)
}

fn bitmaps(env: &TestEnv, image: &str) -> Vec<String> {
    let path = env.path(image);
    let info = env.run("qemu-img", &["info", "--output=json", &path.to_string_lossy()]).json();
    let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    list.iter().map(|bitmap| bitmap["name"].as_str().expect("named").to_owned()).collect()
}

fn write(env: &TestEnv, image: &str, command: &str) {
    let path = env.path(image);
    env.run("qemu-io", &["-f", "qcow2", "-c", command, &path.to_string_lossy()]).ok();
}

/// Gives the domain other disks.
fn redefine(bare: &Bare<'_>, edit: impl Fn(&str) -> String) {
    let xml = bare.virsh(&["dumpxml", "--inactive", &bare.name]).ok().stdout;
    let file = bare.env.path("edited.xml");
    std::fs::write(&file, edit(&xml)).expect("the test's own");
    bare.virsh(&["define", &file.to_string_lossy()]).ok();
}

/// Both disks are read in full because of another image, running or stopped, and hold these bytes.
async fn both_are_replaced(bare: &Bare<'_>, known: &KnownPoint, holds: [u8; 2]) {
    for state in ["stopped", "running"] {
        if state == "running" {
            bare.virsh(&["start", "--paused", &bare.name]).ok();
        }
        let plan = bare.platform().await.plan(&next(2, known)).await.expect("the test's own");
        assert_eq!(
            plan.disks.iter().filter(|disk| disk.read == Some(REPLACED)).count(),
            2,
            "{state}"
        );
        let platform = bare.platform().await;
        let mut snapshot =
            platform.open_snapshot(&next(2, known), &Control::new()).await.expect("the test's own");
        let taken = crate::bare::take(&mut *snapshot).await;
        for (disk, byte) in taken.iter().zip(holds) {
            assert_eq!(disk.read, REPLACED, "{state}");
            assert!(disk.bytes.iter().all(|b| *b == byte), "{state}");
        }
        snapshot.abort().await.expect("the test's own");
    }
}

/// The bitmaps of all disks of a checkpoint have one name: only the images tell them apart.
#[tokio::test(flavor = "multi_thread")]
async fn disks_that_changed_places_are_read_in_full() {
    let env = TestEnv::new();
    let (bare, known) = twins(&env).await;
    redefine(&bare, |xml| {
        let (a, b) = ("/vda.qcow2'", "/vdb.qcow2'");
        xml.replace(a, "/@'").replace(b, a).replace("/@'", b)
    });
    both_are_replaced(&bare, &known, [0xb, 0xa]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_changed_places_are_read_in_full() {
    let env = TestEnv::new();
    let (bare, known) = twins(&env).await;
    let (a, b, c) = (env.path("vda.qcow2"), env.path("vdb.qcow2"), env.path("c"));
    std::fs::rename(&a, &c).unwrap();
    std::fs::rename(&b, &a).unwrap();
    std::fs::rename(&c, &b).unwrap();
    both_are_replaced(&bare, &known, [0xb, 0xa]).await;
}

/// The inode of the removed file goes to its successor on ext4.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_the_sibling_in_the_place_of_a_disk_is_read_in_full() {
    let env = TestEnv::new();
    let (bare, known) = twins(&env).await;
    let (a, b) = (env.path("vda.qcow2"), env.path("vdb.qcow2"));
    std::fs::remove_file(&a).unwrap();
    std::fs::copy(&b, &a).unwrap();
    let (_, taken) = backup(&bare, &next(2, &known)).await.unwrap();
    assert_eq!(taken[0].read, REPLACED);
    assert_eq!(taken[1].read, ReadMode::Incremental { base: point(1) });
    assert!(taken[0].bytes.iter().all(|byte| *byte == 0xb));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_image_goes_on_and_a_point_of_an_earlier_version_compares_paths() {
    let env = TestEnv::new();
    let (bare, known) = twins(&env).await;
    write(&env, "vda.qcow2", "write -P 7 1M 64k");
    let incremental = ReadMode::Incremental { base: point(1) };
    let mut earlier = known.clone();
    earlier.disks.iter_mut().for_each(|disk| disk.file = None);
    let plan = bare.platform().await.plan(&next(2, &earlier)).await.unwrap();
    assert!(plan.disks.iter().all(|disk| disk.read.as_ref() == Some(&incremental)));
    std::fs::create_dir(env.path("moved")).unwrap();
    std::fs::rename(env.path("vda.qcow2"), env.path("moved/vda.qcow2")).unwrap();
    redefine(&bare, |xml| xml.replace("/vda.qcow2'", "/moved/vda.qcow2'"));
    let plan = bare.platform().await.plan(&next(2, &earlier)).await.unwrap();
    assert_eq!(plan.disks[0].read, Some(REPLACED));
    let (_, taken) = backup(&bare, &next(2, &known)).await.unwrap();
    assert_eq!(taken[0].read, incremental);
    assert_eq!(taken[0].changed, [(MIB, MIB + 65536)]);
}

/// libvirt gives the overlay of a snapshot a bitmap of the same name: together with the one below
/// it is right (and libvirt joins them), alone it misses what was written before the snapshot.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_before_and_after_an_external_snapshot_is_not_missed() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    bare.io(0, "write -P 1 0 8M");
    let (first, _) = backup(&bare, &request(1)).await.unwrap();
    bare.io(0, "write -P 2 1M 64k");
    let overlay = format!("vda,file={}", env.path("overlay.qcow2").display());
    let snapshot = ["snapshot-create-as", &bare.name, "s", "--disk-only", "--no-metadata"];
    bare.virsh(&[&snapshot[..], &["--diskspec", &overlay]].concat()).ok();
    bare.io(0, "write -P 3 2M 64k");
    let written = [(MIB, MIB + 65536), (2 * MIB, 2 * MIB + 65536)];

    let platform = bare.platform().await;
    let mut snapshot = platform.open_snapshot(&next(2, &first), &Control::new()).await.unwrap();
    let taken = crate::bare::take(&mut *snapshot).await;
    assert_eq!(taken[0].read, ReadMode::Incremental { base: point(1) });
    assert_eq!(taken[0].changed, written);
    snapshot.abort().await.unwrap();

    bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
    let (_, taken) = backup(&bare, &next(3, &first)).await.unwrap();
    assert_eq!(taken[0].read, ReadMode::Full { reason: FullReason::BitmapNotInChain });
    assert_eq!((taken[0].bytes[1 << 20], taken[0].bytes[2 << 20]), (2, 3));
}

/// libvirt refuses one beside a checkpoint, of which it has no record here: nobody makes the overlay a bitmap.
#[tokio::test(flavor = "multi_thread")]
async fn an_external_snapshot_of_a_stopped_domain_is_read_in_full() {
    let env = TestEnv::new();
    let (bare, first) = twins(&env).await;
    write(&env, "vda.qcow2", "write -P 2 1M 64k");
    let overlay = format!("vda,file={}", env.path("overlay.qcow2").display());
    let create = ["snapshot-create-as", &bare.name, "s", "--disk-only", "--no-metadata"];
    let create = [&create[..], &["--diskspec", &overlay, "--diskspec", "vdb,snapshot=no"]].concat();
    bare.virsh(&create).ok();
    write(&env, "overlay.qcow2", "write -P 3 2M 64k");
    let is_right = |read: &crate::bare::Taken| {
        assert!(matches!(read.read, ReadMode::Full { .. }), "{:?}", read.read);
        let at = |mib: usize| read.bytes[mib << 20];
        assert_eq!((at(0), at(1), at(2)), (0xa, 2, 3));
    };
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    let platform = bare.platform().await;
    let mut snapshot = platform.open_snapshot(&next(2, &first), &Control::new()).await.unwrap();
    is_right(&crate::bare::take(&mut *snapshot).await[0]);
    snapshot.abort().await.unwrap();
    bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
    let (third, taken) = backup(&bare, &next(3, &first)).await.unwrap();
    is_right(&taken[0]);
    assert_eq!(taken[0].read, ReadMode::Full { reason: FullReason::BitmapNotInChain });
    assert_eq!(taken[1].read, ReadMode::Incremental { base: point(1) });
    write(&env, "overlay.qcow2", "write -P 4 3M 64k");
    let (_, taken) = backup(&bare, &next(4, &third)).await.unwrap();
    assert_eq!(taken[0].read, ReadMode::Incremental { base: point(3) });
    assert_eq!(taken[0].changed, [(3 * MIB, 3 * MIB + 65536)]);
}

/// QEMU itself keeps a disk from being rolled back under a bitmap; without it there is no base.
#[tokio::test(flavor = "multi_thread")]
async fn an_internal_snapshot_is_not_applied_past_a_bitmap() {
    let env = TestEnv::new();
    let bare = Bare::define(&env, "", &qcow2(&env, 'a', "4M"), "");
    write(&env, "vda.qcow2", "write -P 1 0 4M");
    bare.virsh(&["snapshot-create-as", &bare.name, "before"]).ok();
    write(&env, "vda.qcow2", "write -P 2 0 4M");
    let (first, _) = backup(&bare, &request(1)).await.unwrap();
    let revert = ["snapshot-revert", &bare.name, "before"];
    bare.virsh(&revert).fails();
    let image = env.path("vda.qcow2");
    let name = bare.checkpoint(point(1));
    env.run("qemu-img", &["bitmap", "--remove", &image.to_string_lossy(), &name]).ok();
    bare.virsh(&revert).ok();
    let (_, taken) = backup(&bare, &next(2, &first)).await.unwrap();
    assert_eq!(taken[0].read, ReadMode::Full { reason: FullReason::BitmapMissing });
    assert!(taken[0].bytes.iter().all(|byte| *byte == 1));
    bare.virsh(&["snapshot-delete", &bare.name, "before"]).ok();
}

/// A file that was rolled back as a whole has the bitmaps it had then: they are right for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_rolled_back_builds_on_the_point_its_bitmap_names() {
    let env = TestEnv::new();
    let (bare, first) = twins(&env).await;
    let (image, kept) = (env.path("vda.qcow2"), env.path("kept"));
    write(&env, "vda.qcow2", "write -P 7 1M 64k");
    std::fs::copy(&image, &kept).unwrap();
    write(&env, "vda.qcow2", "write -P 8 2M 64k");
    let (second, _) = backup(&bare, &next(2, &first)).await.unwrap();
    // In place: the same file, with its earlier content.
    std::fs::write(&image, std::fs::read(&kept).unwrap()).unwrap();
    let known = vec![second.clone(), first];
    let request = SnapshotRequest { known_points: known, ..request(3) };
    let (_, taken) = backup(&bare, &request).await.unwrap();
    assert_eq!(taken[0].read, ReadMode::Incremental { base: point(1) });
    assert_eq!(taken[0].changed, [(MIB, MIB + 65536)]);
    assert_eq!(taken[0].bytes[2 << 20], 0xa);
    assert_eq!(taken[1].read, ReadMode::Incremental { base: point(2) });
}

/// The bitmaps of a disk that is left out are not touched.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_left_out_builds_on_its_own_last_point() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &(qcow2(&env, 'a', "4M") + &qcow2(&env, 'b', "4M")));
    let (first, _) = backup(&bare, &request(1)).await.unwrap();
    bare.io(1, "write -P 7 1M 64k");
    let without = SnapshotRequest { exclude_disks: vec!["vdb".to_owned()], ..next(2, &first) };
    let (second, _) = backup(&bare, &without).await.unwrap();
    bare.io(1, "write -P 7 2M 64k");
    let both = SnapshotRequest { known_points: vec![second, first], ..request(3) };
    let (_, taken) = backup(&bare, &both).await.unwrap();
    assert_eq!(taken[0].read, ReadMode::Incremental { base: point(2) });
    assert_eq!(taken[1].read, ReadMode::Incremental { base: point(1) });
    assert_eq!(taken[1].changed, [(MIB, MIB + 65536), (2 * MIB, 2 * MIB + 65536)]);
}

/// A clone's images hold the bitmaps of the original.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_neither_builds_on_the_originals_bitmaps_nor_removes_them() {
    let env = TestEnv::new();
    let (bare, known) = twins(&env).await;
    let disks = qcow2(&env, 'c', "4M").replace("vdc' bus", "vda' bus");
    let clone = Bare::define(&env, "clone", &disks, "");
    std::fs::copy(env.path("vda.qcow2"), env.path("vdc.qcow2")).unwrap();
    // Even if the repository had the original's points under the clone's UUID.
    let (_, taken) = backup(&clone, &next(2, &known)).await.unwrap();
    assert!(matches!(taken[0].read, ReadMode::Full { .. }));
    let image = env.path("vdc.qcow2");
    let info = env.run("qemu-img", &["info", &image.to_string_lossy()]).text();
    assert!(info.contains(&bare.checkpoint(point(1))), "{info}");
    assert!(info.contains(&clone.checkpoint(point(2))), "{info}");
}

/// The bitmap of a point whose manifest cannot be read, or is too old to build on, was removed.
#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_is_kept_as_long_as_its_point_exists() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    backup(&bare, &request(1)).await.unwrap();
    for restart in [false, true] {
        if restart {
            // Now it is in the image, too.
            bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
            bare.virsh(&["start", "--paused", &bare.name]).ok();
        }
        let mut unread = request(2);
        unread.point_ids.insert(point(1));
        let platform = bare.platform().await;
        let snapshot = platform.open_snapshot(&unread, &Control::new()).await.unwrap();
        snapshot.abort().await.unwrap();
        assert_eq!(bare.bitmaps(), [bare.checkpoint(point(1))]);
    }
}

/// Runs the program with a `qemu-img` that first does something else when it is called with `verb`
/// (`bitmap`: a stopped domain was looked at and is not locked yet; `info`: the description was
/// read, nothing else).
fn interfered(env: &TestEnv, args: &[&str], verb: &str, interference: &str) -> Outcome {
    let real = env.run("which", &["qemu-img"]).text();
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = {verb} ] && mkdir {flag} 2>/dev/null; then\n{interference}\nfi\n\
         exec {real} \"$@\"\n",
        flag = env.path("interfered").display()
    );
    std::fs::create_dir(env.path("bin")).expect("the test's own");
    let tool = env.path("bin/qemu-img");
    std::fs::write(&tool, script).expect("the test's own");
    std::fs::set_permissions(&tool, Permissions::from_mode(0o755)).expect("the test's own");
    let path =
        format!("{}:{}", env.path("bin").display(), std::env::var("PATH").expect("the test's own"));
    let outcome = Outcome::of(env.vmbackup_command(args).env("PATH", path));
    assert!(env.path("interfered").exists(), "nothing interfered: {outcome:?}");
    outcome
}

#[test]
fn other_disks_before_the_lock_make_the_snapshot_lost() {
    let env = TestEnv::new();
    env.init_repo();
    let bare = Bare::define(&env, "", &(qcow2(&env, 'a', "4M") + &qcow2(&env, 'b', "4M")), "");
    let xml = bare.virsh(&["dumpxml", "--inactive", &bare.name]).ok().stdout;
    let file = env.path("edited.xml");
    let (a, b) = ("/vda.qcow2'", "/vdb.qcow2'");
    std::fs::write(&file, xml.replace(a, "/@'").replace(b, a).replace("/@'", b)).unwrap();
    let swap = format!("virsh -c qemu:///system define {} >&2", file.display());
    let outcome = interfered(&env, &["full", "--domain", &bare.name], "bitmap", &swap);
    assert_eq!(outcome.code, Some(16), "{outcome:?}");
    assert!(outcome.stderr.contains("were changed meanwhile"), "{outcome:?}");
    for image in ["vda.qcow2", "vdb.qcow2"] {
        assert_eq!(bitmaps(&env, image), Vec::<String>::new());
    }
}

#[test]
fn a_disk_that_was_restored_in_place_is_read_in_full_and_stores_nothing_twice() {
    let env = TestEnv::new();
    env.init_repo();
    let bare = Bare::define(&env, "", &qcow2(&env, 'a', "4M"), "");
    write(&env, "vda.qcow2", "write -P 1 0 4M");
    let (domain, dir) = (["--domain", &bare.name, "--json"], env.dir().to_string_lossy());
    let first = env.vmbackup(&[&["full"], &domain[..]].concat()).json();
    write(&env, "vda.qcow2", "write -P 2 0 2M");
    env.vmbackup(&[&["incremental"], &domain[..]].concat()).ok();
    let first = first["point"].as_str().unwrap();
    env.vmbackup(&["restore", first, "--to", &dir, "--format", "qcow2", "--force"]).ok();
    let report = env.vmbackup(&[&["backup"], &domain[..]].concat()).json();
    assert_eq!(report["disks"][0]["read"]["reason"], "image-replaced", "{report}");
    assert_eq!(report["disks"][0]["stored_bytes"], 0, "{report}");
    let restored = format!("{},format=qcow2", env.path("vda.qcow2").display());
    env.vmbackup(&["verify", first, "--against", &restored]).ok();
    env.vmbackup(&["verify", &format!("{}@latest", bare.name), "--against", &restored]).ok();
}

/// SCSI disks are unplugged without the guest's consent.
#[test]
fn running_disks_that_change_places_before_the_instant_make_the_snapshot_lost() {
    let env = TestEnv::new();
    env.init_repo();
    let disks = (qcow2(&env, 'a', "4M") + &qcow2(&env, 'b', "4M")).replace("dev='vd", "dev='sd");
    let disks = disks.replace("bus='virtio'", "bus='scsi'");
    let controller = "<controller type='scsi' model='virtio-scsi'/>";
    let bare = Bare::define(&env, "", &disks, controller);
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    env.vmbackup(&["full", "--domain", &bare.name]).ok();
    let kept = bare.bitmaps();
    let name = &bare.name;
    let virsh = |args: String| format!("virsh -c qemu:///system {args} >&2 || exit 1");
    let attach = |image: &str, target: &str| {
        let path = env.path(image);
        let options = "--targetbus scsi --driver qemu --subdriver qcow2 --live";
        virsh(format!("attach-disk {name} {} {target} {options}", path.display()))
    };
    let detach = |target: &str| virsh(format!("detach-disk {name} {target} --live"));
    let steps =
        [detach("sda"), detach("sdb"), attach("vdb.qcow2", "sda"), attach("vda.qcow2", "sdb")];
    let outcome = interfered(&env, &["backup", "--domain", name], "info", &steps.join("\n"));
    assert_eq!(outcome.code, Some(16), "{outcome:?}");
    assert!(outcome.stderr.contains("were changed meanwhile"), "{outcome:?}");
    assert_eq!(bare.bitmaps(), kept);
    let report = env.vmbackup(&["backup", "--domain", name, "--json"]).json();
    for disk in [0, 1] {
        assert_eq!(report["disks"][disk]["read"]["reason"], "image-replaced", "{report}");
    }
}

#[test]
fn the_base_is_what_the_image_holds_under_the_lock() {
    let env = TestEnv::new();
    env.init_repo();
    let bare = Bare::define(&env, "", &qcow2(&env, 'a', "4M"), "");
    env.vmbackup(&["full", "--domain", &bare.name]).ok();
    let (image, old) = (env.path("vda.qcow2"), bitmaps(&env, "vda.qcow2").remove(0));
    // Somebody does away with the bitmap, and writes.
    let image = image.display();
    let interference = format!(
        "qemu-img bitmap --remove {image} {old}; qemu-io -f qcow2 -c 'write -P 5 1M 1M' {image} >&2"
    );
    let args = ["backup", "--domain", &bare.name, "--json"];
    let report = interfered(&env, &args, "bitmap", &interference).json();
    assert_eq!(report["disks"][0]["read"]["reason"], "bitmap-missing", "{report}");
    env.vmbackup(&[
        "verify",
        &format!("{}@latest", bare.name),
        "--against",
        &format!("{image},format=qcow2"),
    ])
    .ok();
}

/// No bitmap can be added to one image: the backup is made, the next one reads that disk in full.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_disk_that_takes_no_bitmap_is_backed_up_all_the_same() {
    let env = TestEnv::new();
    let (bare, known) = twins(&env).await;
    write(&env, "vda.qcow2", "write -P 7 1M 64k");
    let image = env.path("vda.qcow2");
    // Its name is taken: the surest way to have just this call fail.
    let (add, name) = (["bitmap", "--add"], bare.checkpoint(point(2)));
    env.run("qemu-img", &[&add[..], &[&image.to_string_lossy(), &name]].concat()).ok();
    let control = Control::new();
    let wanted = SnapshotRequest { mode: BackupMode::Incremental, ..next(2, &known) };
    let mut snapshot = bare.platform().await.open_snapshot(&wanted, &control).await.unwrap();
    let taken = crate::bare::take(&mut *snapshot).await;
    assert_eq!(taken[0].changed, [(MIB, MIB + 65536)]);
    snapshot.still_valid().await.unwrap();
    snapshot.commit().await.unwrap();
    let warnings: Vec<_> = control.notices_from(0).into_iter().map(|notice| notice.text).collect();
    assert!(warnings.iter().any(|text| text.contains("reads vda in full")), "{warnings:?}");
    // The old bitmap is still the best there is.
    assert!(bitmaps(&env, "vda.qcow2").contains(&bare.checkpoint(point(1))));
    assert_eq!(bitmaps(&env, "vdb.qcow2"), [name]);
}
