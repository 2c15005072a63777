//! A domain of another host: this machine, through an SSH daemon of the test's own.

use std::path::PathBuf;

use crate::killed::{Places, assert_not_frozen, mentions, prove};
use crate::rig::assert_no_trace;
use crate::support::{DiskFormat, DiskSpec, Domain, DomainSpec, Process, SlowDisk, Ssh, TestEnv};
use crate::support::{is_asked_for, wait_until};

/// Instead of a step: when a part of the second disk has been read.
const READING: &str = "reading";

/// A backup that has stopped at a step, or is at work on the second disk.
#[track_caller]
fn begun_until(env: &TestEnv, slow: &SlowDisk, step: &str, args: &[&str]) -> Process {
    if step != READING {
        return env.stopped_at(step, args);
    }
    slow.be_slow();
    let before = slow.read_bytes();
    let mut backup = env.spawn_vmbackup(args);
    wait_until("a part of the disk is read", 60, || {
        assert!(backup.is_running(), "it ended before");
        slow.read_bytes() >= before + (1 << 20)
    });
    let forwards =
        env.processes().iter().any(|line| line.starts_with("ssh ") && line.contains(" -L "));
    assert!(forwards, "{:?}", env.processes());
    backup
}

/// The socket that is forwarded lies in a directory of ours, here; scratch and the socket of the export there.
#[test]
fn a_backup_of_a_remote_domain_can_be_killed_while_it_reads() {
    let env = TestEnv::new();
    env.init_repo();
    let (places, ssh) = (Places::new(&env), Ssh::start(&env));
    let disk = DiskSpec { format: DiskFormat::Qcow2, size_mib: 16 };
    let domain =
        Domain::define(&env, &DomainSpec { disks: vec![disk; 2], ..DomainSpec::with_disks(&[]) });
    let slow = SlowDisk::below(&env, domain.disk(1), "24M");
    let mut guest = domain.start();
    domain.wait_for_agent();
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt && sync");
    let uri = ssh.uri();
    let run = |command| [&places.backup(command, &domain)[..], &["--connect", &uri]].concat();
    env.vmbackup(&run("full")).ok();
    for (at, step) in ["after:freeze", READING, READING, "after:manifest"].iter().enumerate() {
        guest.run(&format!("rnd vdb {} 20; echo {at} >/mnt/file; sync", 4096 + at * 100));
        let full = [&run("full")[..], &["--quiesce", "require"]].concat();
        let backup = begun_until(&env, &slow, step, &full);
        guest.run(&format!("rnd vdb {} 20", 4130 + at * 100));
        backup.signal("KILL");
        backup.wait();
        slow.be_fast();
        assert_eq!(domain.state(), "running", "{step}");
        assert_not_frozen(&mut guest, step);
        // What it had here ends by itself, and its sessions there.
        env.assert_nothing_runs(step);
        ssh.assert_nobody_is_in(&env, step);

        let mut said = String::new();
        if is_asked_for(at) {
            let recover = ["recover", "--domain", domain.name(), "--connect", &uri];
            said.push_str(&env.vmbackup(&recover).ok().stdout);
            assert!(!domain.has_backup_job(), "{step}: {said}");
            assert_no_trace(&domain);
            assert_eq!(domain.sockets(), Vec::<PathBuf>::new(), "{step}");
            places.assert_empty(&env, step);
        }
        let next = env.vmbackup(&run("incremental"));
        said.push_str(&next.stderr);
        assert!(mentions(&said), "{step}: {said}");
        let report = next.json();
        guest.run("sync");
        domain.suspend();
        let oracles = domain.oracles(&at.to_string());
        domain.resume();
        prove(&env, &report, &oracles, step);
        assert_no_trace(&domain);
        let point = report["point"].as_str().expect("a point id");
        let held = domain.bitmaps();
        assert!(held.len() == 1 && held[0].contains(point), "{step}: {held:?}");
        assert_eq!(domain.sockets(), Vec::<PathBuf>::new(), "{step}");
        places.assert_empty(&env, step);
        env.assert_nothing_runs(step);
        ssh.assert_nobody_is_in(&env, step);
    }
}
