//! Domains that libvirt migrates between two hosts, each with a libvirt and a vmbackup of its own, which see the
//! same files and share the repository: the next point is right, and as small as it can be.

use std::path::PathBuf;

use serde_json::Value;

use crate::rig::{Taken, assert_no_trace, prove, take_disturbed, take_stopped};
use crate::support::{
    BESIDE_URI, DiskFormat, Domain, DomainSpec, Guest, OwnLibvirt, Process, TestEnv, libvirt,
    wait_until,
};

const QCOW2: [DiskFormat; 2] = [DiskFormat::Qcow2, DiskFormat::Qcow2];

/// Options of a migration whose storage both hosts have. libvirt knows shared storage by its kind of file
/// system, which that of the tests is not.
const SHARED: [&str; 2] = ["--live", "--unsafe"];

/// Two hosts.
struct Hosts {
    here: TestEnv,
    there: TestEnv,
}

impl Hosts {
    fn new(libvirt: &OwnLibvirt) -> Self {
        let here = TestEnv::new();
        here.init_repo();
        let there = libvirt.beside(&here);
        Self { here, there }
    }

    /// A running domain with a full point.
    fn begun(&self, disks: &[DiskFormat]) -> (Domain<'_>, Guest) {
        let (domain, mut guest) = Domain::boot(&self.here, &DomainSpec::with_disks(disks));
        guest.run("fill vda 0 24");
        take(&self.here, &domain, &mut guest, "full");
        (domain, guest)
    }

    /// The same domain on the other host, with the same disks.
    fn arrived(&self, domain: &Domain<'_>) -> Domain<'_> {
        domain.on(&self.there, &disks(domain))
    }

    /// Migrates a domain from the first host to the other.
    fn away(&self, domain: &Domain<'_>, options: &[&str]) -> Process {
        let (from, to) = ((&self.here, libvirt::URI), (&self.there, BESIDE_URI));
        self.migrate(domain, (from, to), options)
    }

    /// Migrates a domain from the other host to the first.
    fn back(&self, domain: &Domain<'_>, options: &[&str]) -> Process {
        let (from, to) = ((&self.there, BESIDE_URI), (&self.here, libvirt::URI));
        self.migrate(domain, (from, to), options)
    }

    /// Migrates a domain. What is of one host in its description becomes the other's: the serial ports, and the
    /// disks if they come along.
    fn migrate(
        &self,
        domain: &Domain<'_>,
        ((from, from_uri), (to, to_uri)): ((&TestEnv, &str), (&TestEnv, &str)),
        options: &[&str],
    ) -> Process {
        let mut xml = domain.virsh(&["dumpxml", "--migratable", domain.name()]).text();
        let moved = options.contains(&"--copy-storage-all").then_some("disk");
        for file in ["console", "control"].into_iter().chain(moved) {
            let path = |env: &TestEnv| env.path(file).display().to_string();
            xml = xml.replace(&path(from), &path(to));
        }
        let description = to.path("arrives.xml");
        std::fs::write(&description, xml).expect("own directory");
        let description = description.to_string_lossy();
        let way = self.here.open_dir("way");
        let socket = |name: &str| format!("unix://{}", way.join(name).display());
        let mut virsh = self.here.command("virsh");
        virsh.args(["-c", from_uri, "migrate", "--persistent", "--undefinesource"]).args(options);
        virsh.args(["--xml", &description, "--persistent-xml", &description]);
        virsh.args(["--migrateuri", &socket("memory"), "--disks-uri", &socket("disks")]);
        Process::spawn(virsh.args([domain.name(), to_uri]))
    }
}

fn disks(domain: &Domain<'_>) -> Vec<PathBuf> {
    (0..domain.disk_count()).map(|index| domain.disk(index).to_owned()).collect()
}

/// Requires that a domain is on one host only, where nothing of ours is left on either.
#[track_caller]
fn assert_only_on(domain: &Domain<'_>, (on, off): (&TestEnv, &TestEnv)) {
    assert_no_trace(domain);
    assert_eq!(domain.bitmaps().len(), 1, "{:?}", domain.bitmaps());
    libvirt::virsh(off, &["domstate", domain.name()]).fails_with(&["failed to get domain"]);
    for env in [on, off] {
        let find = ["/var/lib/libvirt/qemu", "-name", "vmb-*"];
        assert_eq!(env.run("find", &find).text(), "", "scratch or a socket is left");
        env.assert_nothing_runs("migrated");
        let journals = std::fs::read_dir(env.path("state/journal")).into_iter().flatten();
        let read = |entry: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(entry.expect("own directory").path()).expect("text")
        };
        assert_eq!(journals.map(read).collect::<String>(), "", "a journal is left");
    }
}

