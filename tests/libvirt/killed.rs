//! A backup that is killed at any step: the guest runs on, the next command undoes what is left and
//! says so, the next incremental is right, and nothing of ours remains.
//!
//! The steps are those of the journal ([`Phase::ALL`]); which a kind of VM takes is a `match` without
//! a default, so that whoever adds a step is made to say.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmbackup::journal::Phase;

use crate::rig::{assert_no_trace, disk_name};
use crate::support::{
    DiskFormat, DiskSpec, Domain, DomainSpec, Guest, TestEnv, assert_same_content, is_asked_for,
    steps, stopped_takes, wait_until,
};

/// Scratch, socket and export are made by libvirt with the job.
fn running_takes(phase: Phase) -> bool {
    match phase {
        Phase::Checkpoint | Phase::Freeze | Phase::Job | Phase::Manifest | Phase::Handover => true,
        Phase::Scratch
        | Phase::Socket
        | Phase::Export
        | Phase::Node
        | Phase::Pause
        | Phase::Filter
        | Phase::Bitmap
        | Phase::Process
        | Phase::Temporary
        | Phase::Overwrite
        | Phase::Place
        | Phase::Define
        | Phase::Discard => false,
    }
}

fn small(formats: &[DiskFormat]) -> DomainSpec {
    let disk = |format: &DiskFormat| DiskSpec { format: *format, size_mib: 16 };
    DomainSpec { disks: formats.iter().map(disk).collect(), ..DomainSpec::with_disks(&[]) }
}

/// Where a test's commands put what they may leave.
pub(crate) struct Places {
    scratch: PathBuf,
}

impl Places {
    pub(crate) fn new(env: &TestEnv) -> Self {
        Self { scratch: env.open_dir("scratch") }
    }

    /// The arguments of a backup of `domain`.
    pub(crate) fn backup<'a>(&'a self, command: &'a str, domain: &'a Domain<'_>) -> Vec<&'a str> {
        let scratch = self.scratch.to_str().expect("UTF-8");
        vec![command, "--domain", domain.name(), "--scratch-dir", scratch, "--json"]
    }

    /// What is on record of runs that are not over.
    fn journals(env: &TestEnv) -> Vec<String> {
        let entries = std::fs::read_dir(env.path("state/journal")).into_iter().flatten().flatten();
        entries.map(|entry| std::fs::read_to_string(entry.path()).expect("a journal")).collect()
    }

    /// Nothing of ours is left on this machine: files, sockets, processes, journal.
    #[track_caller]
    pub(crate) fn assert_empty(&self, env: &TestEnv, step: &str) {
        let names = |dir: PathBuf| -> Vec<String> {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        assert_eq!(names(self.scratch.clone()), Vec::<String>::new(), "{step}: scratch");
        assert_eq!(names(env.path("state/journal")), Vec::<String>::new(), "{step}: journal");
        // A guardian that has nothing to guard ends by itself.
        wait_until(&format!("{step}: processes end"), 20, || env.processes().is_empty());
    }
}

/// A file system in the guest that can be frozen.
const MOUNTED: &str = "mke2fs /dev/vdb && mount /dev/vdb /mnt";

/// A running domain of two disks with an agent that did `what`, and a point of it to build on.
fn begun<'env>(env: &'env TestEnv, what: &str) -> (Places, Domain<'env>, Guest) {
    env.init_repo();
    let places = Places::new(env);
    let (domain, mut guest) = Domain::boot(env, &small(&[DiskFormat::Qcow2, DiskFormat::Qcow2]));
    domain.wait_for_agent();
    guest.run(what);
    env.vmbackup(&places.backup("full", &domain)).ok();
    (places, domain, guest)
}

/// The guest's file systems take a write, soon.
#[track_caller]
pub(crate) fn assert_not_frozen(guest: &mut Guest, step: &str) {
    let since = Instant::now();
    guest.run("echo alive >/mnt/file && sync");
    assert!(since.elapsed() < Duration::from_secs(20), "{step}: {:?}", since.elapsed());
}

