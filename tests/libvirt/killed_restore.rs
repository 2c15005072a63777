//! A restore over a stopped domain that is killed at any step: domain and images are wholly the old ones
//! or the new ones, the next command clears away and says so, and nothing of ours remains.

use std::fs;
use std::path::{Path, PathBuf};

use crate::killed::prove;
use crate::support::{
    DiskFormat, DiskSpec, Domain, DomainSpec, Restored, TestEnv, assert_same_content, is_asked_for,
    steps, write_pattern,
};

/// Files of a restore that are not under their names.
fn parts(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("the images' directory").flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(".part")).collect()
}

fn describe(env: &TestEnv, domain: &Domain<'_>, text: &str) {
    env.run("virsh", &["-q", "-c", "qemu:///system", "desc", domain.name(), "--config", text]).ok();
}

/// One image has its name already.
const AFTER_PLACE: &str = "after:place";

#[test]
fn a_restore_over_a_domain_can_be_killed_at_any_step() {
    let env = TestEnv::new();
    env.init_repo();
    let disk = DiskSpec { format: DiskFormat::Qcow2, size_mib: 16 };
    let spec = DomainSpec { disks: vec![disk, disk], ..DomainSpec::with_disks(&[]) };
    let domain = Domain::define(&env, &spec);
    let images: Vec<PathBuf> = (0..2).map(|index| domain.disk(index).to_owned()).collect();
    let directory = images[0].parent().expect("absolute").to_owned();
    describe(&env, &domain, "new");
    for image in &images {
        write_pattern(&env, (image, "qcow2"), 1);
    }
    let report = env.vmbackup(&["full", "--domain", domain.name(), "--json"]).json();
    let point = report["point"].as_str().expect("a point id").to_owned();
    let new = domain.oracles("new");
    let restore = ["restore", &point, "--define", "--force"];
    let steps = steps(|phase| Restored::Domain.takes(phase));
    assert!(steps.iter().any(|step| step == AFTER_PLACE), "{steps:?}");
    for (at, step) in steps.iter().enumerate() {
        // What is there differs from the point, and from what the latest base holds.
        describe(&env, &domain, "old");
        if step == AFTER_PLACE {
            env.vmbackup(&["backup", "--domain", domain.name()]).ok();
        }
        for image in &images {
            write_pattern(&env, (image, "qcow2"), 2 + u8::try_from(at).expect("a few steps"));
        }
        let old = domain.oracles(&format!("old{at}"));
        let run = env.stopped_at(step, &restore);
        run.signal("KILL");
        run.wait();
        let said = if is_asked_for(at) {
            env.vmbackup(&["recover", "--domain", domain.name()]).ok().stdout
        } else {
            env.vmbackup(&["backup", "--domain", domain.name()]).ok().stderr
        };
        assert_eq!(parts(&directory), Vec::<String>::new(), "{step}: {said}");
        let (description, disks) =
            if domain.dump().contains("<description>new<") { ("new", &new) } else { ("old", &old) };
        let expected = ["after:define", "before:discard", "after:discard"].contains(&step.as_str());
        assert_eq!(description == "new", expected, "{step}: {said}");
        for (image, oracle) in images.iter().zip(disks) {
            assert_same_content(&env, (image, "qcow2"), (oracle, "raw"));
        }
        assert!(said.contains("killed restore") || step == "before:temporary", "{step}: {said}");
        let left: Vec<_> = fs::read_dir(env.path("state/journal")).into_iter().flatten().collect();
        assert_eq!(left.len(), 0, "{step}: {left:?}");
        env.assert_nothing_runs(step);
        for path in &old {
            fs::remove_file(path).expect("own file");
        }
        if step == AFTER_PLACE {
            // The old image is back, with the bitmap it had.
            for image in &images {
                let write = ["-f", "qcow2", "-c", "write -q -P 99 5M 1M", &image.to_string_lossy()];
                env.run("qemu-io", &write).ok();
            }
            let next = env.vmbackup(&["incremental", "--domain", domain.name(), "--json"]).json();
            assert_eq!(next["disks"][1]["read"]["mode"], "incremental", "{next}");
            prove(&env, &next, &domain.oracles("next"), step);
        }
        if at % 3 == 0 {
            env.vmbackup(&restore).ok();
            for (image, oracle) in images.iter().zip(&new) {
                assert_same_content(&env, (image, "qcow2"), (oracle, "raw"));
            }
            assert_eq!(parts(&directory), Vec::<String>::new(), "{step}");
        }
    }
}

/// The domain is started with the new image before anybody looks: it keeps it.
#[test]
fn a_domain_that_was_started_after_a_killed_restore_keeps_what_it_runs_from() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 2 && sync");
    domain.shut_down(&mut guest);
    let report = env.vmbackup(&["full", "--domain", domain.name(), "--json"]).json();
    let point = report["point"].as_str().expect("a point id").to_owned();
    let run = env.stopped_at("before:define", &["restore", &point, "--define", "--force"]);
    run.signal("KILL");
    run.wait();
    let mut guest = domain.start();
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("stays: ") && said.contains("puts it back"), "{said}");
    guest.run("rnd vda 4096 20; sync");
    assert_eq!(parts(domain.disk(0).parent().expect("absolute")).len(), 1);
    // It is backed up as it is, and told again that there is something.
    let backup = env.vmbackup(&["backup", "--domain", domain.name()]).ok();
    assert!(backup.stderr.contains("puts it back"), "{backup:?}");
    assert_eq!(domain.state(), "running");
}

#[test]
fn a_restore_over_a_domain_clears_away_what_a_killed_backup_left_of_it() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    domain.wait_for_agent();
    guest.run("fill vda 0 2 && sync");
    let report = env.vmbackup(&["full", "--domain", domain.name(), "--json"]).json();
    let point = report["point"].as_str().expect("a point id").to_owned();
    let backup = env.stopped_at("before:manifest", &["incremental", "--domain", domain.name()]);
    backup.signal("KILL");
    backup.wait();
    domain.destroy();
    let restored = env.vmbackup(&["restore", &point, "--define", "--force"]).ok();
    assert!(restored.stderr.contains("undone, an earlier run had left it"), "{restored:?}");
    assert_eq!(domain.checkpoints(), Vec::<String>::new());
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
    env.assert_nothing_runs("restore");
}