/// A point of a domain whose guest writes a little as soon as the job has begun.
#[track_caller]
fn take(env: &TestEnv, domain: &Domain<'_>, guest: &mut Guest, command: &str) -> Taken {
    let write = || drop(guest.run("rnd vda 0 300; pat vda 60000000 1000"));
    let (outcome, taken) = take_disturbed(env, domain, (command, "after:job"), write);
    outcome.ok();
    taken.expect("a point")
}

/// Requires a point to be right, and all its disks to have been read by their bitmaps, which is little of them.
#[track_caller]
fn prove_small(env: &TestEnv, taken: &Taken) {
    for (index, disk) in taken.report["disks"].as_array().expect("disks").iter().enumerate() {
        assert_eq!(taken.mode(index), "incremental", "{}", taken.report);
        let [read, size] = ["read_bytes", "size_bytes"].map(|of| disk[of].as_u64().expect("bytes"));
        assert!(read < size / 8, "{}", taken.report);
    }
    prove(env, taken);
}

fn incremental<'a>(domain: &'a Domain<'_>) -> [&'a str; 4] {
    ["incremental", "--domain", domain.name(), "--json"]
}

#[test]
fn a_domain_that_is_migrated_goes_on_incrementally_there_and_back_here() {
    OwnLibvirt::with(|libvirt| {
        let hosts = Hosts::new(libvirt);
        let (here, mut guest) = hosts.begun(&QCOW2);
        guest.run("rnd vda 1000 500; rnd vdb 30000 10");
        hosts.away(&here, &SHARED).wait().ok();
        let there = hosts.arrived(&here);
        let mut guest = there.guest();
        guest.run("zero vda 100 50; discard vdb 1024 1024");
        let second = take(&hosts.there, &there, &mut guest, "incremental");
        prove_small(&hosts.there, &second);
        assert_only_on(&there, (&hosts.there, &hosts.here));
        guest.run("pat vda 5000001 70000");
        hosts.back(&there, &SHARED).wait().ok();
        let mut guest = here.guest();
        guest.run("pat vdb 999 1001");
        let third = take(&hosts.here, &here, &mut guest, "incremental");
        prove_small(&hosts.here, &third);
        assert_only_on(&here, (&hosts.here, &hosts.there));
    });
}

/// libvirt takes the bitmaps along, which then are in the memory of QEMU only; but bitmaps of that name it also
/// makes above a snapshot, where they begin later than the point.
#[test]
fn a_domain_that_is_migrated_with_its_disks_is_read_in_full_and_stores_nothing_twice() {
    OwnLibvirt::with(|libvirt| {
        let hosts = Hosts::new(libvirt);
        let (here, mut guest) = hosts.begun(&QCOW2);
        let images = ["disk0.qcow2", "disk1.qcow2"].map(|image| hosts.there.path(image));
        for image in &images {
            let create = ["create", "-q", "-f", "qcow2", &image.to_string_lossy(), "64M"];
            hosts.there.run("qemu-img", &create).ok();
        }
        guest.run("rnd vdb 30000 10");
        hosts.away(&here, &["--live", "--copy-storage-all"]).wait().ok();
        let there = here.on(&hosts.there, &images);
        let mut guest = there.guest();
        let second = take(&hosts.there, &there, &mut guest, "backup");
        for disk in second.report["disks"].as_array().expect("disks") {
            assert_eq!(disk["read"]["reason"], "image-replaced", "{}", second.report);
        }
        let [read, stored] = ["read_bytes", "stored_bytes"]
            .map(|of| second.report["disks"][0][of].as_u64().expect("bytes"));
        assert!(read > 24 << 20 && stored < 3 << 20, "{}", second.report);
        prove(&hosts.there, &second);
        assert_only_on(&there, (&hosts.there, &hosts.here));
        guest.run("rnd vda 1000 500");
        let third = take(&hosts.there, &there, &mut guest, "incremental");
        prove_small(&hosts.there, &third);
    });
}

