//! What befalls a VM or its repository in the middle of a backup: either the point is that of its instant, or
//! there is none, and the guest, what builds on the last point and the next run are none the worse for it.

use std::path::PathBuf;

use crate::rig::{Taken, assert_no_trace, prove, prove_with, take, take_disturbed, take_stopped};
use crate::support::{
    DiskFormat, Domain, DomainSpec, Guest, HangingDisk, OwnLibvirt, SlowDisk, SmallDisk, TestEnv,
    assert_same_content, wait_until,
};

/// Where a run is disturbed: nothing is read yet, and everything is.
const STEPS: [&str; 2] = ["after:job", "before:manifest"];

/// A running domain with two disks and a point of it.
fn begun(env: &TestEnv) -> (Domain<'_>, Guest, Taken) {
    env.init_repo();
    let disks = [DiskFormat::Qcow2, DiskFormat::Qcow2];
    let (domain, mut guest) = Domain::boot(env, &DomainSpec::with_disks(&disks));
    guest.run("fill vda 0 8; fill vdb 0 4");
    let first = take(env, &domain, &mut guest, &["full"]);
    (domain, guest, first)
}

/// How many points there are.
fn points(env: &TestEnv) -> usize {
    env.vmbackup(&["list", "--json"]).json()["points"].as_array().expect("points").len()
}

/// A run whose VM ends made no point and says why, or one that is right, and says what it could not do
/// to the VM any more. Nothing of it is left on this machine.
#[track_caller]
fn loses_its_vm(env: &TestEnv, domain: &Domain<'_>, step: &str, end: impl FnOnce()) {
    let held = points(env);
    let (outcome, taken) = take_disturbed(env, domain, ("backup", step), end);
    let code = if taken.is_some() { 19 } else { 16 };
    assert_eq!(outcome.code, Some(code), "{step}: {outcome:?}");
    // When all of it is read, it is not lost.
    assert_eq!(taken.is_some(), step == "before:manifest", "{step}: {outcome:?}");
    assert_eq!(points(env), held + usize::from(taken.is_some()), "{step}");
    if let Some(taken) = taken {
        prove(env, &taken);
    }
    env.assert_nothing_runs(step);
}

/// A run that is not kept from anything.
#[track_caller]
fn goes_on(env: &TestEnv, domain: &Domain<'_>, step: &str, disturb: impl FnOnce()) {
    let (outcome, taken) = take_disturbed(env, domain, ("incremental", step), disturb);
    let outcome = outcome.ok();
    let taken = taken.unwrap_or_else(|| panic!("{step}: {outcome:?}"));
    assert_eq!(taken.mode(0), "incremental", "{step}: {}", taken.report);
    prove(env, &taken);
    assert_no_trace(domain);
    env.assert_nothing_runs(step);
}

/// The next incremental is one, and right.
#[track_caller]
fn next_is_incremental(env: &TestEnv, domain: &Domain<'_>, guest: &mut Guest, step: &str) {
    let next = take(env, domain, guest, &["incremental"]);
    assert_eq!(next.mode(0), "incremental", "{step}: {}", next.report);
    prove(env, &next);
    assert_no_trace(domain);
    assert_eq!(domain.bitmaps().len(), 1, "{step}: {:?}", domain.bitmaps());
}

#[test]
fn a_qemu_that_is_killed_in_the_middle_costs_that_backup_only() {
    let env = TestEnv::new();
    let (domain, mut guest, first) = begun(&env);
    for step in STEPS {
        guest.run("rnd vda 1000 500; sync");
        loses_its_vm(&env, &domain, step, || domain.kill_qemu());
        guest = domain.start();
        guest.run("zero vda 100 50");
        // QEMU could not store its bitmaps: whatever became of them, the point is right.
        let next = take(&env, &domain, &mut guest, &["backup"]);
        prove(&env, &next);
        next_is_incremental(&env, &domain, &mut guest, step);
    }
    prove(&env, &first);
}

#[test]
fn a_guest_that_shuts_down_in_the_middle_costs_that_backup_only() {
    OwnLibvirt::with(|_| {
        let env = TestEnv::new();
        let (domain, mut guest, first) = begun(&env);
        for step in STEPS {
            guest.run("rnd vda 1000 500; sync");
            loses_its_vm(&env, &domain, step, || domain.shut_down(&mut guest));
            // What it wrote since the last point is in the bitmap that QEMU stored when it ended.
            let stopped = take_stopped(&env, &domain, &["incremental"]);
            assert_eq!(stopped.mode(0), "incremental", "{step}: {}", stopped.report);
            prove(&env, &stopped);
            guest = domain.start();
            guest.run("zero vda 100 50");
            next_is_incremental(&env, &domain, &mut guest, step);
        }
        prove(&env, &first);
    });
}

#[test]
fn a_guest_that_reboots_in_the_middle_costs_nothing() {
    OwnLibvirt::with(|_| {
        let env = TestEnv::new();
        let (domain, mut guest, _) = begun(&env);
        guest.run("rnd vda 1000 500; sync");
        goes_on(&env, &domain, "after:job", || {
            guest.reboot();
            guest.run("rnd vda 900 300; fill vdb 0 2");
        });
        next_is_incremental(&env, &domain, &mut guest, "afterwards");
    });
}