/// As soon as the agent, which opens what it has thawed, is done with it.
fn unmount(guest: &mut Guest) {
    wait_until("/mnt is not busy", 20, || guest.run("umount /mnt && echo done || true") == "done");
}

/// Requires the point to equal what the disks hold now.
#[track_caller]
pub(crate) fn prove(env: &TestEnv, report: &Value, oracles: &[PathBuf], step: &str) {
    let point = report["point"].as_str().expect("a point id");
    assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{step}: {report}");
    let target = env.path(&format!("restored-{point}"));
    let to = target.to_string_lossy();
    env.vmbackup(&["restore", point, "--to", &to, "--format", "raw"]).ok();
    for (index, oracle) in oracles.iter().enumerate() {
        let restored = target.join(format!("{}.raw", disk_name(index)));
        assert_same_content(env, (&restored, "raw"), (oracle, "raw"));
        std::fs::remove_file(oracle).expect("own file");
    }
    std::fs::remove_dir_all(target).expect("own directory");
}

/// What the next command says of what it found.
pub(crate) fn mentions(text: &str) -> bool {
    ["undone", "taken over"].iter().any(|word| text.contains(word))
}

#[test]
fn a_backup_of_a_running_domain_can_be_killed_at_any_step() {
    let env = TestEnv::new();
    let (places, domain, mut guest) = begun(&env, &format!("{MOUNTED} && fill vda 0 2 && sync"));
    for (at, step) in steps(running_takes).iter().enumerate() {
        guest.run(&format!("rnd vda {} 20; echo {at} >/mnt/file; sync", 4096 + at * 100));
        let mut args = places.backup("backup", &domain);
        args.extend(["--quiesce", "require"]);
        let backup = env.stopped_at(step, &args);
        guest.run(&format!("rnd vda {} 20", 4130 + at * 100));
        backup.signal("KILL");
        backup.wait();
        assert_eq!(domain.state(), "running", "{step}");
        assert_not_frozen(&mut guest, step);

        // Somebody asks for it, or the next backup does it.
        let mut said = String::new();
        if is_asked_for(at) {
            let recover = ["recover", "--domain", domain.name()];
            let looked = env.vmbackup(&[&recover[..], &["--dry-run"]].concat()).ok();
            let recovered = env.vmbackup(&recover).ok();
            // The end of a job takes some of it along.
            let undone = recovered.stdout.lines().filter_map(|line| line.strip_prefix("undone: "));
            for what in undone {
                assert!(looked.stdout.contains(what), "{step}: a dry run does not tell {what}");
            }
            said.push_str(&recovered.stdout);
            assert!(!domain.has_backup_job(), "{step}");
            assert_eq!(domain.checkpoints(), Vec::<String>::new(), "{step}");
        }
        // What a mounted file system writes when nobody looks is not in the oracle's instant.
        unmount(&mut guest);
        let next = env.vmbackup(&places.backup("incremental", &domain));
        guest.run("sync");
        said.push_str(&next.stderr);
        let left = !["before:checkpoint", "after:handover"].contains(&step.as_str());
        assert!(mentions(&said) || !left, "{step}: {said}");
        let report = next.json();
        domain.suspend();
        let oracles = domain.oracles(&at.to_string());
        domain.resume();
        guest.run("mount /dev/vdb /mnt");
        prove(&env, &report, &oracles, step);
        assert_no_trace(&domain);
        let point = report["point"].as_str().expect("a point id");
        let held = domain.bitmaps();
        assert!(held.len() == 1 && held[0].contains(point), "{step}: {held:?}");
        assert_eq!(domain.sockets(), Vec::<PathBuf>::new(), "{step}");
        places.assert_empty(&env, step);
    }
}