/// And while its definition is on both hosts it is read where it runs, and nowhere else.
#[test]
fn a_stopped_domain_that_goes_to_another_host_goes_on_incrementally() {
    OwnLibvirt::with(|libvirt| {
        let hosts = Hosts::new(libvirt);
        let here = Domain::define(&hosts.here, &DomainSpec::with_disks(&QCOW2));
        let there = hosts.arrived(&here);
        let write = |offset: u32| {
            for image in disks(&here) {
                let write = format!("write -q -P 0x77 {offset}k 333k");
                let image = image.to_string_lossy().into_owned();
                hosts.here.run("qemu-io", &["-f", "qcow2", "-c", &write, &image]).ok();
            }
        };
        write(0);
        let first = take_stopped(&hosts.here, &here, &["full"]);
        write(10_000);
        hosts.away(&here, &["--offline"]).wait().ok();
        write(20_000);
        let second = take_stopped(&hosts.there, &there, &["incremental"]);
        prove_small(&hosts.there, &second);
        // It is defined on both, and runs on one.
        let description = hosts.here.path("again.xml");
        std::fs::write(&description, there.dump()).expect("own directory");
        here.virsh(&["define", &description.to_string_lossy()]).ok();
        there.virsh(&["start", "--paused", there.name()]).ok();
        let refused = hosts.here.vmbackup(&["backup", "--domain", here.name()]);
        assert_eq!(refused.code, Some(7), "{refused:?}");
        there.virsh(&["destroy", "--graceful", there.name()]).ok();
        there.virsh(&["undefine", there.name()]).ok();
        write(30_000);
        let third = take_stopped(&hosts.here, &here, &["incremental"]);
        for taken in [&second, &third] {
            prove_small(&hosts.here, taken);
        }
        prove(&hosts.here, &first);
    });
}

/// Refused where the domain leaves and where it arrives, as busy and at once.
#[track_caller]
fn is_refused(env: &TestEnv, domain: &Domain<'_>, what: &str) {
    let begun = std::time::Instant::now();
    let refused = env.vmbackup(&incremental(domain)).fails_with(&[
        &format!("domain '{}' is busy with {what}", domain.name()),
        "try again when",
    ]);
    assert_eq!(refused.code, Some(7), "{refused:?}");
    let plan = env.vmbackup(&["plan", "--domain", domain.name()]).fails();
    assert_eq!(plan.code, Some(7), "{plan:?}");
    assert!(format!("{plan:?}").contains(what), "{plan:?}");
    let kept = env.vmbackup(&["recover", "--domain", domain.name()]).text();
    assert!(kept.contains("busy with") && !kept.contains("undone"), "{kept}");
    let took = begun.elapsed();
    assert!(took < std::time::Duration::from_secs(15), "{took:?}");
}

