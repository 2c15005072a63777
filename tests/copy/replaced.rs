//! What `--force` keeps of the file it replaces, and sources that do not keep still.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};

use crate::support::{TestEnv, wait_until};

#[test]
fn the_new_file_has_the_owner_and_the_mode_of_the_old_one() {
    let env = TestEnv::new();
    fs::write(env.path("source.raw"), vec![7; 1 << 20]).unwrap();
    for name in ["disk.raw", "disk.qcow2"] {
        let path = env.path(name);
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o664)).unwrap();
        chown(&path, Some(65534), Some(12)).unwrap();
        env.vmbackup(&["copy", "source.raw", name, "--force"]).ok();
        let now = path.metadata().unwrap();
        assert_eq!((now.uid(), now.gid(), now.mode() & 0o7777), (65534, 12, 0o664), "{name}");
    }
    env.vmbackup(&["copy", "source.raw", "new.raw"]).ok();
    assert_eq!(env.path("new.raw").metadata().unwrap().mode() & 0o7777, 0o600, "nobody's before");
}

#[test]
fn what_a_link_leads_to_is_replaced_and_the_link_stays() {
    let env = TestEnv::new();
    fs::write(env.path("source.raw"), vec![7; 1 << 20]).unwrap();
    fs::create_dir(env.path("pool")).unwrap();
    fs::write(env.path("pool/disk.raw"), "old").unwrap();
    symlink("pool/disk.raw", env.path("link.raw")).unwrap();
    env.vmbackup(&["copy", "source.raw", "link.raw"]).fails_with(&["exists", "--force"]);
    env.vmbackup(&["copy", "source.raw", "link.raw", "--force"]).ok();
    assert_eq!(fs::read_link(env.path("link.raw")).unwrap().to_str(), Some("pool/disk.raw"));
    assert!(fs::read(env.path("pool/disk.raw")).unwrap() == vec![7; 1 << 20]);
    assert_eq!(fs::read_dir(env.path("pool")).unwrap().count(), 1, "nothing else is left");
}

/// Runs a slow copy of `source.raw` and does `change` while it reads.
fn copy_of_a_changing_source(change: impl FnOnce(&TestEnv), args: &[&str]) {
    let env = TestEnv::new();
    fs::write(env.path("source.raw"), vec![7; 8 << 20]).unwrap();
    let limit = ["--rate-limit", "4M"];
    let copy = env.spawn_vmbackup(&[&["copy", "source.raw"][..], args, &limit].concat());
    wait_until("the new file", 20, || {
        fs::read_dir(env.dir())
            .unwrap()
            .any(|entry| entry.unwrap().file_name().to_string_lossy().ends_with(".part"))
    });
    change(&env);
    let outcome = copy.wait();
    assert_eq!(outcome.code, Some(16), "{outcome:?}");
    outcome.fails_with(&["source.raw was changed while it was read", "run again"]);
    let left: Vec<_> = fs::read_dir(env.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("new")), "{left:?}");
}

fn write(env: &TestEnv) {
    let file = File::options().write(true).open(env.path("source.raw")).unwrap();
    file.write_all_at(&[8; 4096], 6 << 20).unwrap();
}

#[test]
fn a_source_that_is_written_meanwhile_is_no_success() {
    copy_of_a_changing_source(write, &["new.raw"]);
}

#[test]
fn a_source_that_is_written_meanwhile_is_no_success_though_both_ends_are_equal() {
    copy_of_a_changing_source(write, &["new.qcow2", "--verify"]);
}

#[test]
fn a_source_that_is_replaced_meanwhile_is_no_success() {
    let replace = |env: &TestEnv| {
        fs::write(env.path("other"), vec![9; 8 << 20]).unwrap();
        fs::rename(env.path("other"), env.path("source.raw")).unwrap();
    };
    copy_of_a_changing_source(replace, &["new.raw"]);
}
