//! Domains that come back: the lost one under its own name, and a new one beside it.

use std::fs;

use crate::rig::{take, take_stopped};
use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv};

#[test]
fn the_lost_vm_comes_back_and_boots() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Raw]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("fill vda 0 8; fill vdb 8 8");
    let taken = take(&env, &domain, &mut guest, &["full"]);
    let uuid = domain.uuid();
    domain.lose();
    env.vmbackup(&["restore", &taken.id, "--define", "--start"]).ok();
    assert_eq!(domain.uuid(), uuid);
    let mut guest = domain.guest();
    for (index, disk) in ["vda", "vdb"].iter().enumerate() {
        let expected = env.run("sha256sum", &[taken.oracle(index)]).text();
        let found = guest.run(&format!("sum {disk}"));
        assert!(expected.starts_with(&found), "{disk} of the restored domain");
    }
}

#[test]
fn a_restored_vm_starts_a_right_incremental_again() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 8");
    let first = take(&env, &domain, &mut guest, &["full"]);
    guest.run("fill vda 4 8");
    take(&env, &domain, &mut guest, &["incremental"]);
    domain.lose();
    env.vmbackup(&["restore", &first.id, "--define", "--start"]).ok();
    let mut guest = domain.guest();
    guest.run("rnd vda 30000 100");
    let after = take(&env, &domain, &mut guest, &["backup"]);
    crate::rig::prove(&env, &after);
}

#[test]
fn a_new_vm_beside_the_old_shares_nothing_with_it_and_boots() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 8");
    let taken = take(&env, &domain, &mut guest, &["full"]);
    let name = env.name("copy");
    let (copy, dir) = (domain.twin(&name), env.path("copy"));
    let to = dir.to_string_lossy();
    env.vmbackup(&["restore", &taken.id, "--define", "--as", &name, "--to", &to]).ok();
    assert_ne!(copy.uuid(), domain.uuid());
    let (old, new) = (domain.dump(), copy.dump());
    for (what, tag) in [("MAC address", "<mac address="), ("disk", "<source file=")] {
        let line = |xml: &str| xml.lines().find(|line| line.contains(tag)).map(str::to_owned);
        assert_ne!(line(&old), line(&new), "{what} is shared");
    }
    // They share the serial ports' files by their description: one at a time.
    domain.destroy();
    let mut guest = copy.start();
    let expected = env.run("sha256sum", &[taken.oracle(0)]).text();
    assert!(expected.starts_with(&guest.run("sum vda")), "vda of the new domain");
}

#[test]
fn a_running_domain_and_existing_images_are_never_overwritten() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 4");
    let taken = take(&env, &domain, &mut guest, &["full"]);
    let before = guest.run("sum vda");
    env.vmbackup(&["restore", &taken.id, "--define"]).fails();
    env.vmbackup(&["restore", &taken.id, "--define", "--force"]).fails();
    assert_eq!(domain.state(), "running");
    assert_eq!(guest.run("sum vda"), before);
    let dir = env.path("there");
    fs::create_dir(&dir).expect("own directory");
    fs::write(dir.join("vda.raw"), "precious").expect("own directory");
    let to = dir.to_string_lossy();
    let refused = env.vmbackup(&["restore", &taken.id, "--to", &to]).fails();
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert_eq!(fs::read(dir.join("vda.raw")).expect("kept"), b"precious");
    env.vmbackup(&["restore", &taken.id, "--to", &to, "--force"]).ok();
    assert_eq!(fs::metadata(dir.join("vda.raw")).expect("restored").len(), 64 << 20);
}

#[test]
fn uefi_variables_are_part_of_the_point_and_come_back() {
    let env = TestEnv::new();
    env.init_repo();
    let mut spec = DomainSpec::with_disks(&[DiskFormat::Qcow2]);
    spec.uefi = true;
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("fill vda 0 4");
    domain.shut_down(&mut guest);
    let nvram = env.path("nvram.fd");
    let variables = fs::read(&nvram).expect("the NVRAM file was made");
    let taken = take_stopped(&env, &domain, &["full"]);
    domain.lose();
    assert!(!nvram.exists(), "lost as well");
    env.vmbackup(&["restore", &taken.id, "--define"]).ok();
    assert_eq!(fs::read(&nvram).expect("restored"), variables);
    let mut guest = domain.start();
    let expected = env.run("sha256sum", &[taken.oracle(0)]).text();
    assert!(expected.starts_with(&guest.run("sum vda")));
}