#[test]
fn a_backup_does_not_begin_during_a_migration_nor_a_migration_during_a_backup() {
    OwnLibvirt::with(|libvirt| {
        let hosts = Hosts::new(libvirt);
        let (here, mut guest) = hosts.begun(&[DiskFormat::Qcow2]);
        let there = hosts.arrived(&here);
        guest.run("rnd vda 1000 500");
        let mut migration = hosts.away(&here, &[&SHARED[..], &["--bandwidth", "1"]].concat());
        wait_until("the migration", 30, || {
            assert!(migration.is_running(), "it ended");
            there.virsh(&["domstate", there.name()]).stdout.trim() == "paused"
                && here.virsh(&["domjobinfo", here.name()]).stdout.contains("migration")
        });
        is_refused(&hosts.here, &here, "a migration");
        is_refused(&hosts.there, &there, "an incoming migration");
        // Again and again: libvirt sets the speed of its own at the beginning.
        wait_until("the migration", 60, || {
            here.virsh(&["migrate-setspeed", here.name(), "1000"]);
            !migration.is_running()
        });
        migration.wait().ok();
        let mut guest = there.guest();
        let second = take(&hosts.there, &there, &mut guest, "incremental");
        prove_small(&hosts.there, &second);
        assert_only_on(&there, (&hosts.there, &hosts.here));

        // The other way round libvirt waits half a minute for the end of the backup's job.
        guest.run("rnd vda 1000 500");
        there.suspend();
        let oracles = there.oracles("asked");
        let args = [&incremental(&there)[..], &["--quiesce", "never"]].concat();
        let backup = hosts.there.stopped_at("before:manifest", &args);
        there.resume();
        let mut migration = hosts.back(&there, &SHARED);
        std::thread::sleep(std::time::Duration::from_secs(2));
        assert!(migration.is_running());
        guest.run("rnd vda 2000 100");
        backup.signal("CONT");
        let outcome = backup.wait();
        migration.wait().ok();
        // The domain may be gone before its older bitmaps are.
        if outcome.code != Some(0) {
            assert_eq!(outcome.code, Some(19), "{outcome:?}");
            assert!(outcome.stderr.contains("is not here any more"), "{outcome:?}");
        }
        let report: Value = serde_json::from_str(&outcome.stdout).expect("a report");
        let asked = Taken::of(report, oracles);
        prove_small(&hosts.here, &asked);
        let mut guest = here.guest();
        let last = take(&hosts.here, &here, &mut guest, "incremental");
        prove_small(&hosts.here, &last);
        assert_only_on(&here, (&hosts.here, &hosts.there));
    });
}

/// Its job keeps the domain where it is, until `recover` or somebody else ends it. What else it left goes along,
/// and is found by its name.
#[test]
fn a_domain_whose_backup_was_killed_migrates_when_its_job_has_ended_and_nothing_is_left() {
    OwnLibvirt::with(|libvirt| {
        let hosts = Hosts::new(libvirt);
        let (here, mut guest) = hosts.begun(&[DiskFormat::Qcow2]);
        let there = hosts.arrived(&here);
        let (a, b) = (&hosts.here, &hosts.there);
        // Two points that never were, and one whose bitmap did not take the place of the one before.
        for (step, is_here) in
            [("after:job", true), ("before:manifest", false), ("after:manifest", true)]
        {
            let (from, left, to, arrived) =
                if is_here { (a, &here, b, &there) } else { (b, &there, a, &here) };
            let is_one_controller = step == "after:manifest";
            if is_one_controller {
                std::fs::remove_dir_all(to.path("state")).expect("own directory");
                std::os::unix::fs::symlink(from.path("state"), to.path("state")).expect("a link");
            }
            guest.run("rnd vda 3000 500");
            let backup = from.stopped_at(step, &["backup", "--domain", left.name()]);
            backup.signal("KILL");
            backup.wait();
            if step == "after:job" {
                let recovered = from.vmbackup(&["recover"]).ok();
                assert!(recovered.stdout.contains("undone: backup job"), "{recovered:?}");
            } else {
                left.virsh(&["domjobabort", left.name()]).ok();
            }
            let migration =
                if is_here { hosts.away(left, &SHARED) } else { hosts.back(left, &SHARED) };
            migration.wait().ok();
            guest = arrived.guest();
            let next = take(to, arrived, &mut guest, "incremental");
            prove_small(to, &next);
            // Of what is on record where it was.
            let told = from.vmbackup(&["recover"]).ok();
            let is_closed = is_one_controller || step == "after:job";
            let end = if is_closed { "nothing is left to undo" } else { "which is gone" };
            assert!(told.stdout.contains(end), "{step}: {told:?}");
            assert_only_on(arrived, (to, from));
        }
    });
}
