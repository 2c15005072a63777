//! A frozen guest and a backup that dies, hangs or gives up: the guest always runs on.
//!
//! The guest's freeze hook notes every freeze and thaw and can be made slow, so that a freeze
//! happens when the one who asked for it is gone.

use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::rig::assert_no_trace;
use crate::support::{
    DiskFormat, Domain, DomainSpec, Guest, Process, SmallDisk, TestEnv, wait_until,
};

fn frozen_by_journal(env: &TestEnv, domain: &Domain<'_>) -> bool {
    let journal = env.path("state/journal").join(format!("{}.json", domain.uuid()));
    std::fs::read_to_string(journal).unwrap_or_default().contains("\"freeze\"")
}

/// What the guest's agent did: "freeze", "thaw", in order.
fn hooked(guest: &mut Guest) -> Vec<String> {
    let lines = guest.run("cat /tmp/hooked 2>/dev/null || true");
    lines.lines().map(str::to_owned).collect()
}

/// Waits until a freeze has happened and been undone; proves it with a write.
#[track_caller]
fn assert_thawed(guest: &mut Guest, seconds: u64) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        let hooked = hooked(guest);
        if hooked.first().is_some_and(|what| what == "freeze")
            && hooked.last().is_some_and(|what| what == "thaw")
        {
            break;
        }
        assert!(Instant::now() < deadline, "not thawed after {seconds} s: {hooked:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    guest.run("echo again >/mnt/file; sync");
}

fn mounted(env: &TestEnv) -> (Domain<'_>, Guest) {
    env.init_repo();
    let (domain, mut guest) = Domain::boot(env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    domain.wait_for_agent();
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt && echo hello >/mnt/file && sync");
    (domain, guest)
}

#[test]
#[allow(clippy::print_stderr, reason = "says what was not tested")]
fn a_backup_killed_around_its_freeze_leaves_no_frozen_guest() {
    let env = TestEnv::new();
    let (domain, mut guest) = mounted(&env);
    let args = ["full", "--domain", domain.name(), "--quiesce", "require"];
    let groups = ControlGroup::make_all(&env);
    for killed in [Killed::Alone, Killed::WithProcessGroup, Killed::WithControlGroups] {
        if killed == Killed::WithControlGroups && groups.is_empty() {
            eprintln!("not tested: {killed:?}");
            continue;
        }
        guest.run(": >/tmp/hooked; echo 2 >/tmp/slow.freeze");
        let backup = Process::spawn(
            env.vmbackup_command(&args).env("VMBACKUP_STOP_AT", FIRST_STEP).process_group(0),
        );
        backup.wait_until_stopped(FIRST_STEP);
        // What it starts from here on belongs there, too, unless it leaves.
        for group in &groups {
            group.enter(backup.id());
        }
        backup.signal("CONT");
        wait_until("the freeze", 30, || frozen_by_journal(&env, &domain));
        wait_until("the freeze hook", 30, || !hooked(&mut guest).is_empty());
        match killed {
            Killed::Alone => backup.signal("KILL"),
            Killed::WithProcessGroup => {
                env.run("kill", &["-KILL", "--", &format!("-{}", backup.id())]).ok();
            }
            Killed::WithControlGroups => {
                for group in &groups {
                    group.kill();
                }
            }
        }
        backup.wait();
        // The freeze happens after our death. Nobody runs another command.
        assert_thawed(&mut guest, 12);
        guest.run("rm /tmp/slow.freeze");
        env.vmbackup(&args).ok();
        assert!(!frozen_by_journal(&env, &domain), "{killed:?}");
        assert_no_trace(&domain);
    }
}

/// Before anything else is started.
const FIRST_STEP: &str = "before:checkpoint";

/// What is killed along with a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Killed {
    Alone,
    /// As by a closed terminal.
    WithProcessGroup,
    /// As by a service manager that stops a unit.
    WithControlGroups,
}

/// A control group of the test's own in one of the hierarchies by which services are ended, gone on drop.
struct ControlGroup {
    directory: PathBuf,
}

impl ControlGroup {
    /// One in each hierarchy: v2 alone or beside v1, and the named one of v1.
    fn make_all(env: &TestEnv) -> Vec<Self> {
        let tops = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"];
        tops.into_iter().filter_map(|top| Self::make(env, Path::new(top))).collect()
    }

