//! `check`: damage is found, named as what it affects, and everything else restores.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::fixture::{DISK, Fixture};

/// The files below a folder of the repository.
fn files(fixture: &Fixture, folder: &str) -> Vec<PathBuf> {
    let mut open = vec![fixture.env.repo().join(folder)];
    let mut found = Vec::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The pack that holds the chunks of the disk: the largest.
fn data_pack(fixture: &Fixture) -> PathBuf {
    let packs = files(fixture, "packs");
    packs.into_iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap()
}

/// Flips a bit of the chunk that takes up more than half of the pack, wherever in it that lies.
fn rot(path: &PathBuf) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn damaged(fixture: &Fixture, args: &[&str]) -> Value {
    let outcome = fixture.env.vmbackup(&[args, &["--json"]].concat());
    assert_eq!(outcome.code, Some(10), "{outcome:?}");
    serde_json::from_str(&outcome.stdout).unwrap()
}

#[test]
fn a_sound_repository_passes() {
    let fixture = Fixture::new();
    fixture.point();
    let text = fixture.env.vmbackup(&["check"]).text();
    assert!(text.contains("no damage found"), "{text}");
    let report = fixture.env.vmbackup(&["check", "--read-data", "--json"]).json();
    assert!(report["bytes_read"].as_u64().unwrap() > 200_000, "{report}");
    for wrong in ["0/3", "4/3", "x", "1"] {
        let outcome = fixture.env.vmbackup(&["check", "--read-data-subset", wrong]);
        assert_eq!(outcome.code, Some(2), "{wrong}: {outcome:?}");
    }
}

/// Found in review: damage of two VMs of one name looked like that of one.
#[test]
fn damage_of_two_vms_of_one_name_is_told_apart() {
    let mut fixture = Fixture::new();
    let first = fixture.uuid.to_string();
    fixture.point();
    fixture.uuid = uuid::Uuid::new_v4();
    fixture.point();
    // They share their chunks.
    rot(&data_pack(&fixture));
    let outcome = fixture.env.vmbackup(&["check", "--read-data"]);
    assert_eq!(outcome.code, Some(10), "{outcome:?}");
    for uuid in [first, fixture.uuid.to_string()] {
        let called = format!(" foo ({}) ", &uuid[..8]);
        assert_eq!(outcome.stdout.matches(&called).count(), 1, "{outcome:?}");
    }
}

#[test]
fn a_rotten_chunk_is_named_with_its_points_and_ranges_and_the_rest_restores() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let first = fixture.point();
    rot(&data_pack(&fixture));
    fixture.write(0, b"other", 300_000);
    let second = fixture.point();
    env.vmbackup(&["check"]).ok();
    let report = damaged(&fixture, &["check", "--read-data"]);
    let affected = report["affected"].as_array().unwrap();
    assert_eq!(affected.len(), 1, "{report}");
    assert_eq!(
        (&affected[0]["point"], &affected[0]["disk"]),
        (&first.as_str().into(), &DISK.into())
    );
    let ranges = affected[0]["ranges"].as_array().unwrap();
    assert_eq!(ranges.len(), 1, "{report}");
    assert_eq!(ranges[0]["bytes"].as_u64().unwrap() % 4096, 0, "{report}");
    let outcome = env.vmbackup(&["check", "--read-data"]);
    let point = &first[..8];
    assert!(outcome.stdout.contains(point) && outcome.stdout.contains("foo"), "{outcome:?}");
    assert_eq!(env.vmbackup(&["verify", &first]).code, Some(10));
    env.vmbackup(&["verify", &second]).ok();
}

#[test]
fn missing_and_cut_off_packs_are_found_without_reading_data() {
    let fixture = Fixture::new();
    let first = fixture.point();
    let pack = data_pack(&fixture);
    let whole = fs::read(&pack).unwrap();
    for damage in ["cut off", "missing"] {
        fs::remove_file(&pack).unwrap();
        if damage == "cut off" {
            fs::write(&pack, &whole[..200]).unwrap();
        }
        let report = damaged(&fixture, &["check"]);
        assert_eq!(report["affected"][0]["point"], first.as_str(), "{damage}: {report}");
        let reason = report["affected"][0]["reason"].as_str().unwrap();
        assert!(reason.contains(damage), "{reason}");
    }
}

