//! Backup, list, show, restore, verify, forget: what a user does, end to end.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::fixture::{DISK, DISK_BYTES, Fixture};
use crate::support::{NbdServer, TestEnv, assert_same_content};

#[test]
fn a_restored_image_holds_what_the_disk_held() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let report = fixture.backup("full");
    let point = report["point"].as_str().unwrap();
    let disk = &report["disks"][0];
    assert_eq!(disk["size_bytes"], DISK_BYTES);
    assert_eq!(disk["read"]["mode"], "full");
    let root = env.vmbackup(&["hash", fixture.image.to_str().unwrap()]).text();
    assert_eq!(disk["content_root"], root.as_str(), "the point proves the disk");

    let to = env.path("restored");
    let restored = env.vmbackup(&["restore", point, "--to", to.to_str().unwrap(), "--json"]).json();
    let path = restored["disks"][0]["path"].as_str().unwrap();
    assert_same_content(env, (&fixture.image, "raw"), (path.as_ref(), "raw"));
    assert_eq!(fs::read(&fixture.image).unwrap(), fs::read(path).unwrap(), "byte for byte");
    assert_eq!(env.vmbackup(&["hash", path]).text(), root);
    let leftovers: Vec<_> = fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(leftovers.len(), 1, "nothing but the image: {leftovers:?}");
}

/// Not everybody heeds locks, and what was read was no state the image ever had.
#[test]
fn an_image_that_changes_while_it_is_read_has_no_hash_and_equals_nothing() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let image = env.path("changing.raw");
    fs::write(&image, vec![7; 48 << 20]).unwrap();
    let spec = format!("{},format=raw", image.display());
    env.vmbackup(&["full", "--image", &spec, "--name", "changing"]).ok();
    let path = image.to_str().unwrap();
    for args in [&["hash", path][..], &["verify", "changing@latest", "--against", path]] {
        env.vmbackup(args).ok();
        let reading = AtomicBool::new(true);
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                let file = fs::File::options().write(true).open(&image).unwrap();
                while reading.load(Ordering::Relaxed) {
                    file.write_all_at(&[7], 0).unwrap();
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            let outcome = env.vmbackup(args);
            reading.store(false, Ordering::Relaxed);
            outcome
        });
        assert_eq!(outcome.code, Some(16), "{outcome:?}");
        outcome.fails_with(&["changing.raw was changed while it was read"]);
    }
}

#[test]
fn a_restored_image_is_sparse() {
    use std::os::unix::fs::MetadataExt;
    let fixture = Fixture::new();
    let point = fixture.point();
    let to = fixture.env.path("restored");
    fixture.env.vmbackup(&["restore", &point, "--to", to.to_str().unwrap()]).ok();
    let file = fs::read_dir(&to).unwrap().next().unwrap().unwrap();
    let blocks = file.metadata().unwrap().blocks();
    assert!(blocks * 512 < DISK_BYTES / 2, "{blocks} blocks for a disk that is mostly hole");
}

#[test]
fn each_point_restores_what_the_disk_held_then() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let first = fixture.point();
    fs::copy(&fixture.image, env.path("first.raw")).unwrap();
    fixture.write(1 << 20, b"second", 70_000);
    let second = fixture.point();
    for (point, name) in [(&first, "old"), (&second, "new")] {
        let to = env.path(name);
        let report =
            env.vmbackup(&["restore", point, "--to", to.to_str().unwrap(), "--json"]).json();
        let path = report["disks"][0]["path"].as_str().unwrap().to_owned();
        let expected = if name == "old" { env.path("first.raw") } else { fixture.image.clone() };
        assert_eq!(fs::read(path).unwrap(), fs::read(expected).unwrap(), "{name}");
    }
}