    /// None where there is no such hierarchy, or, which is said, a process may not enter a group and leave it
    /// again: for anyone but root, and where the top of a container may hold no processes.
    #[allow(clippy::print_stderr, reason = "says why nothing was tested")]
    fn make(env: &TestEnv, top: &Path) -> Option<Self> {
        // A tmpfs with v1 in it has neither.
        let is_one = ["cgroup.controllers", "release_agent"].map(|file| top.join(file).exists());
        let directory = top.join(env.name(""));
        if is_one == [false; 2] {
            return None;
        }
        // One may be there: of an earlier process with the same id, which was killed.
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                eprintln!("no control group {}: {error}", directory.display());
                return None;
            }
            _ => (),
        }
        let group = Self { directory };
        let there_and_back = r#"echo $$ >"$1/cgroup.procs" && echo $$ >"$0/cgroup.procs""#;
        let paths = [top, &group.directory].map(|path| path.to_string_lossy().into_owned());
        let went = env.run("sh", &["-c", there_and_back, &paths[0], &paths[1]]);
        if went.code != Some(0) {
            eprintln!("no control group {}: {went:?}", group.directory.display());
            return None;
        }
        Some(group)
    }

    fn enter(&self, process: u32) {
        let processes = self.directory.join("cgroup.procs");
        std::fs::write(processes, process.to_string()).expect("a group of the test's own");
    }

    /// Kills everything in it.
    fn kill(&self) {
        let processes = std::fs::read_to_string(self.directory.join("cgroup.procs"));
        for process in processes.unwrap_or_default().lines() {
            // It may have ended.
            let _ = Command::new("kill").args(["-KILL", process]).output();
        }
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        self.kill();
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut removed = std::fs::remove_dir(&self.directory);
        while removed.is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            removed = std::fs::remove_dir(&self.directory);
        }
        assert!(removed.is_ok() || std::thread::panicking(), "{removed:?}");
    }
}

#[test]
fn a_freeze_that_comes_after_its_budget_is_undone_although_the_backup_is_over() {
    let env = TestEnv::new();
    let (domain, mut guest) = mounted(&env);
    guest.run("echo 6 >/tmp/slow.freeze");
    let args = [
        "full",
        "--domain",
        domain.name(),
        "--quiesce",
        "auto",
        "--freeze-budget",
        "500ms",
        "--json",
    ];
    let report = env.vmbackup(&args).json();
    assert_eq!(report["quiescence"]["level"], "crash", "{report}");
    let reason = report["quiescence"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("did not freeze within"), "{reason}");
    assert!(frozen_by_journal(&env, &domain), "nothing says that a freeze is under way");
    assert_thawed(&mut guest, 20);
    // The entry is taken back by the next run, which thaws once more to be sure.
    guest.run("rm /tmp/slow.freeze");
    env.vmbackup(&["full", "--domain", domain.name(), "--quiesce", "require"]).ok();
    assert!(!frozen_by_journal(&env, &domain));
}

#[test]
fn an_agent_that_stops_answering_is_thawed_as_soon_as_it_answers() {
    let env = TestEnv::new();
    let (domain, mut guest) = mounted(&env);
    guest.run("echo 3 >/tmp/slow.freeze");
    let args = ["full", "--domain", domain.name(), "--quiesce", "auto", "--freeze-budget", "2s"];
    let backup = env.spawn_vmbackup(&args);
    wait_until("the freeze hook", 30, || !hooked(&mut guest).is_empty());
    guest.run("kill -STOP $(pidof qemu-ga)");
    let ended = backup.wait();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(frozen_by_journal(&env, &domain), "the guest may be frozen: {ended:?}");
    guest.run("kill -CONT $(pidof qemu-ga)");
    assert_thawed(&mut guest, 60);
}

/// Nobody is asked anything while the agent is waited for, but scratch is watched.
#[test]
fn a_guest_that_fills_scratch_while_its_agent_thaws_it_writes_on() {
    let env = TestEnv::new();
    let small = SmallDisk::mount(&env.path("."), "16M");
    let (domain, mut guest) = mounted(&env);
    guest.run("dd if=/dev/urandom of=/mnt/big bs=1M count=24 && sync; echo 30 >/tmp/slow.thaw");
    let scratch = small.path.to_str().unwrap();
    let backup = env.spawn_vmbackup(&["full", "--domain", domain.name(), "--scratch-dir", scratch]);
    wait_until("the thaw", 60, || hooked(&mut guest).iter().any(|did| did == "thaw"));
    let begun = Instant::now();
    // Where it lies. The agent is busy with its hook, the file systems are thawed.
    guest.run("rm /tmp/slow.thaw; dd if=/dev/zero of=/mnt/big bs=1M count=24 conv=notrunc,fsync");
    assert!(begun.elapsed() < Duration::from_secs(20), "it stood still: {:?}", begun.elapsed());
    assert!(!domain.has_backup_job());
    let outcome = backup.wait();
    assert_eq!(outcome.code, Some(9), "no space: {outcome:?}");
    assert!(outcome.stderr.contains("the guest comes first"), "{outcome:?}");
    assert!(small.files().is_empty());
}

#[test]
fn a_freeze_that_does_not_reach_every_file_system_is_crash_consistent() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Qcow2]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    domain.wait_for_agent();
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt && echo hello >/mnt/file && sync");
    guest.run("mkdir /mnt2 && mke2fs /dev/vdb && mount /dev/vdb /mnt2");
    let args = ["full", "--domain", domain.name(), "--quiesce", "auto", "--json"];
    let whole = env.vmbackup(&args).json();
    assert_eq!(whole["quiescence"]["level"], "filesystem", "{whole}");
    // The agent passes over what somebody else has frozen, as over what cannot be frozen.
    guest.run("fsfreeze --freeze /mnt2");
    let partial = env.vmbackup(&args).json();
    assert_eq!(partial["quiescence"]["level"], "crash", "{partial}");
    let reason = partial["quiescence"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("only 1 of 2") && reason.contains("/mnt2 (ext2)"), "{reason}");
}