/// All that the points need is there, but the index could not be rebuilt from such a pack.
#[test]
fn a_pack_that_is_cut_in_its_trailer_is_named_and_concerns_no_point() {
    let fixture = Fixture::new();
    let first = fixture.point();
    let pack = data_pack(&fixture);
    let whole = fs::read(&pack).unwrap();
    for cut in [1, 40] {
        fs::remove_file(&pack).unwrap();
        fs::write(&pack, &whole[..whole.len() - cut]).unwrap();
        let report = damaged(&fixture, &["check"]);
        assert_eq!(report["damages"].as_array().unwrap().len(), 1, "{cut}: {report}");
        assert!(report["damages"][0]["what"].as_str().unwrap().contains("cut off"), "{report}");
        assert_eq!(report["affected"], serde_json::json!([]), "{cut}: {report}");
        fixture.env.vmbackup(&["verify", &first]).ok();
    }
}

#[test]
fn a_lost_index_is_rebuilt_and_points_restore_byte_for_byte() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    for path in files(&fixture, "index") {
        fs::remove_file(path).unwrap();
    }
    damaged(&fixture, &["check"]);
    let report = env.vmbackup(&["check", "--rebuild-index", "--json"]).json();
    assert!(report["entries_rebuilt"].as_u64().unwrap() > 2, "{report}");
    let to = env.path("restored");
    let restored =
        env.vmbackup(&["restore", &point, "--to", to.to_str().unwrap(), "--json"]).json();
    let path = restored["disks"][0]["path"].as_str().unwrap();
    assert_eq!(fs::read(&fixture.image).unwrap(), fs::read(path).unwrap());
}

#[test]
fn a_damaged_manifest_is_named_and_other_points_are_checked() {
    let fixture = Fixture::new();
    let first = fixture.point();
    let manifest = files(&fixture, "points").remove(0);
    fixture.write(0, b"other", 1000);
    let second = fixture.point();
    rot(&manifest);
    let report = damaged(&fixture, &["check", "--read-data"]);
    assert_eq!(report["unreadable_points"], serde_json::json!([first]), "{report}");
    assert_eq!(report["affected"], serde_json::json!([]), "{report}");
    fixture.env.vmbackup(&["verify", &second]).ok();
    // What the catalog tells of it is not asked of the manifest.
    for segment in files(&fixture, "catalog") {
        fs::remove_file(segment).unwrap();
    }
    let list = fixture.env.vmbackup(&["list"]).ok();
    assert!(list.stdout.contains(&second[..8]) && !list.stdout.contains(&first[..8]), "{list:?}");
    assert!(list.stderr.contains("left out") && list.stderr.contains(&first), "{list:?}");
}

/// Restores a point and compares it with what the disk held.
fn assert_restores(fixture: &Fixture, point: &str, content: &[u8]) {
    let to = fixture.env.path(&format!("restored-{point}"));
    let outcome = fixture.env.vmbackup(&["restore", point, "--to", to.to_str().unwrap(), "--json"]);
    let path = outcome.json()["disks"][0]["path"].as_str().unwrap().to_owned();
    assert!(fs::read(path).unwrap() == content, "{point}");
    fs::remove_dir_all(to).unwrap();
}

/// A chunk that had rotted made every later full backup with that content unrestorable, and the
/// backups ended with success: they took what the index knew for stored.
#[test]
fn a_full_backup_heals_rotten_cut_off_and_missing_packs() {
    for damage in ["rotten", "cut off", "missing"] {
        let fixture = Fixture::new();
        let env = &fixture.env;
        let content = fs::read(&fixture.image).unwrap();
        let first = fixture.point();
        let pack = data_pack(&fixture);
        match damage {
            "rotten" => rot(&pack),
            "cut off" => {
                let whole = fs::read(&pack).unwrap();
                fs::remove_file(&pack).unwrap();
                fs::write(&pack, &whole[..200]).unwrap();
            }
            _ => fs::remove_file(&pack).unwrap(),
        }
        let to = env.path("nothing");
        let failed = env.vmbackup(&["restore", &first, "--to", to.to_str().unwrap()]);
        assert_eq!(failed.code, Some(10), "{damage}: {failed:?}");
        let pack_name = pack.file_name().unwrap().to_str().unwrap();
        for word in [&first[..8], DISK, "cannot read bytes ", pack_name] {
            assert!(failed.stderr.contains(word), "{damage}: {word}: {failed:?}");
        }
        let depth = if damage == "rotten" { "--read-data" } else { "-v" };
        let told = env.vmbackup(&["check", depth]);
        assert_eq!(told.code, Some(10), "{damage}: {told:?}");
        let damaged = told.stdout.split("damaged:\n").nth(1).unwrap();
        assert!(damaged.lines().next().unwrap().contains(pack_name), "{damage}: {told:?}");
        for word in [&first[..8], "foo", DISK] {
            assert!(damaged.contains(word), "{damage}: {word}: {told:?}");
        }

        let second = fixture.point();
        for point in [&first, &second] {
            assert_restores(&fixture, point, &content);
            env.vmbackup(&["verify", point]).ok();
        }
        env.vmbackup(&["check"]).ok();
    }
}