#[test]
fn what_did_not_change_is_not_stored_again() {
    let fixture = Fixture::new();
    let first = fixture.backup("full");
    let second = fixture.backup("full");
    assert!(first["disks"][0]["stored_bytes"].as_u64().unwrap() > 200_000);
    let stored = second["disks"][0]["stored_bytes"].as_u64().unwrap();
    assert!(stored < 10_000, "{stored} bytes stored for a disk that did not change");
}

#[test]
fn list_and_show_tell_the_same_in_text_and_json() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    let list = env.vmbackup(&["list", "--json"]).json();
    assert_eq!((&list["document"], &list["version"]), (&"list".into(), &1.into()));
    assert_eq!(list["points"][0]["id"], point.as_str());
    assert_eq!(list["points"][0]["vm"]["name"], "foo");
    assert_eq!(list["points"][0]["reasons"], serde_json::json!(["requested"]));
    let text = env.vmbackup(&["list"]).text();
    assert!(text.contains("read in full") && text.contains("asked for"), "{text}");
    assert!(text.contains(&point[..8]) && text.contains("foo") && text.contains("full"), "{text}");

    let show = env.vmbackup(&["show", "foo@latest", "--json"]).json();
    assert_eq!(show["id"], point.as_str());
    let text = env.vmbackup(&["show", &point[..6]]).text();
    let root = show["disks"][0]["content_root"].as_str().unwrap();
    assert!(text.contains(&point) && text.contains(root), "{text}");
}

#[test]
fn verify_recomputes_the_root_and_compares_with_a_disk() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    let report = env.vmbackup(&["verify", &point, "--json"]).json();
    assert_eq!(report["disks"][0]["equal"], true);
    assert_eq!(report["disks"][0]["found_root"], report["disks"][0]["expected_root"]);

    let image = fixture.image.to_str().unwrap();
    env.vmbackup(&["verify", &point, "--against", image]).ok();
    let server = NbdServer::qemu_nbd(env, &fixture.image, &["-f", "raw"]);
    env.vmbackup(&["verify", &point, "--against", &server.uri("")]).ok();
    drop(server);

    fixture.write(2 << 20, b"x", 1);
    let outcome = env.vmbackup(&["verify", &point, "--against", image, "--json"]);
    assert_eq!(outcome.code, Some(18), "{outcome:?}");
    let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(report["disks"][0]["equal"], false);
    assert_eq!(report["disks"][0]["differences"][0]["offset"], 2 << 20);

    // A disk of another size differs, and that is a finding like any other.
    let longer = env.path("longer.raw");
    std::fs::File::create(&longer).unwrap().set_len(4 << 20).unwrap();
    let longer = longer.to_str().unwrap();
    let outcome = env.vmbackup(&["verify", &point, "--against", longer, "--json"]);
    assert_eq!(outcome.code, Some(18), "{outcome:?}");
    let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(report["disks"][0]["against_size_bytes"], 4 << 20, "{report}");
    let outcome = env.vmbackup(&["verify", &point, "--against", longer]);
    assert!(outcome.stdout.contains("the other disk has 4194304"), "{outcome:?}");
}

#[test]
fn hash_is_of_the_disk_and_not_of_the_file() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let raw = env.vmbackup(&["hash", fixture.image.to_str().unwrap()]).text();
    let qcow2 = env.path("foo.qcow2");
    let (image, copy) = (fixture.image.to_str().unwrap(), qcow2.to_str().unwrap());
    env.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", image, copy]).ok();
    assert_eq!(env.vmbackup(&["hash", copy]).text(), raw);
    let server = NbdServer::qemu_nbd(env, &qcow2, &["-f", "qcow2"]);
    assert_eq!(env.vmbackup(&["hash", &server.uri("")]).text(), raw);
    let error = env.vmbackup(&["hash", env.path("foo.img").to_str().unwrap()]);
    error.fails_with(&["format is not given", "format=qcow2"]);
}

