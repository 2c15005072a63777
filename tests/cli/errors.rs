//! What bad input gets: a message that names the object and the next step, the documented exit
//! code, nothing lost, nothing left behind.

use std::fs;

use crate::fixture::Fixture;
use crate::support::{Outcome, Process, SmallDisk, is_listening, wait_until};

#[test]
fn a_repository_that_is_not_there_is_not_made_by_a_backup() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let typo = env.path("tpyo");
    let outcome = fixture.back_up(&["full", "--repo", typo.to_str().unwrap()]);
    let outcome = outcome.fails_with(&["tpyo", "repo init"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    assert!(!typo.exists(), "a typo must not become a repository");
}

/// Found by accident: tests whose VMs had one UUID refused each other now and then.
#[test]
fn a_vm_that_another_run_works_on_is_busy_and_the_run_is_named() {
    let fixture = Fixture::new();
    let locks = fixture.env.path("state/locks");
    fs::create_dir_all(&locks).unwrap();
    let path = locks.join(format!("{}.lock", fixture.uuid));
    fs::write(&path, "process 4711, backup into repository abc").unwrap();
    let held = fs::File::open(&path).unwrap();
    held.lock().unwrap();
    let outcome = fixture.back_up(&["full"]).fails_with(&["foo", "process 4711"]);
    assert_eq!(outcome.code, Some(7), "{outcome:?}");
    drop(held);
    fixture.back_up(&["full"]).ok();
    assert!(!path.exists(), "the lock's file goes with the run");
}

#[test]
fn an_unknown_point_or_vm_names_what_exists() {
    let fixture = Fixture::new();
    fixture.point();
    let env = &fixture.env;
    let outcome = env.vmbackup(&["show", "bar@latest"]).fails_with(&["bar", "foo"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    let outcome = env.vmbackup(&["show", "foo"]).fails_with(&["foo@latest"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
}

#[test]
fn an_ambiguous_prefix_lists_the_points_it_could_mean() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    // Of seventeen ids two begin with the same digit.
    let mut by_digit = std::collections::HashMap::new();
    let (first, second) = loop {
        let id = fixture.point();
        if let Some(earlier) = by_digit.insert(id[..1].to_owned(), id.clone()) {
            break (earlier, id);
        }
    };
    let outcome = env.vmbackup(&["show", &first[..1]]).fails_with(&[&first[..8], &second[..8]]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
}

/// Found in review: the list showed their points as those of one VM.
#[test]
fn two_vms_of_one_name_are_told_apart_and_the_name_alone_is_ambiguous() {
    let mut fixture = Fixture::new();
    let first = fixture.uuid.to_string();
    fixture.point();
    let alone = fixture.env.vmbackup(&["list"]).text();
    assert!(!alone.contains(&first[..8]), "{alone}");
    fixture.uuid = uuid::Uuid::new_v4();
    let second = fixture.uuid.to_string();
    fixture.point();
    let env = &fixture.env;
    let list = env.vmbackup(&["list"]).text();
    for uuid in [&first, &second] {
        let called = format!(" foo ({}) ", &uuid[..8]);
        assert_eq!(list.matches(&called).count(), 1, "{list}");
    }
    let forget = env.vmbackup(&["forget", "--keep-last", "1", "--dry-run"]).text();
    for uuid in [&first, &second] {
        let called = format!(" foo ({}) ", &uuid[..8]);
        assert_eq!(forget.matches(&called).count(), 1, "{forget}");
    }
    // The rule keeps one of each.
    assert!(forget.contains("0 points would be forgotten"), "{forget}");
    let restore = ["restore", "foo@latest", "--to", "to"];
    for args in [&["list", "--domain", "foo"][..], &["show", "foo@latest"], &restore] {
        let outcome = env.vmbackup(args).fails_with(&[&first, &second, "hint: "]);
        assert_eq!(outcome.code, Some(4), "{outcome:?}");
    }
    let list = env.vmbackup(&["list", "--domain", &second[..8], "--json"]).json();
    let uuids: Vec<_> =
        list["points"].as_array().unwrap().iter().map(|p| &p["vm"]["uuid"]).collect();
    assert_eq!(uuids, [&second], "{list}");
    env.vmbackup(&["show", &format!("{}@latest", &first[..8])]).ok();
}

#[test]
fn an_existing_target_is_replaced_with_force_only() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    let to = env.path("to");
    let args = ["restore", &point, "--to", to.to_str().unwrap(), "--json"];
    let path = env.vmbackup(&args).json()["disks"][0]["path"].as_str().unwrap().to_owned();
    fs::write(&path, b"mine").unwrap();
    let outcome = env.vmbackup(&args).fails_with(&[&path, "--force"]);
    assert_eq!(outcome.code, Some(5), "{outcome:?}");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    env.vmbackup(&[&args[..], &["--force"]].concat()).ok();
    assert_eq!(fs::read(&path).unwrap(), fs::read(&fixture.image).unwrap());
}

#[test]
fn a_full_target_is_refused_before_the_first_write_and_nothing_is_left() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    fixture.write(0, b"data", 3 << 20);
    let point = fixture.point();
    let small = SmallDisk::mount(&fixture.env.path("."), "2M");
    let to = small.path.join("to");
    let outcome = env.vmbackup(&["restore", &point, "--to", to.to_str().unwrap()]);
    let outcome = outcome.fails_with(&["free"]);
    assert_eq!(outcome.code, Some(9), "{outcome:?}");
    assert_eq!(fs::read_dir(&small.path).unwrap().count(), 0, "nothing is left behind");
}

/// qcow2 needs more than the data, which is all that is asked for before the first write.
#[test]
fn a_target_that_fills_up_while_it_is_written_is_left_clean_and_says_what_to_do() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    // Chunks full of data, 772 KiB in all: nothing of them is left out.
    fixture.write(0, b"begin", 512 << 10);
    fixture.write((3 << 20) - (256 << 10), b"end", (256 << 10) + 4096);
    let point = fixture.point();
    let small = SmallDisk::mount(&fixture.env.path("."), "2M");
    fs::write(small.path.join("other"), vec![1; (2 << 20) - (776 << 10)]).unwrap();
    let to = small.path.join("to");
    let args = ["restore", &point, "--to", to.to_str().unwrap(), "--format", "qcow2"];
    let outcome = env.vmbackup(&args).fails_with(&["disk of point", "make room there", "--to DIR"]);
    assert_eq!(outcome.code, Some(9), "{outcome:?}");
    assert_eq!(fs::read_dir(&small.path).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn a_target_directory_is_made_but_not_the_one_it_is_in() {
    let fixture = Fixture::new();
    let point = fixture.point();
    let mount = fixture.env.path("mistyped");
    let to = mount.join("to");
    let outcome = fixture.env.vmbackup(&["restore", &point, "--to", to.to_str().unwrap()]);
    let hint = format!("mkdir -p {}", mount.display());
    let outcome = outcome.fails_with(&["cannot make", &hint, "mount"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    assert!(!mount.exists());
}

#[test]
fn a_full_repository_fails_the_backup_and_keeps_the_points_it_has() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let small = SmallDisk::mount(&fixture.env.path("."), "2M");
    let repo = small.path.join("repo").display().to_string();
    env.vmbackup(&["repo", "init", "--no-key", "--repo", &repo]).ok();
    let run = || fixture.back_up(&["full", "--repo", &repo]);
    run().ok();
    fixture.write(0, b"does not compress", 3 << 20);
    let outcome = run().fails();
    assert_eq!(outcome.code, Some(9), "{outcome:?}");
    let list = env.vmbackup(&["list", "--repo", &repo, "--json"]).json();
    assert_eq!(list["points"].as_array().unwrap().len(), 1);
    env.vmbackup(&["verify", "foo@latest", "--repo", &repo]).ok();
}

#[test]
fn a_corrupted_chunk_is_named_and_other_points_still_restore() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    let pack = largest_file(&env.repo());
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(&pack).unwrap();
    fs::write(&pack, bytes).unwrap();
    let outcome = env.vmbackup(&["verify", &point]).fails();
    assert_eq!(outcome.code, Some(10), "{outcome:?}");
    let to = env.path("to");
    let outcome = env.vmbackup(&["restore", &point, "--to", to.to_str().unwrap()]).fails();
    assert_eq!(outcome.code, Some(10), "{outcome:?}");
    assert!(!to.exists(), "a restore that failed leaves nothing behind");
}

#[test]
fn an_image_that_is_not_there_is_named() {
    let fixture = Fixture::new();
    let missing = format!("{},format=raw", fixture.env.path("gone.raw").display());
    let outcome = fixture.env.vmbackup(&["full", "--image", &missing, "--name", "foo"]);
    let outcome = outcome.fails_with(&["gone.raw"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
}

#[test]
fn forgetting_needs_a_point_or_a_rule_that_keeps_something() {
    let fixture = Fixture::new();
    fixture.point();
    let env = &fixture.env;
    assert_eq!(env.vmbackup(&["forget"]).fails().code, Some(2));
    let outcome = env.vmbackup(&["forget", "--keep-last", "0"]).fails_with(&["zero"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    env.vmbackup(&["show", "foo@latest"]).ok();
}

#[test]
fn json_errors_are_one_line_on_stderr() {
    let fixture = Fixture::new();
    let outcome = fixture.env.vmbackup(&["show", "foo@latest", "--json"]).fails();
    assert!(outcome.stdout.is_empty(), "{outcome:?}");
    let last = outcome.stderr.lines().last().expect("a line");
    let line: serde_json::Value = serde_json::from_str(last).expect("a JSON line");
    assert_eq!((&line["type"], &line["exit_code"]), (&"error".into(), &3.into()));
    assert!(line["hint"].is_string());
}

/// A `qemu-img` that is killed may have done its work before.
#[test]
fn a_bitmap_that_was_half_added_goes_with_the_run_that_fails() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let image = env.path("a.qcow2").display().to_string();
    env.run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]).ok();
    let bin = env.path("bin");
    fs::create_dir(&bin).unwrap();
    let script = "#!/bin/sh\nPATH=${PATH#*:}\nqemu-img \"$@\" || exit\n\
                  if [ \"$1$2\" = bitmap--add ]; then kill -KILL $$; fi\n";
    fs::write(bin.join("qemu-img"), script).unwrap();
    env.run("chmod", &["755", bin.join("qemu-img").to_str().unwrap()]).ok();
    // The other disk is in use, which is seen after the first has got its bitmap.
    let socket = env.path("run/writer.sock");
    let mut writer = env.command("qemu-nbd");
    writer.args(["-t", "-f", "raw", "-k"]).arg(&socket).arg(&fixture.image);
    let _writer = Process::spawn(&mut writer);
    wait_until("qemu-nbd", 30, || is_listening(&socket));

    let (a, b) =
        (format!("{image},format=qcow2"), format!("{},format=raw", fixture.image.display()));
    let mut run = env.vmbackup_command(&["full", "--name", "foo", "--image", &a, "--image", &b]);
    let path = std::env::var("PATH").unwrap();
    run.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", bin.display()));
    let outcome = Outcome::of(&mut run).fails_with(&["next backup reads a in full", "foo.raw"]);
    assert_eq!(outcome.code, Some(7), "{outcome:?}");
    let info = env.run("qemu-img", &["info", "--output=json", "-f", "qcow2", &image]).json();
    assert!(info["format-specific"]["data"]["bitmaps"].is_null(), "{info}");
}

/// The largest file below a directory: in a repository, a data pack.
fn largest_file(directory: &std::path::Path) -> std::path::PathBuf {
    let mut open = vec![directory.to_owned()];
    let mut files = Vec::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            files.push((path.metadata().unwrap().len(), path));
        }
    }
    files.into_iter().max().expect("a file").1
}
