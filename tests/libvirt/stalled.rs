//! A repository that does not answer any more: the backup is given up, and the guest runs on.

use std::time::{Duration, Instant};

use crate::rig::{assert_no_trace, prove_with, take};
use crate::support::{DiskFormat, Domain, DomainSpec, HangingDisk, Process, TestEnv};

#[test]
fn a_repository_that_hangs_ends_the_backup_in_bounded_time_and_the_guest_writes_on() {
    let env = TestEnv::new();
    let mut disk = HangingDisk::mount(&env.path("."));
    let repository = disk.path.join("repo");
    let repository = repository.to_str().expect("text");
    env.vmbackup(&["repo", "init", "--no-key", "--repo", repository]).ok();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 32");
    let full = ["full", "--domain", domain.name(), "--repo", repository];
    // While it is copied, and when all of it is there.
    for step in ["after:job", "before:manifest"] {
        let mut command = env.vmbackup_command(&full);
        command.env("VMBACKUP_REPO_TIMEOUT", "3s").env("VMBACKUP_STOP_AT", step);
        let mut backup = Process::spawn(&mut command);
        backup.wait_until_stopped(step);
        disk.freeze();
        let begun = Instant::now();
        backup.signal("CONT");
        guest.run("fill vda 0 16");
        backup.wait_until_said("has not answered for 3 s", 60);
        assert!(begun.elapsed() < Duration::from_secs(60), "{step}");
        // Not only when the repository answers again. Until then the kernel keeps what is left of the
        // process: who waits for a frozen file system cannot be killed.
        assert_no_trace(&domain);
        disk.answer();
        let outcome = backup.wait();
        assert_eq!(outcome.code, Some(15), "{step}: {outcome:?}");
        outcome.fails_with(&["VMBACKUP_REPO_TIMEOUT"]);
    }
    let listed = env.vmbackup(&["list", "--json", "--repo", repository]).json();
    assert_eq!(listed["points"].as_array().map(Vec::len), Some(0), "{listed}");
    let taken = take(&env, &domain, &mut guest, &["full", "--repo", repository]);
    prove_with(&env, &taken, &["--repo", repository]);
}