/// Takes the second disk out as a guest can, or somebody at the monitor: libvirt refuses to.
#[track_caller]
fn unplug(domain: &Domain<'_>) {
    let detach = ["detach-disk", domain.name(), "vdb", "--live"];
    domain.virsh(&detach).fails_with(&["active block job"]);
    let unplug = r#"{"execute":"device_del","arguments":{"id":"virtio-disk1"}}"#;
    domain.virsh(&["qemu-monitor-command", domain.name(), unplug]).ok();
    wait_until("the disk is gone", 30, || {
        !domain.virsh(&["domblklist", domain.name()]).text().contains("vdb")
    });
}

#[test]
fn a_disk_that_is_unplugged_in_the_middle_costs_that_backup_only() {
    OwnLibvirt::with(|_| {
        let env = TestEnv::new();
        let (domain, mut guest, first) = begun(&env);
        guest.run("rnd vda 1000 500; rnd vdb 1000 500; sync");
        let (outcome, taken) =
            take_disturbed(&env, &domain, ("backup", "after:job"), || unplug(&domain));
        assert_eq!(outcome.code, Some(16), "{outcome:?}");
        assert!(taken.is_none(), "{outcome:?}");
        outcome.fails_with(&["the disks of domain", "were changed meanwhile"]);
        assert_no_trace(&domain);
        env.assert_nothing_runs("unplugged");
        guest.run("rnd vda 900 300; sync");
        let report = env.vmbackup(&["incremental", "--domain", domain.name(), "--json"]).json();
        assert_eq!(report["disks"].as_array().map(Vec::len), Some(1), "{report}");
        assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{report}");
        prove(&env, &first);
    });
}

/// When all of it is read it is not lost, and the job ends although libvirt has forgotten one of its disks.
#[test]
fn a_disk_that_is_unplugged_after_the_last_read_is_part_of_the_point() {
    OwnLibvirt::with(|_| {
        let env = TestEnv::new();
        let (domain, mut guest, _) = begun(&env);
        guest.run("rnd vda 1000 500; rnd vdb 1000 500; sync");
        let (outcome, taken) =
            take_disturbed(&env, &domain, ("incremental", "before:manifest"), || unplug(&domain));
        outcome.ok();
        prove(&env, &taken.expect("a point"));
        assert_no_trace(&domain);
        env.assert_nothing_runs("unplugged");
    });
}

/// QEMU reads on what it has open, and libvirt does not know any more that it does.
#[test]
fn a_disk_that_is_unplugged_while_it_is_read_costs_that_backup_only() {
    OwnLibvirt::with(|_| {
        let env = TestEnv::new();
        env.init_repo();
        let disks = [DiskFormat::Qcow2, DiskFormat::Qcow2];
        let domain = Domain::define(&env, &DomainSpec::with_disks(&disks));
        let slow = SlowDisk::below(&env, domain.disk(1), "64M");
        let mut guest = domain.start();
        guest.run("fill vda 0 8");
        let first = take(&env, &domain, &mut guest, &["full"]);
        slow.be_slow();
        let before = slow.read_bytes();
        let mut backup = env.spawn_vmbackup(&["full", "--domain", domain.name()]);
        wait_until("a part of the disk is read", 60, || {
            assert!(backup.is_running(), "it ended before");
            slow.read_bytes() >= before + (1 << 20)
        });
        unplug(&domain);
        assert!(backup.is_running() && slow.read_bytes() < before + (48 << 20), "too late");
        // Not when all of it is read, which takes half a minute.
        let outcome = backup.wait();
        assert!(slow.read_bytes() < before + (48 << 20), "it read on");
        assert_eq!(outcome.code, Some(16), "{outcome:?}");
        outcome.fails_with(&["were changed meanwhile", "vdb was unplugged"]);
        slow.be_fast();
        assert_eq!(points(&env), 1);
        assert_no_trace(&domain);
        assert_eq!(domain.sockets(), Vec::<PathBuf>::new());
        let scratch = std::fs::read_dir("/var/lib/libvirt/qemu").expect("libvirt's").flatten();
        let mut scratch = scratch.map(|entry| entry.file_name().into_string().expect("text"));
        assert_eq!(scratch.find(|name| name.starts_with("vmb-")), None);
        wait_until("processes end", 20, || env.processes().is_empty());
        guest.run("rnd vda 900 300; sync");
        domain.suspend();
        let oracle = domain.oracle(0, "unplugged");
        let args = ["incremental", "--domain", domain.name(), "--quiesce", "never", "--json"];
        let report = env.vmbackup(&args).json();
        domain.resume();
        assert_eq!(report["disks"].as_array().map(Vec::len), Some(1), "{report}");
        assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{report}");
        let (id, to) = (report["point"].as_str().expect("a point id"), env.path("unplugged"));
        env.vmbackup(&["restore", id, "--to", &to.to_string_lossy(), "--format", "raw"]).ok();
        assert_same_content(&env, (&to.join("vda.raw"), "raw"), (&oracle, "raw"));
        prove(&env, &first);
        // The image is none the worse for it.
        domain.destroy();
        guest = domain.start();
        let next = take(&env, &domain, &mut guest, &["backup"]);
        prove(&env, &next);
        assert_no_trace(&domain);
    });
}

