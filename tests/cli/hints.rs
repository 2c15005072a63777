//! What is in the way, told with the next step: exit codes of `plan`, warnings that no option hides,
//! and errors of the surroundings.

use std::process::{Child, Stdio};

use crate::fixture::Fixture;
use crate::support::{Outcome, SmallDisk, wait_until};

/// An image opened for writing, as by a VM that runs; ended when dropped.
struct InUse(Child);

impl InUse {
    fn open(fixture: &Fixture) -> Self {
        let mut command = fixture.env.command("qemu-io");
        command.args(["-f", "raw"]).arg(&fixture.image).stdin(Stdio::piped());
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        Self(child)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_plan_exits_with_the_code_the_backup_would_fail_with() {
    let fixture = Fixture::new();
    let image = format!("{},format=raw", fixture.image.display());
    let run = |command| fixture.env.vmbackup(&[command, "--image", &image, "--name", "foo"]);
    run("plan").ok();
    let in_use = InUse::open(&fixture);
    wait_until("the image is in use", 30, || run("plan").code != Some(0));
    let (plan, backup) = (run("plan").fails(), run("full").fails());
    assert_eq!((plan.code, backup.code), (Some(7), Some(7)), "{plan:?} {backup:?}");
    drop(in_use);
    let gone = fixture.env.path("gone.raw").display().to_string();
    let plan = fixture.env.vmbackup(&["plan", "--image", &gone, "--name", "foo"]);
    assert_eq!(plan.code, Some(3), "{plan:?}");
}

/// Runs the program as a user who is nobody special, with a home of its own.
fn as_ordinary_user(fixture: &Fixture, args: &[&str]) -> Outcome {
    const NOBODY: &str = "65534";
    let env = &fixture.env;
    // Where cargo puts it others may not look.
    let program = env.path("vmbackup");
    std::fs::copy(env!("CARGO_BIN_EXE_vmbackup"), &program).unwrap();
    let home = env.path("user").display().to_string();
    std::fs::create_dir_all(&home).unwrap();
    env.run("chown", &[NOBODY, &home]).ok();
    let mut command = env.command("setpriv");
    command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(&program);
    command.env("HOME", &home).env_remove("XDG_RUNTIME_DIR").env_remove("XDG_STATE_HOME");
    Outcome::of(command.args(args))
}

/// The default repository is made without being asked for: that it has no key is a weakness.
#[test]
fn quiet_does_not_hide_that_a_new_repository_has_no_key() {
    let fixture = Fixture::new();
    let image = format!("{},format=raw", fixture.image.display());
    let args = ["full", "--quiet", "--image", &image, "--name", "foo"];
    let outcome = as_ordinary_user(&fixture, &args).ok();
    assert!(outcome.stderr.starts_with("warning: made the repository"), "{outcome:?}");
    assert!(outcome.stderr.contains("no key"), "{outcome:?}");
}

#[cfg(feature = "libvirt")]
#[test]
fn who_may_not_use_libvirt_is_told_who_may() {
    let fixture = Fixture::new();
    crate::support::libvirt::ensure_libvirt(&fixture.env);
    let outcome = as_ordinary_user(&fixture, &["plan", "--domain", "foo"]);
    let outcome = outcome.fails_with(&["qemu:///system", "group 'libvirt'", "--connect"]);
    assert_eq!(outcome.code, Some(6), "{outcome:?}");
}

#[test]
fn a_repository_of_somebody_else_is_a_matter_of_permissions() {
    let fixture = Fixture::new();
    fixture.point();
    let repo = fixture.env.repo().display().to_string();
    fixture.env.run("chmod", &["700", &repo]).ok();
    let outcome = as_ordinary_user(&fixture, &["list", "--repo", &repo]);
    let outcome = outcome.fails_with(&[&repo, "hint", "root"]);
    assert_eq!(outcome.code, Some(6), "{outcome:?}");
}

/// Found in review: it was told when the turn of that file came, after others had been copied.
#[test]
fn what_cannot_be_kept_of_files_that_are_replaced_is_told_before_anything_is_copied() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let mut full = vec!["full", "--quiet", "--json", "--name", "foo"];
    for name in ["a.raw", "b.raw"] {
        std::fs::write(env.path(name), vec![7; 1 << 20]).unwrap();
        full.extend(["--image", name]);
    }
    let report = as_ordinary_user(&fixture, &full).ok().json();
    let point = report["point"].as_str().unwrap();
    let to = env.path("user/to").display().to_string();
    let restore = ["restore", point, "--to", &to];
    as_ordinary_user(&fixture, &restore).ok();
    let force = [&restore[..], &["--force"]].concat();
    as_ordinary_user(&fixture, &force).ok();
    // They were moved there by somebody else, who lets everybody write to them.
    for name in ["a.raw", "b.raw"] {
        env.run("chown", &["0:0", &format!("{to}/{name}")]).ok();
        env.run("chmod", &["666", &format!("{to}/{name}")]).ok();
    }
    let told = ["a.raw", "b.raw"].map(|name| format!("cannot keep owner and mode of {to}/{name}"));
    let outcome = as_ordinary_user(&fixture, &[&force[..], &["--dry-run"]].concat()).fails();
    let said = format!("{}{}", outcome.stdout, outcome.stderr);
    assert!(told.iter().all(|told| said.contains(told)), "{said}");
    let outcome = as_ordinary_user(&fixture, &force).fails_with(&[&told[0], "run as root"]);
    assert!(!outcome.stderr.contains("was not restored"), "{outcome:?}");
    // To a group of theirs nobody has to give anything.
    for name in ["a.raw", "b.raw"] {
        env.run("chown", &["65534:65534", &format!("{to}/{name}")]).ok();
    }
    as_ordinary_user(&fixture, &force).ok();
}

#[test]
fn a_password_file_that_is_missing_is_named_with_the_way_it_was_given() {
    let fixture = Fixture::new();
    let gone = fixture.env.path("gone").display().to_string();
    let outcome = fixture.env.vmbackup(&["list", "--password-file", &gone]);
    let outcome = outcome.fails_with(&[&gone, "--password-file", "VMBACKUP_PASSWORD_FILE"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
}

#[test]
fn a_copy_into_a_full_file_system_says_where_to_make_room() {
    let fixture = Fixture::new();
    fixture.write(0, b"data", 3 << 20);
    let small = SmallDisk::mount(&fixture.env.path("."), "2M");
    for name in ["copy.raw", "copy.qcow2"] {
        let to = small.path.join(name).display().to_string();
        let from = fixture.image.display().to_string();
        let outcome = fixture.env.vmbackup(&["copy", &from, &to]);
        let outcome = outcome.fails_with(&[&to, "hint", "free"]);
        assert_eq!(outcome.code, Some(9), "{outcome:?}");
        assert_eq!(std::fs::read_dir(&small.path).unwrap().count(), 0, "nothing is left behind");
    }
}

/// A command that fails: its arguments, its exit code, and what its message and hint have to hold.
type Failure<'a> = (&'a [&'a str], i32, &'a [&'a str]);

#[track_caller]
fn each_fails_with(failures: &[Failure<'_>], run: impl Fn(&[&str]) -> Outcome) {
    for (args, code, words) in failures {
        let outcome = run(args).fails_with(words).fails_with(&["hint: "]);
        assert_eq!(outcome.code, Some(*code), "{outcome:?}");
    }
}

#[test]
fn what_is_not_there_is_named_with_the_next_step() {
    let fixture = Fixture::new();
    let point = fixture.point();
    let env = &fixture.env;
    std::fs::write(env.path("a.file"), "no directory").unwrap();
    let at_null = format!("{}=/dev/null", crate::fixture::DISK);
    let at_nope = format!("{}=/dev/nope", crate::fixture::DISK);
    let nbd = "nbd+unix:///?socket=/nope";
    each_fails_with(
        &[
            (&["restore", &point, "--to-device", &at_null], 8, &["/dev/null", "block device"]),
            (&["restore", &point, "--to-device", &at_nope], 3, &["/dev/nope", "path"]),
            (&["hash", "nope.raw"], 3, &["nope.raw", "path"]),
            (&["hash", "foo.raw,format=foo"], 2, &["foo.raw", "format=qcow2"]),
            (&["full", "--image", "nope.qcow2", "--name", "b"], 3, &["nope.qcow2", "path"]),
            (&["full", "--image", "nope.raw", "--name", "b"], 3, &["nope.raw", "path"]),
            (&["full", "--qmp", "/nope"], 13, &["/nope", "VM runs"]),
            (&["hash", nbd], 13, &["/nope", "server"]),
            (&["nbd", "info", "nbd://nope.invalid/"], 13, &["nope.invalid", "server"]),
            (&["nbd", "info", "nbd://127.0.0.1:1/"], 13, &["127.0.0.1:1", "server"]),
            (&["repo", "key", "add", "--new-key-file", "nope"], 3, &["nope", "--new-key-file"]),
            (
                &["repo", "key", "add", "--new-password-file", "nope"],
                3,
                &["nope", "--new-password-file"],
            ),
            (&["list", "--key-file", "nope"], 3, &["nope", "--key-file"]),
            (&["list", "--repo", "a.file"], 2, &["a.file", "directory"]),
            (&["repo", "init", "--no-key", "--repo", "a.file"], 2, &["a.file", "directory"]),
        ],
        |args| env.vmbackup(args),
    );
}

#[test]
fn an_image_that_this_user_may_not_read_is_a_matter_of_permissions() {
    let fixture = Fixture::new();
    fixture.env.run("chmod", &["600", fixture.image.to_str().unwrap()]).ok();
    let qcow2 = fixture.env.path("b.qcow2").display().to_string();
    fixture.env.run("qemu-img", &["create", "-q", "-f", "qcow2", &qcow2, "1M"]).ok();
    fixture.env.run("chmod", &["600", &qcow2]).ok();
    let raw = fixture.image.display().to_string();
    each_fails_with(
        &[
            (&["hash", &raw], 6, &["foo.raw", "root"]),
            (&["hash", &qcow2], 6, &["b.qcow2", "root"]),
            (&["full", "--image", &raw, "--name", "a"], 6, &["foo.raw", "root"]),
            (&["full", "--image", &qcow2, "--name", "a"], 6, &["b.qcow2", "root"]),
        ],
        |args| as_ordinary_user(&fixture, args),
    );
}

#[test]
fn a_garbled_configuration_says_where_it_lies_and_what_brings_it_back() {
    let fixture = Fixture::new();
    let config = fixture.env.repo().join("config");
    for content in ["", "hello", "{}\n\n"] {
        std::fs::remove_file(&config).unwrap();
        std::fs::write(&config, content).unwrap();
        each_fails_with(&[(&["list"], 10, &["config", "copy"])], |args| fixture.env.vmbackup(args));
    }
}

#[test]
fn a_backup_of_no_disk_at_all_is_refused() {
    let fixture = Fixture::new();
    let image = fixture.image.display().to_string();
    let args = ["--image", &image, "--name", "a", "--exclude-disk", "foo"];
    for command in ["full", "plan"] {
        let args = [&[command][..], &args].concat();
        let failure: Failure<'_> = (&args, 2, &["--exclude-disk", "every disk"]);
        each_fails_with(&[failure], |args| fixture.env.vmbackup(args));
    }
    let args = ["full", "--exclude-disk", crate::fixture::DISK];
    let failure: Failure<'_> = (&args, 2, &["--exclude-disk", "every disk"]);
    each_fails_with(&[failure], |args| fixture.back_up(args));
    let list = fixture.env.vmbackup(&["list", "--json"]).json();
    assert_eq!(list["points"].as_array().unwrap().len(), 0, "{list}");
}

#[test]
fn a_file_system_that_is_read_only_is_not_a_matter_of_who_runs_it() {
    let fixture = Fixture::new();
    let point = fixture.point();
    let small = SmallDisk::mount(&fixture.env.path("."), "2M");
    let there = small.path.display().to_string();
    let repo = small.path.join("repo").display().to_string();
    fixture.env.run("cp", &["-a", fixture.env.repo().to_str().unwrap(), &repo]).ok();
    fixture.env.run("mount", &["-o", "remount,ro", &there]).ok();
    let image = fixture.image.display().to_string();
    let (to, copy) = (small.path.join("to"), small.path.join("copy.raw"));
    each_fails_with(
        &[
            (&["full", "--image", &image, "--name", "a", "--repo", &repo], 6, &["read-only"]),
            (&["restore", &point, "--to", to.to_str().unwrap()], 6, &["read-only"]),
            (&["copy", &image, copy.to_str().unwrap()], 6, &["read-only"]),
        ],
        |args| {
            let outcome = fixture.env.vmbackup(args).fails();
            let hint = outcome.stderr.split_once("hint: ").map_or("", |(_, hint)| hint);
            assert!(hint.contains("read-only") && !hint.contains("user"), "{outcome:?}");
            outcome
        },
    );
    // What is there can be read.
    fixture.env.vmbackup(&["list", "--repo", &repo]).ok();
}

#[cfg(feature = "libvirt")]
#[test]
fn a_libvirt_that_is_not_reached_is_a_matter_of_the_connection() {
    let fixture = Fixture::new();
    crate::support::libvirt::ensure_libvirt(&fixture.env);
    // Nobody listens on port 1.
    let ssh = "qemu+ssh://root@127.0.0.1:1/system";
    let plan = |uri: &'static str| ["plan", "--domain", "foo", "--connect", uri];
    each_fails_with(
        &[
            (&plan("foo:///x"), 13, &["foo:///x", "--connect"]),
            (&plan("qemu:///foo"), 13, &["qemu:///foo", "--connect"]),
            (&plan("qemu+unix:///system?socket=/nope"), 13, &["/nope", "daemon running"]),
            (&plan(ssh), 13, &[ssh, "ssh -p 1 root@127.0.0.1"]),
        ],
        |args| fixture.env.vmbackup(args),
    );
    let outcome = fixture.env.vmbackup(&plan(ssh));
    assert!(!outcome.stderr.contains("daemon running"), "{outcome:?}");
}

#[test]
fn a_scratch_directory_that_is_a_file_is_wrong_usage() {
    let fixture = Fixture::new();
    let file = fixture.image.display().to_string();
    let args = ["full", "--scratch-dir", &file];
    each_fails_with(&[(&args, 2, &["--scratch-dir", &file])], |args| fixture.back_up(args));
    let plan = fixture.back_up(&["plan", "--scratch-dir", &file]).fails();
    assert!(plan.stdout.contains("is not a directory"), "{plan:?}");
    assert_eq!(plan.code, Some(2), "{plan:?}");
    let gone = fixture.env.path("gone").display().to_string();
    let args = ["full", "--scratch-dir", &gone];
    each_fails_with(&[(&args, 3, &["--scratch-dir", &gone])], |args| fixture.back_up(args));
}

#[test]
fn a_vm_that_was_not_named_is_asked_for_also_by_json() {
    let fixture = Fixture::new();
    let outcome = fixture.env.vmbackup(&["full", "--json"]);
    let outcome = outcome.fails_with(&["--domain", "--qmp", "--image"]);
    let line: serde_json::Value = serde_json::from_str(&outcome.stderr).unwrap();
    assert_eq!((&line["exit_code"], &line["kind"]), (&2.into(), &"usage".into()));
}

/// Two images that QEMU would call the same are told apart by their paths.
#[test]
fn two_images_of_one_stem_are_both_named() {
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.env.path("sub")).unwrap();
    std::fs::copy(&fixture.image, fixture.env.path("sub/foo.raw")).unwrap();
    let args = ["full", "--image", "foo.raw", "--image", "sub/foo.raw", "--name", "a"];
    let words = ["'foo'", "foo.raw and", "sub/foo.raw"];
    each_fails_with(&[(&args, 2, &words)], |args| fixture.env.vmbackup(args));
}

#[test]
fn a_plan_says_what_will_not_be_captured() {
    let fixture = Fixture::new();
    let image = fixture.image.display().to_string();
    let by_image = ["plan", "--image", &image, "--name", "a", "--json"];
    for plan in [fixture.env.vmbackup(&by_image), fixture.back_up(&["plan", "--json"])] {
        let plan = plan.json();
        let what = plan["not_captured"][0]["what"].as_str().expect("something");
        assert!(what.contains("of the VM") || what.contains("of VM 'foo'"), "{plan}");
    }
    let text = fixture.back_up(&["plan"]).text();
    assert!(text.contains("not captured: definition of VM 'foo'"), "{text}");
}
