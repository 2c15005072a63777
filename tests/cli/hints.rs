//! What is in the way, told with the next step: exit codes of `plan`, warnings that no option hides,
//! and errors of the surroundings.

use std::process::{Child, Stdio};

use crate::fixture::Fixture;
use crate::support::{Outcome, wait_until};

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
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/libvirtd.sh");
    Outcome::of(fixture.env.command(script).arg("start")).ok();
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
    let small = crate::errors::SmallDisk::mount(&fixture);
    for name in ["copy.raw", "copy.qcow2"] {
        let to = small.path.join(name).display().to_string();
        let from = fixture.image.display().to_string();
        let outcome = fixture.env.vmbackup(&["copy", &from, &to]);
        let outcome = outcome.fails_with(&[&to, "hint", "free"]);
        assert_eq!(outcome.code, Some(9), "{outcome:?}");
        assert_eq!(std::fs::read_dir(&small.path).unwrap().count(), 0, "nothing is left behind");
    }
}