#[test]
fn forget_by_rule_says_why_each_point_stays_and_gc_frees_the_rest() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let first = fixture.point();
    fixture.write(0, b"other", 300_000);
    let second = fixture.point();
    let plan = env.vmbackup(&["forget", "--keep-last", "1", "--dry-run", "--json"]).json();
    assert_eq!(plan["dry_run"], true);
    assert_eq!(plan["points"][0]["forgotten"], true);
    assert_eq!(plan["points"][1]["reasons"][0], "last 1");
    assert_eq!(env.vmbackup(&["list", "--json"]).json()["points"].as_array().unwrap().len(), 2);

    env.vmbackup(&["forget", "--keep-last", "1"]).ok();
    let list = env.vmbackup(&["list", "--json"]).json();
    assert_eq!(list["points"].as_array().unwrap().len(), 1);
    assert_eq!(list["points"][0]["id"], second.as_str());
    env.vmbackup(&["show", &first]).fails_with(&["no point"]);
    // What the first only condemns, in case a run still needs it, the second frees.
    let freed = |report: serde_json::Value| report["freed_bytes"].as_u64().unwrap();
    let first_gc = freed(env.vmbackup(&["gc", "--json"]).json());
    let second_gc = freed(env.vmbackup(&["gc", "--json"]).json());
    assert!(first_gc + second_gc > 200_000, "{first_gc} + {second_gc} bytes freed");
    env.vmbackup(&["verify", &second]).ok();
}

#[test]
fn a_device_is_overwritten_all_of_it_and_must_have_the_size() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    let device = env.path("device");
    let target = format!("{DISK}={}", device.display());
    let args = ["restore", &point, "--to-device", &target];
    fs::write(&device, vec![0xee; usize::try_from(DISK_BYTES).unwrap() - 512]).unwrap();
    env.vmbackup(&args).fails();
    let before = fs::read(&device).unwrap();
    assert!(before.iter().all(|byte| *byte == 0xee), "a device too small is not touched");
    fs::write(&device, vec![0xee; usize::try_from(DISK_BYTES).unwrap()]).unwrap();
    env.vmbackup(&args).ok();
    assert!(fs::read(&device).unwrap() == fs::read(&fixture.image).unwrap());
}

#[test]
fn a_stopped_vm_is_backed_up_from_its_images_and_restored_in_either_format() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let image = format!("{},format=raw", fixture.image.display());
    let args = ["backup", "--image", &image, "--name", "foo", "--json"];
    let report = env.vmbackup(&args).json();
    assert_eq!(report["quiescence"]["level"], "stopped");
    for format in ["raw", "qcow2"] {
        let to = env.path(format);
        let args = ["restore", "foo@latest", "--to", to.to_str().unwrap(), "--format", format];
        let restored = env.vmbackup(&[&args[..], &["--json"]].concat()).json();
        let path = restored["disks"][0]["path"].as_str().unwrap();
        assert!(path.ends_with(format), "{path}");
        let info = env.run("qemu-img", &["info", "--output=json", "-f", format, path]).json();
        assert_eq!(info["format"], format);
        let compare = ["compare", "-f", "raw", "-F", format, fixture.image.to_str().unwrap(), path];
        env.run("qemu-img", &compare).ok();
    }
}

#[test]
fn a_raw_image_that_ends_inside_a_sector_is_the_disk_that_qemu_makes_of_it() {
    let env = TestEnv::new();
    env.init_repo();
    let image = env.path("odd.raw");
    fs::write(&image, vec![7; 1_000_001]).unwrap();
    let spec = format!("{},format=raw", image.display());
    env.vmbackup(&["full", "--image", &spec, "--name", "odd"]).ok();
    env.vmbackup(&["verify", "odd@latest", "--against", image.to_str().unwrap()]).ok();
    let to = env.path("restored");
    let args = ["restore", "odd@latest", "--to", to.to_str().unwrap(), "--json"];
    let restored = env.vmbackup(&args).json();
    let path = restored["disks"][0]["path"].as_str().unwrap().to_owned();
    assert_eq!(fs::metadata(&path).unwrap().len(), 1_000_448);
    let compare = ["compare", "-f", "raw", "-F", "raw", image.to_str().unwrap(), &path];
    env.run("qemu-img", &compare).ok();
    let hash = |path: &str| env.vmbackup(&["hash", path]).text();
    assert_eq!(hash(image.to_str().unwrap()), hash(&path));
}

