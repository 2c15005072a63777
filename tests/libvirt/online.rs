//! Points of running domains: full, incremental, every kind of change and of disk.

use crate::rig::{assert_no_trace, prove, take};
use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv};

#[test]
fn every_point_of_two_disks_equals_its_instant() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Qcow2]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("fill vda 0 8; fill vda 32 4; fill vdb 16 8; pat vdb 67100000 8000");
    let first = take(&env, &domain, &mut guest, &["full"]);
    assert_no_trace(&domain);
    guest.run("zero vda 1024 512; discard vda 33000 1024; rnd vda 100 3; pat vdb 20000001 77777");
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    assert_no_trace(&domain);
    guest.run("discard vdb 16384 4096; zero vdb 22000 100; pat vda 67108863 1; pat vda 4095 2");
    let third = take(&env, &domain, &mut guest, &["backup"]);
    assert_no_trace(&domain);
    for taken in [&second, &third] {
        assert_eq!((taken.mode(0), taken.mode(1)), ("incremental", "incremental"));
    }
    assert_eq!((first.mode(0), first.mode(1)), ("full", "full"));
    for taken in [&first, &second, &third] {
        prove(&env, taken);
    }
}

#[test]
fn an_incremental_reads_the_chunks_that_changed_and_no_others() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 16");
    env.vmbackup(&["full", "--domain", domain.name()]).ok();
    let incremental = ["incremental", "--domain", domain.name(), "--json"];
    let report = env.vmbackup(&incremental).json();
    assert_eq!(report["disks"][0]["read_bytes"], 0, "{report}");
    assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{report}");
    // One byte costs the chunk it lies in.
    guest.run("pat vda 5000000 1");
    let report = env.vmbackup(&incremental).json();
    assert_eq!(report["disks"][0]["read_bytes"], 256 << 10, "{report}");
}

#[test]
fn a_raw_disk_is_read_in_full_beside_an_incremental_one() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Raw]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("fill vda 0 8; fill vdb 3 8");
    let first = take(&env, &domain, &mut guest, &["full"]);
    guest.run("pat vdb 12345677 99999; zero vdb 4096 100; rnd vda 9000 64");
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    assert_no_trace(&domain);
    assert_eq!((second.mode(0), second.mode(1)), ("incremental", "full"));
    let reason = &second.report["disks"][1]["read"]["reason"];
    assert_eq!(reason, "format-without-bitmaps", "{}", second.report);
    prove(&env, &first);
    prove(&env, &second);
}

#[test]
fn a_disk_on_a_backing_file_restores_whole() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2Backed]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("pat vda 1500000 200000; discard vda 2048 512; zero vda 20480 256");
    let first = take(&env, &domain, &mut guest, &["full"]);
    guest.run("discard vda 20480 700; rnd vda 3000 10");
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    assert_eq!(second.mode(0), "incremental");
    prove(&env, &first);
    prove(&env, &second);
}

#[test]
fn the_guest_agent_freezes_the_file_systems_for_the_instant() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    domain.wait_for_agent();
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt && echo hello >/mnt/file");
    let args = ["full", "--domain", domain.name(), "--quiesce", "require", "--json"];
    let report = env.vmbackup(&args).json();
    assert_eq!(report["quiescence"]["level"], "filesystem", "{report}");
    let frozen_ms = report["quiescence"]["frozen_ms"].as_u64().expect("measured");
    assert!(frozen_ms <= 10_000, "over the default budget: {frozen_ms} ms");
    // Not frozen any more: this would never return.
    guest.run("echo again >/mnt/file; sync");
    assert_no_trace(&domain);
}

/// Another VM may write to it, and neither QEMU's bitmap nor ours sees that.
#[test]
fn a_shareable_disk_is_read_in_full_beside_an_incremental_one() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Raw]);
    let domain = Domain::define(&env, &spec);
    let xml = domain.dump().replacen("<target dev='vdb'", "<shareable/><target dev='vdb'", 1);
    let file = env.path("shareable.xml");
    std::fs::write(&file, xml).expect("own directory");
    domain.virsh(&["define", &file.to_string_lossy()]).ok();
    assert!(domain.dump().contains("<shareable/>"));
    let mut guest = domain.start();
    guest.run("fill vda 0 4; fill vdb 0 4");
    let first = take(&env, &domain, &mut guest, &["full"]);
    // Past QEMU, as another VM would.
    let image = domain.disk(1).to_string_lossy().into_owned();
    let write = format!("printf other | dd of={image} bs=1 seek=33554432 conv=notrunc");
    env.run("sh", &["-c", &write]).ok();
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    assert_eq!((second.mode(0), second.mode(1)), ("incremental", "full"));
    assert_eq!(second.report["disks"][1]["read"]["reason"], "shareable", "{}", second.report);
    prove(&env, &first);
    prove(&env, &second);
}
