//! The libvirt the tests share, and what it and QEMU say of a domain, by its name.

use std::path::{Path, PathBuf};

use super::env::TestEnv;
use super::outcome::Outcome;

/// The daemon.
pub(crate) const URI: &str = "qemu:///system";

/// Starts libvirtd where nobody has (`cargo test` without `tests/run.sh`).
pub(crate) fn ensure_libvirt(env: &TestEnv) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/libvirtd.sh");
    Outcome::of(env.command(script).arg("start")).ok();
}

/// Runs virsh on it.
pub(crate) fn virsh(env: &TestEnv, args: &[&str]) -> Outcome {
    Outcome::of(env.command("virsh").args(["-c", URI]).args(args))
}

/// Destroys and undefines a domain, whatever its state; nothing if there is none.
pub(crate) fn remove_domain(env: &TestEnv, name: &str) {
    virsh(env, &["destroy", name]);
    let all = ["--checkpoints-metadata", "--snapshots-metadata", "--managed-save", "--nvram"];
    let undefined = virsh(env, &[&["undefine"][..], &all, &[name]].concat());
    let is_left = || virsh(env, &["domuuid", name]).code == Some(0);
    assert!(std::thread::panicking() || !is_left(), "{name} stays: {undefined:?}");
}

/// Names of the checkpoints libvirt has metadata of.
pub(crate) fn checkpoints(env: &TestEnv, name: &str) -> Vec<String> {
    let listed = virsh(env, &["checkpoint-list", "--name", name]).text();
    listed.lines().map(str::to_owned).filter(|line| !line.is_empty()).collect()
}

/// Whether a backup job is active: its operation is told in a line of its own.
pub(crate) fn has_backup_job(env: &TestEnv, name: &str) -> bool {
    let info = virsh(env, &["domjobinfo", name]);
    info.stdout.lines().any(|line| line.starts_with("Operation:") && line.contains("Backup"))
}

/// Bitmaps with a name that a running domain's QEMU has, asked of QEMU itself.
pub(crate) fn bitmaps(env: &TestEnv, name: &str) -> Vec<String> {
    let ask = r#"{"execute":"query-named-block-nodes"}"#;
    let json = virsh(env, &["qemu-monitor-command", name, ask]).json();
    let nodes = json["return"].as_array().expect("nodes").iter();
    let bitmaps = nodes.filter_map(|node| node["dirty-bitmaps"].as_array()).flatten();
    // Those of running jobs have no name.
    let names = bitmaps.filter_map(|bitmap| bitmap["name"].as_str().map(str::to_owned));
    let mut names: Vec<String> = names.collect();
    names.sort();
    names.dedup();
    names
}

/// Sockets of ours in a running domain's directory.
pub(crate) fn sockets(env: &TestEnv, name: &str) -> Vec<PathBuf> {
    let id = virsh(env, &["domid", name]).text();
    let short: String = name.chars().take(20).collect();
    let dir = format!("/var/lib/libvirt/qemu/domain-{}-{short}", id.trim());
    let entries = std::fs::read_dir(dir).expect("of a running domain");
    let paths = entries.map(|entry| entry.expect("readable").path());
    paths.filter(|path| path.to_string_lossy().contains("/vmb-")).collect()
}