#[test]
fn a_restored_image_keeps_owner_mode_and_link_of_the_one_it_replaces() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
    let fixture = Fixture::new();
    let (env, point) = (&fixture.env, fixture.point());
    let to = env.path("restored");
    let args = ["restore", &point, "--to", to.to_str().unwrap(), "--json"];
    let restored = env.vmbackup(&args).json();
    let link = to.join(restored["disks"][0]["path"].as_str().unwrap());
    fs::create_dir(env.path("pool")).unwrap();
    let image = env.path("pool/image");
    fs::remove_file(&link).unwrap();
    fs::write(&image, "old").unwrap();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o664)).unwrap();
    chown(&image, Some(65534), Some(12)).unwrap();
    symlink(&image, &link).unwrap();
    env.vmbackup(&[&args[..], &["--force"]].concat()).ok();
    assert_eq!(fs::read_link(&link).unwrap(), image, "the link stays");
    assert!(fs::read(&image).unwrap() == fs::read(&fixture.image).unwrap());
    let now = image.metadata().unwrap();
    assert_eq!((now.uid(), now.gid(), now.mode() & 0o7777), (65534, 12, 0o664));
    assert_eq!(fs::read_dir(env.path("pool")).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn a_disk_of_a_point_is_copied_without_a_restore() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let first = fixture.point();
    std::fs::copy(&fixture.image, env.path("first.raw")).unwrap();
    fixture.write(1 << 20, b"second", 70_000);
    fixture.point();
    for (source, expected) in [
        (format!("point:foo@latest/{DISK}"), fixture.image.clone()),
        ("point:foo@latest".to_owned(), fixture.image.clone()),
        (format!("point:{}/{DISK}", &first[..8]), env.path("first.raw")),
    ] {
        let target = env.path("copy.qcow2");
        env.vmbackup(&["copy", &source, target.to_str().unwrap(), "--verify", "--force"]).ok();
        assert_same_content(env, (&expected, "raw"), (&target, "qcow2"));
    }
    env.vmbackup(&["copy", "point:foo@latest/nosuch", "null:"]).fails_with(&["no disk 'nosuch'"]);
    env.vmbackup(&["copy", "null:", "point:foo@latest"]).fails();
}

/// A logical volume is as large as its extents make it: rarely as large as the disk.
#[test]
fn a_larger_device_takes_the_disk_and_keeps_the_rest_of_what_it_had() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    let device = env.path("device");
    fs::write(&device, vec![0x5a; 8 << 20]).unwrap();
    let to = format!("{DISK}={}", device.display());
    let restored = env.vmbackup(&["restore", &point, "--to-device", &to, "--json"]).ok();
    assert!(restored.stdout.contains("\"kept_bytes\": 5238784"), "{restored:?}");
    let words = ["larger than the disk", "8388608", "5238784 bytes"];
    assert!(words.iter().all(|word| restored.stderr.contains(word)), "{restored:?}");
    let (found, disk) = (fs::read(&device).unwrap(), fs::read(&fixture.image).unwrap());
    assert_eq!(found.len(), 8 << 20);
    assert!(found[..disk.len()] == disk, "the disk is what the point holds");
    assert!(found[disk.len()..].iter().all(|byte| *byte == 0x5a), "the rest is untouched");
    let small = env.path("small");
    fs::write(&small, vec![0x5a; 1 << 20]).unwrap();
    let to = format!("{DISK}={}", small.display());
    let refused = env.vmbackup(&["restore", &point, "--to-device", &to]);
    let refused = refused.fails_with(&["small", "at least 3149824 bytes"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(fs::read(&small).unwrap().iter().all(|byte| *byte == 0x5a));
}
