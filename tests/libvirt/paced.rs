//! How much of a backup is ahead of what the guest itself reads and writes.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::support::{DiskFormat, Domain, DomainSpec, NbdLog, NbdServer, TestEnv};

const MIB: usize = 1 << 20;

/// A guest's write waited behind 32 requests of ours, in the thread of QEMU that does both.
#[test]
fn a_running_domain_is_not_read_by_many_requests_at_once_before_that_has_paid() {
    let env = TestEnv::new();
    env.init_repo();
    let log = env.path("reads.log");
    let logfile = format!("logfile={}", log.display());
    let disk = ["--filter=log", "--filter=delay", "pattern", "8M", "rdelay=20ms", &logfile];
    let server = NbdServer::nbdkit(&env, &disk);
    // Its QEMU has a user of its own.
    for (path, mode) in [(env.path("run"), 0o755), (server.socket().to_owned(), 0o777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let domain = Domain::define(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let (image, below) = (domain.disk(0).to_string_lossy(), server.uri(""));
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &below, &image];
    env.run("qemu-img", &create).ok();
    domain.virsh(&["start", "--paused", domain.name()]).ok();
    env.vmbackup(&["full", "--domain", domain.name()]).ok();
    let reads = NbdLog::of(&log);
    assert!(reads.bytes("Read") >= 8 * MIB, "{}", reads.0);
    assert!(reads.open("Read").1 <= 2, "{}", reads.0);
}
