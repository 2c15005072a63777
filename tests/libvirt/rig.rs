//! Takes points with an independent oracle, and proves them: what the tests of this binary share.

use std::path::PathBuf;

use serde_json::Value;

use crate::support::{Domain, Guest, Outcome, Process, TestEnv, assert_same_content, wait_until};

/// Part of the disk the guest keeps writing to while a backup runs, in KiB.
const BUSY_KIB: u32 = 60_000;

/// A point with copies of the disks made independently at the same instant.
pub(crate) struct Taken {
    /// Its id.
    pub(crate) id: String,
    /// The JSON report of the backup.
    pub(crate) report: Value,
    oracles: Vec<PathBuf>,
}

impl Taken {
    /// The point of a report.
    pub(crate) fn of(report: Value, oracles: Vec<PathBuf>) -> Self {
        let id = report["point"].as_str().expect("a point id").to_owned();
        Self { id, report, oracles }
    }

    /// How a disk was read: `full` or `incremental`.
    pub(crate) fn mode(&self, disk: usize) -> &str {
        self.report["disks"][disk]["read"]["mode"].as_str().expect("a mode")
    }
}

/// Backs up this very instant of a running domain whose guest writes to all its disks throughout.
/// `command` is the command with its options, without the domain.
#[track_caller]
pub(crate) fn take(
    env: &TestEnv,
    domain: &Domain<'_>,
    guest: &mut Guest,
    command: &[&str],
) -> Taken {
    let begin = |args: &[&str]| {
        let mut backup = env.spawn_vmbackup(args);
        wait_until("the backup job", 60, || domain.has_backup_job() || !backup.is_running());
        backup
    };
    take_with(domain, guest, command, begin, |_| ())
}

/// [`take`] of a backup that has read everything and does not make its point before `beside` is
/// done.
#[track_caller]
pub(crate) fn take_held(
    env: &TestEnv,
    domain: &Domain<'_>,
    guest: &mut Guest,
    command: &[&str],
    beside: impl FnOnce(),
) -> Taken {
    let held = |args: &[&str]| env.stopped_at("before:manifest", args);
    take_with(domain, guest, command, held, |backup| {
        beside();
        backup.signal("CONT");
    })
}

/// Backs up an instant with a run that waits at a step of its journal until `disturb` is done. Nothing but
/// that writes to the disks after the instant. How the run ended, and the point if it made one.
#[track_caller]
pub(crate) fn take_disturbed(
    env: &TestEnv,
    domain: &Domain<'_>,
    (command, step): (&str, &str),
    disturb: impl FnOnce(),
) -> (Outcome, Option<Taken>) {
    domain.suspend();
    let oracles = domain.oracles(&unique("disturbed"));
    let name = domain.name();
    let backup = env.stopped_at(step, &[command, "--domain", name, "--quiesce", "never", "--json"]);
    domain.resume();
    disturb();
    backup.signal("CONT");
    let outcome = backup.wait();
    let report = serde_json::from_str(&outcome.stdout).ok();
    (outcome, report.map(|report| Taken::of(report, oracles)))
}

/// The same with a backup that `begin` began in the instant, and what is done to it then.
#[track_caller]
fn take_with(
    domain: &Domain<'_>,
    guest: &mut Guest,
    command: &[&str],
    begin: impl FnOnce(&[&str]) -> Process,
    meanwhile: impl FnOnce(&Process),
) -> Taken {
    let disks = domain.disk_count();
    let names: Vec<String> = (0..disks).map(disk_name).collect();
    for name in &names {
        guest.run(&format!("busy {name} {BUSY_KIB}"));
    }
    guest.run("sleep 0.3");
    domain.suspend();
    let oracles = domain.oracles(&unique("at"));
    // A paused guest cannot answer the request to freeze its file systems.
    let mut args = command.to_vec();
    args.extend(["--domain", domain.name(), "--quiesce", "never", "--json"]);
    let backup = begin(&args);
    domain.resume();
    meanwhile(&backup);
    let report = backup.wait().json();
    for name in &names {
        let writes: u64 = guest.run(&format!("quiet {name}")).trim().parse().expect("a number");
        assert!(writes > 0, "the guest did not write to {name} beside the backup");
    }
    Taken::of(report, oracles)
}

/// Backs up a domain that is shut off.
#[track_caller]
pub(crate) fn take_stopped(env: &TestEnv, domain: &Domain<'_>, command: &[&str]) -> Taken {
    let oracles = domain.oracles(&unique("stopped"));
    let mut args = command.to_vec();
    args.extend(["--domain", domain.name(), "--json"]);
    let report = env.vmbackup(&args).json();
    Taken::of(report, oracles)
}

/// Restores a point and requires every disk to equal its oracle, byte for byte and by content root.
#[track_caller]
pub(crate) fn prove(env: &TestEnv, taken: &Taken) {
    prove_with(env, taken, &[]);
}

/// [`prove`] with further options, for a repository with a key.
#[track_caller]
pub(crate) fn prove_with(env: &TestEnv, taken: &Taken, options: &[&str]) {
    let target = env.path(&unique("restored"));
    let to = target.to_string_lossy();
    let mut args = vec!["restore", &taken.id, "--to", &to, "--format", "raw"];
    args.extend(options);
    env.vmbackup(&args).ok();
    for (index, oracle) in taken.oracles.iter().enumerate() {
        let restored = target.join(format!("{}.raw", disk_name(index)));
        assert_same_content(env, (&restored, "raw"), (oracle, "raw"));
        let recorded = taken.report["disks"][index]["content_root"].as_str().expect("a root");
        let hashed = env.vmbackup(&["hash", &format!("{},format=raw", oracle.display())]).text();
        assert_eq!(hashed, recorded, "content root of disk {index} of point {}", taken.id);
    }
    std::fs::remove_dir_all(target).expect("own directory");
}

/// Requires that nothing of a finished run is left on the domain, and that it runs.
#[track_caller]
pub(crate) fn assert_no_trace(domain: &Domain<'_>) {
    assert_eq!(domain.state(), "running");
    assert!(!domain.has_backup_job(), "a backup job is left");
    assert_eq!(domain.checkpoints(), Vec::<String>::new(), "checkpoint metadata is left");
}

/// `vda`, `vdb`, …
pub(crate) fn disk_name(index: usize) -> String {
    format!("vd{}", char::from(b'a' + u8::try_from(index).expect("a few disks")))
}

fn unique(what: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{what}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}
