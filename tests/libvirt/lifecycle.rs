//! Points across the life of a domain: restarted, crashed, several at once, sealed with a password.

use crate::rig::{assert_no_trace, prove, prove_with, take};
use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv};

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
fn incrementals_go_on_across_a_restart() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 16");
    let first = take(&env, &domain, &mut guest, &["full"]);
    guest.run("pat vda 5000001 70000; discard vda 8192 1024");
    // A clean end: bitmaps are stored in the image.
    domain.shut_down(&mut guest);
    let mut guest = domain.start();
    guest.run("zero vda 2048 300; pat vda 999 1001");
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    assert_eq!(second.mode(0), "incremental", "{}", second.report);
    assert_no_trace(&domain);
    prove(&env, &first);
    prove(&env, &second);
}