#[test]
fn a_libvirt_that_is_restarted_in_the_middle_costs_nothing() {
    OwnLibvirt::with(|libvirt| {
        let env = TestEnv::new();
        let (domain, mut guest, _) = begun(&env);
        for step in ["after:job", "before:manifest", "after:manifest"] {
            guest.run("rnd vda 1000 500; sync");
            goes_on(&env, &domain, step, || libvirt.restart());
        }
        // It ends together with the run.
        for step in STEPS {
            guest.run("rnd vda 1000 500; sync");
            let backup = env.stopped_at(step, &["backup", "--domain", domain.name()]);
            backup.signal("KILL");
            libvirt.end("KILL");
            backup.wait();
            libvirt.start();
            goes_on(&env, &domain, "after:job", || ());
            assert_eq!(domain.bitmaps().len(), 1, "{step}: {:?}", domain.bitmaps());
        }
    });
}

/// Whether the call that begins the job arrived is not known to whoever lost the way: it stays on record until
/// the next run.
#[test]
fn a_libvirt_that_is_restarted_as_the_job_begins_costs_that_backup_only() {
    OwnLibvirt::with(|libvirt| {
        let env = TestEnv::new();
        let (domain, mut guest, _) = begun(&env);
        let journals = || std::fs::read_dir(env.path("state/journal")).expect("there").count();
        guest.run("rnd vda 1000 500; sync");
        let (outcome, taken) =
            take_disturbed(&env, &domain, ("incremental", "before:job"), || libvirt.restart());
        assert_eq!((outcome.code, taken.is_some()), (Some(13), false), "{outcome:?}");
        assert_no_trace(&domain);
        assert_eq!(journals(), 1);
        next_is_incremental(&env, &domain, &mut guest, "afterwards");
        assert_eq!(journals(), 0);
        env.assert_nothing_runs("afterwards");
    });
}

#[test]
fn a_repository_that_is_full_in_the_middle_costs_that_backup_only() {
    let env = TestEnv::new();
    let small = SmallDisk::mount(&env.path("."), "72M");
    let repository = small.path.join("repo");
    let repository = repository.to_str().expect("text");
    env.vmbackup(&["repo", "init", "--no-key", "--repo", repository]).ok();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 8");
    let first = take(&env, &domain, &mut guest, &["full", "--repo", repository]);
    guest.run("fill vda 8 56");
    let incremental = ["incremental", "--domain", domain.name(), "--repo", repository];
    let outcome = env.vmbackup(&incremental).fails_with(&["small"]);
    assert_eq!(outcome.code, Some(9), "{outcome:?}");
    assert_no_trace(&domain);
    env.assert_nothing_runs("full");
    guest.run("rnd vda 0 500");
    prove_with(&env, &first, &["--repo", repository]);
    // With room again, it goes on from the point there is.
    let larger = ["-o", "remount,size=256M", small.path.to_str().expect("text")];
    env.run("mount", &larger).ok();
    let next = take(&env, &domain, &mut guest, &["incremental", "--repo", repository]);
    assert_eq!(next.mode(0), "incremental", "{}", next.report);
    prove_with(&env, &next, &["--repo", repository]);
    env.vmbackup(&["gc", "--repo", repository]).ok();
    env.vmbackup(&["check", "--read-data", "--repo", repository]).ok();
}

#[test]
fn a_repository_that_is_unplugged_in_the_middle_costs_that_backup_only() {
    let env = TestEnv::new();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    // Not before the domain, whose QEMU would keep it mounted where it lives.
    let disk = HangingDisk::mount(&env.path("."));
    let repository = disk.path.join("repo");
    let repository = repository.to_str().expect("text");
    env.vmbackup(&["repo", "init", "--no-key", "--repo", repository]).ok();
    guest.run("fill vda 0 8");
    let first = take(&env, &domain, &mut guest, &["full", "--repo", repository]);
    for step in STEPS {
        guest.run("fill vda 8 8; sync");
        let args = ["incremental", "--domain", domain.name(), "--repo", repository];
        let backup = env.stopped_at(step, &args);
        disk.pull_out();
        backup.signal("CONT");
        let outcome = backup.wait();
        assert_eq!(outcome.code, Some(20), "{step}: {outcome:?}");
        outcome.fails_with(&["hanging"]);
        assert_no_trace(&domain);
        guest.run("rnd vda 0 500");
        disk.put_back();
        env.assert_nothing_runs(step);
        let next = take(&env, &domain, &mut guest, &["incremental", "--repo", repository]);
        assert_eq!(next.mode(0), "incremental", "{step}: {}", next.report);
        prove_with(&env, &next, &["--repo", repository]);
    }
    prove_with(&env, &first, &["--repo", repository]);
    env.vmbackup(&["gc", "--repo", repository]).ok();
    env.vmbackup(&["check", "--read-data", "--repo", repository]).ok();
}
