//! Points across the life of a domain: restarted, stopped, gone; several at once.

use crate::rig::{assert_no_trace, prove, prove_with, take, take_stopped};
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
    assert!(stopped.read_bytes(0) < 32 << 20, "{}", stopped.report);
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

#[test]
fn a_domain_that_lost_power_is_still_backed_up_right() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 8");
    take(&env, &domain, &mut guest, &["full"]);
    guest.run("rnd vda 1000 500");
    domain.kill_qemu();
    let mut guest = domain.start();
    guest.run("zero vda 100 50");
    // Whatever became of the bitmap, `backup` makes a point, and it is right.
    let second = take(&env, &domain, &mut guest, &["backup"]);
    prove(&env, &second);
    let third = take(&env, &domain, &mut guest, &["incremental"]);
    assert_eq!(third.mode(0), "incremental", "{}", third.report);
    prove(&env, &third);
    assert_no_trace(&domain);
}

#[test]
fn a_repository_with_a_password_gives_nothing_away_without_it() {
    let env = TestEnv::new();
    let password = env.path("password");
    std::fs::write(&password, "correct horse\n").expect("own directory");
    let wrong = env.path("wrong");
    std::fs::write(&wrong, "battery staple\n").expect("own directory");
    let (password, wrong) = (password.to_string_lossy(), wrong.to_string_lossy());
    env.vmbackup(&["repo", "init", "--password-file", &password]).ok();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 4");
    let key = ["--password-file", &*password];
    let first = take(&env, &domain, &mut guest, &[&["full"], &key[..]].concat());
    guest.run("rnd vda 0 10");
    let second = take(&env, &domain, &mut guest, &[&["incremental"], &key[..]].concat());
    prove_with(&env, &first, &key);
    prove_with(&env, &second, &key);
    let refused = env.vmbackup(&["list", "--password-file", &wrong]).fails();
    assert_eq!(refused.code, Some(11), "{refused:?}");
    env.vmbackup(&["list"]).fails();
}

#[test]
fn two_domains_at_once_go_into_one_repository() {
    let env = TestEnv::new();
    env.init_repo();
    let mut spec = DomainSpec::with_disks(&[DiskFormat::Qcow2]);
    spec.suffix = "a";
    let (one, mut one_guest) = Domain::boot(&env, &spec);
    spec.suffix = "b";
    let (two, mut two_guest) = Domain::boot(&env, &spec);
    one_guest.run("fill vda 0 16");
    two_guest.run("fill vda 4 16");
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let first = take(&env, &two, &mut two_guest, &["full"]);
            let second = take(&env, &two, &mut two_guest, &["incremental"]);
            (first, second)
        });
        let first = take(&env, &one, &mut one_guest, &["full"]);
        let second = take(&env, &one, &mut one_guest, &["incremental"]);
        let (other_first, other_second) = other.join().expect("the other domain's backups");
        for taken in [&first, &second, &other_first, &other_second] {
            prove(&env, taken);
        }
    });
}

#[test]
fn forget_and_gc_beside_a_running_backup_cost_no_point() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 32");
    let first = take(&env, &domain, &mut guest, &["full"]);
    guest.run("fill vda 0 32");
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    let third = std::thread::scope(|scope| {
        let tidy = scope.spawn(|| {
            env.vmbackup(&["forget", &first.id]).ok();
            for _ in 0..3 {
                env.vmbackup(&["gc"]).ok();
            }
        });
        let third = take(&env, &domain, &mut guest, &["full"]);
        tidy.join().expect("forget and gc");
        third
    });
    env.vmbackup(&["gc"]).ok();
    prove(&env, &second);
    prove(&env, &third);
    env.vmbackup(&["show", &first.id]).fails();
    env.vmbackup(&["check", "--read-data"]).ok();
}