/// What a bitmap calls unchanged the VM still has: an incremental once kept it damaged for ever.
#[test]
fn an_incremental_heals_what_it_shares_with_its_base() {
    for damage in ["rotten", "missing"] {
        let fixture = Fixture::new();
        let env = &fixture.env;
        let image = env.path("a.qcow2");
        let path = image.to_str().unwrap();
        env.run("qemu-img", &["create", "-q", "-f", "qcow2", path, "4M"]).ok();
        env.run("qemu-io", &["-f", "qcow2", "-c", "write -s /proc/self/exe 0 3M", path]).ok();
        let spec = format!("{path},format=qcow2");
        let back_up = || env.vmbackup(&["backup", "--image", &spec, "--name", "bar", "--json"]);
        let first = back_up().json();
        match damage {
            "rotten" => {
                rot(&data_pack(&fixture));
                damaged(&fixture, &["check", "--read-data"]);
            }
            _ => fs::remove_file(data_pack(&fixture)).unwrap(),
        }
        let told = back_up();
        assert!(told.stderr.contains("stored anew"), "{damage}: {told:?}");
        let second = told.json();
        let disk = &second["disks"][0];
        assert_eq!(disk["read"]["mode"], "incremental", "{damage}: {second}");
        assert!(disk["read_bytes"].as_u64().unwrap() >= 256 << 10, "{damage}: {second}");
        for report in [&first, &second] {
            env.vmbackup(&["verify", report["point"].as_str().unwrap()]).ok();
        }
        let third = back_up();
        assert!(!third.stderr.contains("stored anew"), "{damage}: {third:?}");
        assert_eq!(third.json()["disks"][0]["read_bytes"], 0, "{damage}");
    }
}

/// Found in review: the damage had no object, and `restore` advised to salvage what was all there.
#[test]
fn an_index_that_is_gone_is_named_and_the_advice_is_to_rebuild_it() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    for segment in files(&fixture, "index") {
        fs::remove_file(segment).unwrap();
    }
    let report = damaged(&fixture, &["check"]);
    let damages = report["damages"].as_array().unwrap();
    assert_eq!(damages.len(), 1, "{report}");
    assert_eq!(damages[0]["object"], "index", "{report}");
    assert!(damages[0]["what"].as_str().unwrap().contains("--rebuild-index"), "{report}");
    env.vmbackup(&["check"]).fails_with(&["hint: 'vmbackup check --rebuild-index'"]);
    for args in [&["restore", &point, "--to", "to"][..], &["verify", &point]] {
        let outcome = env.vmbackup(args);
        let stderr = outcome.fails_with(&["hint: run 'vmbackup check --rebuild-index'"]).stderr;
        assert!(!stderr.contains("--salvage' restores"), "{stderr}");
    }
    env.vmbackup(&["check", "--rebuild-index"]).ok();
    env.vmbackup(&["restore", &point, "--to", "to"]).ok();
}

/// Found in review: it was taken for a repository that holds no points yet.
#[test]
fn a_repository_whose_folder_of_points_is_gone_is_damaged() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    env.vmbackup(&["list"]).ok();
    fixture.point();
    let (points, away) = (env.repo().join("points"), env.path("away"));
    fs::rename(&points, &away).unwrap();
    for args in [&["list"][..], &["check"], &["show", "foo@latest"], &["gc"], &["forget", "00"]] {
        let outcome = env.vmbackup(args).fails_with(&["points", "hint: "]);
        assert_eq!(outcome.code, Some(10), "{outcome:?}");
    }
    let outcome = fixture.back_up(&["full"]).fails_with(&["points"]);
    assert_eq!(outcome.code, Some(10), "{outcome:?}");
    assert!(!points.exists(), "nothing is made in its place");
    fs::rename(&away, &points).unwrap();
    env.vmbackup(&["verify", "foo@latest"]).ok();
}