#[test]
fn a_backup_of_a_stopped_domain_can_be_killed_at_any_step() {
    let env = TestEnv::new();
    env.init_repo();
    let places = Places::new(&env);
    let domain = Domain::define(&env, &small(&[DiskFormat::Qcow2, DiskFormat::Qcow2]));
    let image = domain.disk(0).to_string_lossy().into_owned();
    let write = |offset: usize| {
        let write = format!("write -q -P 0x77 {offset} 20k");
        env.run("qemu-io", &["-f", "qcow2", "-c", &write, &image]).ok();
    };
    env.vmbackup(&places.backup("full", &domain)).ok();
    for (at, step) in steps(stopped_takes).iter().enumerate() {
        write(at * 300_000);
        let backup = env.stopped_at(step, &places.backup("backup", &domain));
        backup.signal("KILL");
        backup.wait();
        // Its locks ended with it.
        wait_until(&format!("{step}: processes end"), 20, || env.processes().is_empty());
        write(at * 300_000 + 100_000);
        if is_asked_for(at) {
            env.vmbackup(&["recover"]).ok();
            places.assert_empty(&env, step);
            assert!(image_bitmaps(&env, &image).len() <= 2, "{step}");
        }
        let report = env.vmbackup(&places.backup("incremental", &domain)).json();
        let oracles = domain.oracles(&at.to_string());
        prove(&env, &report, &oracles, step);
        let point = report["point"].as_str().expect("a point id");
        let held = image_bitmaps(&env, &image);
        assert!(held.len() == 1 && held[0].contains(point), "{step}: {held:?}");
        assert_eq!(domain.checkpoints(), Vec::<String>::new(), "{step}");
        places.assert_empty(&env, step);
    }
}

fn image_bitmaps(env: &TestEnv, image: &str) -> Vec<String> {
    let info = env.run("qemu-img", &["info", "-U", "--output=json", image]).json();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned();
    let names = bitmaps.unwrap_or_default();
    names.iter().map(|bitmap| bitmap["name"].as_str().expect("a name").to_owned()).collect()
}

/// The processes are gone, so are the sockets and locks in /run; state directory and images stay.
#[test]
fn a_host_that_was_rebooted_in_a_backup_is_cleared_away() {
    let env = TestEnv::new();
    let (places, domain, _guest) = begun(&env, &format!("{MOUNTED} && fill vda 0 2 && sync"));
    let backup = env.stopped_at("before:manifest", &places.backup("backup", &domain));
    backup.signal("KILL");
    backup.wait();
    domain.kill_qemu();
    let _ = std::fs::remove_dir_all(env.path("run"));
    std::fs::create_dir(env.path("run")).expect("own directory");
    let journal = env.path("state/journal").join(format!("{}.json", domain.uuid()));
    let text = std::fs::read_to_string(&journal).expect("the journal outlives everything");
    let mut value: Value = serde_json::from_str(&text).expect("JSON");
    value["runs"][0]["boot"] = "the boot before".into();
    value["runs"][0]["entries"]
        .as_array_mut()
        .expect("entries")
        .push(serde_json::json!({"phase": "freeze"}));
    std::fs::write(&journal, value.to_string()).expect("own file");
    let left = places.scratch.join(scratch_name(&value));
    std::fs::write(&left, "what the guest had overwritten").expect("own directory");

    let mut guest = domain.start();
    // Nobody waits for an agent that need not thaw anything.
    let recovered = env.vmbackup(&["recover"]).ok();
    assert!(recovered.stdout.contains("scratch"), "{recovered:?}");
    assert!(!recovered.stdout.contains("frozen"), "{recovered:?}");
    places.assert_empty(&env, "reboot");
    guest.run("rnd vda 4096 20; sync");
    // Bitmaps that QEMU could not store are not believed; the next point is right all the same.
    let report = env.vmbackup(&places.backup("backup", &domain)).json();
    assert_eq!(report["disks"][0]["read"]["mode"], "full", "{report}");
    guest.run("rnd vda 5096 20; sync");
    let report = env.vmbackup(&places.backup("incremental", &domain)).json();
    domain.suspend();
    let oracles = domain.oracles("reboot");
    domain.resume();
    prove(&env, &report, &oracles, "reboot");
    assert_eq!(domain.bitmaps().len(), 1);
    places.assert_empty(&env, "reboot");
}

