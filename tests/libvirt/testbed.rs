//! The test bed itself: if these fail, nothing else in this binary means anything.

use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv, assert_same_content};

#[test]
fn the_guest_writes_what_it_is_told_and_the_oracle_sees_it() {
    let env = TestEnv::new();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Raw]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("rnd vda 1024 512; pat vdb 1234567 3333; zero vda 1100 64; discard vda 1300 64");
    let (sum_a, sum_b) = (guest.run("sum vda"), guest.run("sum vdb"));
    assert_ne!(sum_a, sum_b);
    domain.suspend();
    let copies = domain.oracles("now");
    for (index, expected) in [(0, sum_a), (1, sum_b)] {
        let sum = env.run("sha256sum", &[&copies[index]]).text();
        assert!(sum.starts_with(&expected), "disk {index}: {sum} is not {expected}");
    }
    domain.resume();
    guest.run("rnd vda 4096 64");
    assert_same_content(&env, (domain.disk(1), "raw"), (&copies[1], "raw"));
}

#[test]
fn the_guest_agent_freezes_and_thaws() {
    let env = TestEnv::new();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    domain.wait_for_agent();
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt && echo hello >/mnt/file");
    let frozen = domain.virsh(&["domfsfreeze", domain.name()]).ok();
    assert!(frozen.stdout.contains("Froze 1"), "{frozen:?}");
    let thawed = domain.virsh(&["domfsthaw", domain.name()]).ok();
    assert!(thawed.stdout.contains("Thawed 1"), "{thawed:?}");
    guest.run("echo again >/mnt/file; sync");
}

#[test]
fn the_guest_boots_with_uefi_and_restarts() {
    let env = TestEnv::new();
    let mut spec = DomainSpec::with_disks(&[DiskFormat::Qcow2Backed]);
    spec.uefi = true;
    let (domain, mut guest) = Domain::boot(&env, &spec);
    let before = guest.run("sum vda");
    domain.destroy();
    let mut guest = domain.start();
    assert_eq!(guest.run("sum vda"), before);
}
