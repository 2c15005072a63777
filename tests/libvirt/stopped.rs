//! Points of stopped domains, read from their images, in one chain with those of running ones.

use crate::rig::{assert_no_trace, prove, take, take_stopped};
use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv};

#[test]
fn incrementals_go_on_across_a_restart_and_while_stopped() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 16");
    let first = take(&env, &domain, &mut guest, &["full"]);
    guest.run("pat vda 5000001 70000; sync");
    // A clean end: bitmaps are stored in the image.
    domain.shut_down(&mut guest);
    let stopped = take_stopped(&env, &domain, &["incremental"]);
    assert_eq!(stopped.mode(0), "incremental", "{}", stopped.report);
    let mut guest = domain.start();
    guest.run("zero vda 2048 300; rnd vda 50000 77");
    let third = take(&env, &domain, &mut guest, &["incremental"]);
    assert_eq!(third.mode(0), "incremental", "{}", third.report);
    assert_no_trace(&domain);
    guest.run("discard vda 8192 1024");
    domain.shut_down(&mut guest);
    let mut guest = domain.start();
    guest.run("pat vda 999 1001");
    let fourth = take(&env, &domain, &mut guest, &["incremental"]);
    assert_eq!(fourth.mode(0), "incremental", "{}", fourth.report);
    for taken in [&first, &stopped, &third, &fourth] {
        prove(&env, taken);
    }
}

#[test]
fn a_stopped_domain_with_every_kind_of_disk_is_backed_up_from_its_images() {
    let env = TestEnv::new();
    env.init_repo();
    let formats = [DiskFormat::Qcow2, DiskFormat::Raw, DiskFormat::Qcow2Backed];
    let domain = Domain::define(&env, &DomainSpec::with_disks(&formats));
    for (index, format) in formats.iter().enumerate() {
        let image = domain.disk(index).to_string_lossy().into_owned();
        let write = "write -q -P 0x77 3M 1M";
        env.run("qemu-io", &["-f", format.name(), "-c", write, &image]).ok();
    }
    let taken = take_stopped(&env, &domain, &["full"]);
    assert_eq!(taken.report["quiescence"]["level"], "stopped", "{}", taken.report);
    prove(&env, &taken);
    assert_eq!(domain.state(), "shut off");
}