fn scratch_name(journal: &Value) -> String {
    let entries = journal["runs"][0]["entries"].as_array().expect("entries");
    let scratch = entries.iter().find(|entry| entry["phase"] == "scratch").expect("scratch");
    let path = scratch["objects"][0].as_str().expect("a path");
    path.rsplit_once('/').expect("absolute").1.to_owned()
}

#[test]
fn a_repository_that_cannot_be_asked_keeps_every_bitmap() {
    let env = TestEnv::new();
    env.init_repo();
    let places = Places::new(&env);
    let (domain, mut guest) = Domain::boot(&env, &small(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 2 && sync");
    env.vmbackup(&places.backup("full", &domain)).ok();
    let backup = env.stopped_at("before:manifest", &places.backup("backup", &domain));
    backup.signal("KILL");
    backup.wait();
    let away = env.path("away");
    std::fs::rename(env.repo(), &away).expect("own directory");
    let recovered = env.vmbackup(&["recover", "--domain", domain.name()]).ok();
    assert!(recovered.stdout.contains("was not asked"), "{recovered:?}");
    assert!(!domain.has_backup_job());
    assert_eq!(domain.bitmaps().len(), 2, "the base's, and the one nobody knows of");
    std::fs::rename(&away, env.repo()).expect("own directory");
    let recovered = env.vmbackup(&["recover"]).ok();
    assert!(recovered.stdout.contains("does not exist"), "{recovered:?}");
    assert_eq!(domain.bitmaps().len(), 1);
    let nothing = env.vmbackup(&["recover"]).ok();
    assert_eq!(nothing.stdout, "nothing is left to undo\n");
    let report = env.vmbackup(&places.backup("incremental", &domain)).json();
    assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{report}");
}

#[test]
#[ignore = "soak: a hundred backups are killed"]
fn a_backup_of_a_running_domain_can_be_killed_at_any_moment() {
    let env = TestEnv::new();
    let (places, domain, mut guest) = begun(&env, &format!("{MOUNTED} && fill vda 0 2 && sync"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = now.expect("after 1970").subsec_nanos() | 1;
    let mut state = seed;
    let mut in_freeze = 0;
    for at in 0..100 {
        // xorshift32 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let moment = Duration::from_millis(u64::from(state % 2500));
        guest.run(&format!("rnd vda {} 20; echo {at} >/mnt/file; sync", 4096 + at * 100));
        let mut args = places.backup("backup", &domain);
        args.extend(["--quiesce", "require"]);
        let backup = env.spawn_vmbackup(&args);
        std::thread::sleep(moment);
        backup.signal("KILL");
        backup.wait();
        let step = format!("seed {seed}, round {at}, {moment:?}");
        in_freeze += usize::from(Places::journals(&env).iter().any(|text| text.contains("freeze")));
        assert_eq!(domain.state(), "running", "{step}");
        assert_not_frozen(&mut guest, &step);
        if is_asked_for(at) {
            env.vmbackup(&["recover", "--domain", domain.name()]).ok();
        }
        // A freeze that was asked for may come yet, and is undone then.
        wait_until(&format!("{step}: the guardian ends"), 30, || env.processes().is_empty());
        // What a mounted file system writes when nobody looks is not in the oracle's instant.
        unmount(&mut guest);
        let report = env.vmbackup(&places.backup("incremental", &domain)).json();
        guest.run("sync");
        domain.suspend();
        let oracles = domain.oracles(&at.to_string());
        domain.resume();
        guest.run("mount /dev/vdb /mnt");
        prove(&env, &report, &oracles, &step);
        assert_no_trace(&domain);
        let point = report["point"].as_str().expect("a point id");
        let held = domain.bitmaps();
        assert!(held.len() == 1 && held[0].contains(point), "{step}: {held:?}");
        places.assert_empty(&env, &step);
    }
    assert!(in_freeze > 0, "seed {seed}: none was killed between its freeze and its thaw");
}
