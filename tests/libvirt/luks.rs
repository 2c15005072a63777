//! Disks under LUKS, with the passphrase in libvirt: read decrypted, into a repository with a key.

use std::fs;

use crate::rig::{assert_no_trace, prove_with, take};
use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv};

/// Options of a repository that has a key.
fn with_key(env: &TestEnv) -> [String; 2] {
    let password = env.path("password");
    fs::write(&password, "correct horse\n").expect("own directory");
    let key = ["--password-file".to_owned(), password.to_string_lossy().into_owned()];
    env.vmbackup(&["repo", "init", &key[0], &key[1]]).ok();
    key
}

#[test]
fn encrypted_disks_are_stored_as_the_guest_sees_them_and_come_back_in_the_clear() {
    let env = TestEnv::new();
    let key = with_key(&env);
    let key = [&*key[0], &*key[1]];
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2Luks, DiskFormat::RawLuks]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("rnd vda 61440 999; rnd vdb 61500 500");

    // Nothing of it goes where everybody could read it.
    let open = env.path("open");
    let open = open.to_string_lossy();
    env.vmbackup(&["repo", "init", "--no-key", "--repo", &open]).ok();
    let refused = env.vmbackup(&["full", "--domain", domain.name(), "--repo", &open]);
    let refused = refused.fails_with(&["vda", "is encrypted", "repo key add"]);
    assert_eq!(refused.code, Some(8), "{refused:?}");
    assert_no_trace(&domain);

    let full = take(&env, &domain, &mut guest, &[&["full"], &key[..]].concat());
    guest.run("pat vda 63000000 7777; zero vdb 61600 64");
    let next = take(&env, &domain, &mut guest, &[&["incremental"], &key[..]].concat());
    assert_eq!((next.mode(0), next.mode(1)), ("incremental", "full"), "{}", next.report);
    for taken in [&full, &next] {
        prove_with(&env, taken, &key);
        let shown = env.vmbackup(&[&["show", &taken.id, "--json"], &key[..]].concat()).json();
        for disk in 0..2 {
            assert_eq!(shown["disks"][disk]["layer"], "decrypted-luks", "{shown}");
            assert_eq!(shown["disks"][disk]["size_bytes"], 64 << 20, "{shown}");
        }
    }
    let plan = env.vmbackup(&[&["plan", "--domain", domain.name()], &key[..]].concat()).text();
    assert!(plan.contains("in the clear"), "{plan}");

    let sums = |guest: &mut crate::support::Guest| {
        let sum = "dd if=/dev/vda bs=1k skip=61440 2>/dev/null | sha256sum";
        (guest.run(sum), guest.run(&sum.replace("vda", "vdb")))
    };
    let before = sums(&mut guest);
    domain.lose();
    let restore = ["restore", &next.id, "--define", "--start", "--json"];
    let report = env.vmbackup(&[&restore[..], &key[..]].concat()).json();
    assert!(report["domain"]["changes"].to_string().contains("no longer encrypted"), "{report}");
    assert!(!domain.dump().contains("<encryption"), "{}", domain.dump());
    assert_eq!(sums(&mut domain.guest()), before);
}

/// The container around a raw disk looks like any raw disk: it was stored as it was, as a disk that
/// no guest can read without what the description does not hold any more.
#[test]
fn encrypted_disks_of_a_stopped_domain_are_refused_with_the_way_round() {
    let env = TestEnv::new();
    let key = with_key(&env);
    let key = [&*key[0], &*key[1]];
    for (suffix, format) in [("q", DiskFormat::Qcow2Luks), ("r", DiskFormat::RawLuks)] {
        let spec = DomainSpec { suffix, ..DomainSpec::with_disks(&[format]) };
        let domain = Domain::define(&env, &spec);
        let before = fs::read(domain.disk(0)).expect("own disk");
        let hint = format!("virsh start --paused {}", domain.name());
        let args = ["full", "--domain", domain.name()];
        let refused = env.vmbackup(&[&args[..], &key[..]].concat());
        let refused = refused.fails_with(&["vda", "is encrypted", &hint]);
        assert_eq!(refused.code, Some(8), "{refused:?}");
        let plan =
            env.vmbackup(&[&["plan", "--json", "--domain", domain.name()], &key[..]].concat());
        assert!(plan.stdout.contains("is encrypted") && plan.stdout.contains(&hint), "{plan:?}");
        assert!(fs::read(domain.disk(0)).expect("own disk") == before, "the image was touched");
        domain.virsh(&["start", "--paused", domain.name()]).ok();
        let args = ["full", "--domain", domain.name(), "--quiesce", "never"];
        env.vmbackup(&[&args[..], &key[..]].concat()).ok();
    }
}
