//! A point as a domain again: the lost VM, and a new one beside the original. Both boot, and their
//! guests read what was on the disks at the instant.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::rig::{assert_no_trace, prove, take, take_stopped};
use crate::support::{
    DiskFormat, Domain, DomainSpec, Guest, TestEnv, assert_same_content, wait_until,
};

/// What the guest reads on its disks, but for the part it kept writing while the backup ran.
fn sums(guest: &mut Guest, disks: &[&str]) -> Vec<String> {
    disks
        .iter()
        .map(|disk| {
            guest.run(&format!("dd if=/dev/{disk} bs=1k skip=61440 2>/dev/null | sha256sum"))
        })
        .collect()
}

fn changes(report: &Value) -> String {
    let list = report["domain"]["changes"].as_array().expect("changes");
    list.iter().map(|line| line.as_str().expect("text")).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_lost_vm_boots_with_its_own_identity_and_the_data_of_the_instant() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Raw]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("fill vda 0 8; rnd vda 61440 999; rnd vdb 61500 500");
    take(&env, &domain, &mut guest, &["full"]);
    guest.run("pat vda 63000000 7777; zero vdb 61600 64");
    let before = sums(&mut guest, &["vda", "vdb"]);
    let taken = take(&env, &domain, &mut guest, &["incremental"]);
    guest.run("rnd vda 61440 4096; rnd vdb 61440 4096");
    let (uuid, xml) = (domain.uuid(), domain.dump());
    let mac = |xml: &str| xml.split_once("<mac address='").expect("a card").1[..17].to_owned();
    domain.lose();

    let report = env.vmbackup(&["restore", &taken.id, "--define", "--start", "--json"]).json();
    assert_eq!(report["domain"]["name"], domain.name(), "{report}");
    assert_eq!(report["domain"]["started"], true, "{report}");
    assert_eq!((domain.uuid(), mac(&domain.dump())), (uuid, mac(&xml)));
    let mut guest = domain.guest();
    assert_eq!(sums(&mut guest, &["vda", "vdb"]), before);
    assert_eq!(fs::metadata(domain.disk(1)).expect("the raw image").len(), 64 << 20);

    // The images are new ones: their bitmaps are gone, and the next backup says so and is right.
    guest.run("pat vda 62000000 4000");
    let next = take(&env, &domain, &mut guest, &["backup"]);
    assert_eq!((next.mode(0), next.mode(1)), ("full", "full"), "{}", next.report);
    prove(&env, &next);
    guest.run("pat vda 62100000 4000");
    let next = take(&env, &domain, &mut guest, &["incremental"]);
    assert_eq!(next.mode(0), "incremental", "{}", next.report);
    prove(&env, &next);
    assert_no_trace(&domain);
}

#[test]
fn a_new_domain_boots_beside_the_running_original() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 8; rnd vda 61440 999");
    let before = sums(&mut guest, &["vda"]);
    let taken = take(&env, &domain, &mut guest, &["full"]);
    guest.run("rnd vda 61440 2000");
    let after = sums(&mut guest, &["vda"]);

    let copy = Domain::adopt(&env, &env.name("copy"));
    let report =
        env.vmbackup(&["restore", &taken.id, "--as", copy.name(), "--start", "--json"]).json();
    let listed = changes(&report);
    for part in ["name: ", "UUID: ", "disk vda: ", "new MAC address"] {
        assert!(listed.contains(part), "{part} in\n{listed}");
    }
    assert_eq!((domain.state(), copy.state()), ("running".into(), "running".into()));
    assert_ne!(domain.uuid(), copy.uuid());
    let image = domain.disk(0).with_file_name(format!("{}-vda.qcow2", copy.name()));
    assert!(image.exists() && copy.dump().contains(&*image.to_string_lossy()));
    assert_eq!(sums(&mut copy.guest(), &["vda"]), before);
    assert_eq!(sums(&mut guest, &["vda"]), after, "the original is as it was");

    // The same name again: refused before anything is copied; never while it runs.
    let again = env.vmbackup(&["restore", &taken.id, "--as", copy.name(), "--force"]).fails();
    assert_eq!(again.code, Some(7), "{again:?}");
    assert_eq!(copy.state(), "running");
}

/// A copy of the repository in which a chunk of the disk is damaged, and nothing else of the VM.
fn with_a_damaged_chunk(env: &TestEnv) -> PathBuf {
    let repo = env.repo();
    let packs = env.run("find", &[&*repo.join("packs").to_string_lossy(), "-type", "f"]).text();
    for (number, pack) in packs.lines().enumerate() {
        let copy = env.path(&format!("damaged-{number}"));
        env.run("cp", &[Path::new("-r"), &repo, &copy]).ok();
        let pack = copy.join(Path::new(pack).strip_prefix(&repo).expect("below it"));
        let mut bytes = fs::read(&pack).expect("there");
        let at = bytes.len() * 3 / 4;
        bytes[at] ^= 1;
        fs::remove_file(&pack).expect("own file");
        fs::write(&pack, bytes).expect("own file");
        let args = ["check", "--read-data", "--json", "--repo", &*copy.to_string_lossy()];
        let report: Value = serde_json::from_str(&env.vmbackup(&args).stdout).expect("a document");
        // A node of the tree takes more with it.
        let is_chunk = |range: &Value| range["bytes"].as_u64().expect("a number") <= 1 << 20;
        let affected = report["affected"].as_array().expect("a list");
        if let [disk] = &affected[..]
            && disk["disk"] == "vda"
            && disk["ranges"].as_array().expect("a list").iter().all(is_chunk)
        {
            return copy;
        }
    }
    panic!("no pack holds chunks of the disk");
}

/// A disk of which a part is damaged in the repository is better than none: its VM is there again,
/// and what its guest will miss is on a list.
#[test]
fn a_damaged_point_is_salvaged_into_the_lost_domain() {
    let env = TestEnv::new();
    env.init_repo();
    let domain = Domain::define(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let source = env.path("data");
    let mut bytes = vec![0; 8 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    fs::write(&source, bytes).expect("own file");
    let (image, source) = (domain.disk(0).to_string_lossy(), source.to_string_lossy());
    let write = format!("write -q -s {source} 16M 8M");
    env.run("qemu-io", &["-f", "qcow2", "-c", &write, &image]).ok();
    let taken = take_stopped(&env, &domain, &["full"]);
    let repo = with_a_damaged_chunk(&env).to_string_lossy().into_owned();
    let (uuid, oracle) = (domain.uuid(), domain.oracles("before").remove(0));
    domain.lose();

    let refused = env.vmbackup(&["restore", &taken.id, "--define", "--repo", &repo]);
    assert_eq!(refused.code, Some(10), "{refused:?}");
    env.run("virsh", &["-q", "-c", "qemu:///system", "domstate", domain.name()]).fails();
    let salvage = ["restore", &taken.id, "--define", "--salvage", "--json", "--repo", &repo];
    let salvaged = env.vmbackup(&salvage);
    assert_eq!(salvaged.code, Some(10), "{salvaged:?}");
    let report: Value = serde_json::from_str(&salvaged.stdout).expect("a document");
    assert_eq!((domain.uuid(), domain.state()), (uuid.clone(), "shut off".into()));
    assert_eq!(report["domain"]["uuid"], uuid.as_str(), "{report}");
    let list = report["salvage"]["list"].as_str().expect("a list");
    assert!(salvaged.stderr.contains(list), "{salvaged:?}");
    let list: Value = serde_json::from_slice(&fs::read(list).expect("there")).expect("a list");
    assert_eq!(list["ranges"], report["salvage"]["ranges"]);
    let ranges = list["ranges"].as_array().expect("ranges");
    assert_eq!(ranges.len(), 1, "{list}");
    let (offset, bytes) = (&ranges[0]["offset"], &ranges[0]["bytes"]);
    assert!((16 << 20..24 << 20).contains(&offset.as_u64().expect("a number")), "{list}");
    // All else is what it was.
    let zeroes = format!("write -q -z {offset} {bytes}");
    env.run("qemu-io", &["-f", "raw", "-c", &zeroes, &oracle.to_string_lossy()]).ok();
    assert_same_content(&env, (domain.disk(0), "qcow2"), (&oracle, "raw"));
}

#[test]
fn firmware_variables_come_back_and_the_domain_boots() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec { uefi: true, ..DomainSpec::with_disks(&[DiskFormat::Qcow2]) };
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("rnd vda 61440 100");
    let before = sums(&mut guest, &["vda"]);
    let nvram = env.path("nvram.fd");
    let variables = fs::read(&nvram).expect("made at the first start");
    let taken = take(&env, &domain, &mut guest, &["full"]);

    let copy = Domain::adopt(&env, &env.name("copy"));
    env.vmbackup(&["restore", &taken.id, "--as", copy.name()]).ok();
    let copied = env.path(&format!("{}_VARS.fd", copy.name()));
    assert_eq!(fs::read(&copied).expect("its own NVRAM"), variables);
    assert!(copy.dump().contains(&*copied.to_string_lossy()));

    domain.lose();
    let _ = fs::remove_file(&nvram);
    env.vmbackup(&["restore", &taken.id, "--define"]).ok();
    assert_eq!(fs::read(&nvram).expect("restored"), variables);
    let mut guest = domain.start();
    assert_eq!(sums(&mut guest, &["vda"]), before);
}

#[test]
fn a_tpm_keeps_its_state_if_the_repository_has_a_key() {
    let env = TestEnv::new();
    let password = env.path("password");
    fs::write(&password, "correct horse\n").expect("own directory");
    let key = ["--password-file", &*password.to_string_lossy()];
    env.vmbackup(&[&["repo", "init"], &key[..]].concat()).ok();
    let spec = DomainSpec { tpm: true, ..DomainSpec::with_disks(&[DiskFormat::Qcow2]) };
    let (domain, mut guest) = Domain::boot(&env, &spec);
    let taken = take(&env, &domain, &mut guest, &[&["full"], &key[..]].concat());
    let state = |uuid: &str| {
        let directory = Path::new("/var/lib/libvirt/swtpm").join(uuid).join("tpm2");
        fs::read(directory.join("tpm2-00.permall")).expect("TPM state")
    };
    let original = state(&domain.uuid());

    let copy = Domain::adopt(&env, &env.name("copy"));
    let restore = ["restore", &taken.id, "--as", copy.name()];
    env.vmbackup(&[&restore[..], &key[..]].concat()).ok();
    assert_eq!(state(&copy.uuid()), original);
    let mut guest = copy.start();
    guest.run("true");

    // Without a key the state stays out, and the point says so.
    let open = env.path("open");
    let open = open.to_string_lossy();
    env.vmbackup(&["repo", "init", "--no-key", "--repo", &open]).ok();
    let report =
        env.vmbackup(&["full", "--domain", domain.name(), "--repo", &open, "--json"]).json();
    let missing = report["not_captured"].to_string();
    assert!(missing.contains("TPM") && missing.contains("key"), "{report}");
}

#[test]
fn an_existing_domain_is_replaced_only_by_force_and_only_when_stopped() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("rnd vda 61440 100");
    let before = sums(&mut guest, &["vda"]);
    let taken = take(&env, &domain, &mut guest, &["full"]);
    guest.run("rnd vda 61440 1000");
    domain.shut_down(&mut guest);
    let image = fs::read(domain.disk(0)).expect("own disk");
    let refused = env.vmbackup(&["restore", &taken.id, "--define"]).fails();
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(fs::read(domain.disk(0)).expect("own disk") == image, "the image was touched");
    env.vmbackup(&["restore", &taken.id, "--define", "--force"]).ok();
    let mut guest = domain.start();
    assert_eq!(sums(&mut guest, &["vda"]), before);
}

#[test]
fn saved_memory_is_not_resumed_on_other_disks() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("rnd vda 0 100");
    let taken = take(&env, &domain, &mut guest, &["full"]);
    domain.virsh(&["managedsave", domain.name()]).ok();
    let image = fs::read(domain.disk(0)).expect("own disk");
    let refused = env.vmbackup(&["restore", &taken.id, "--define", "--force"]).fails();
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(refused.stderr.contains("managedsave-remove"), "{refused:?}");
    assert!(fs::read(domain.disk(0)).expect("own disk") == image, "the image was touched");
    domain.virsh(&["managedsave-remove", domain.name()]).ok();
    env.vmbackup(&["restore", &taken.id, "--define", "--force"]).ok();
}

/// All names in the directory of the environment that have to do with disks.
fn listing(env: &TestEnv) -> Vec<String> {
    let names = fs::read_dir(env.dir()).expect("own directory");
    let names = names.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|n| n.contains("disk") || n.contains("nvram")).collect();
    names.sort();
    names
}

/// A domain somebody started during a long copy had its firmware variables replaced under it: only
/// the definition looked again.
#[test]
fn a_domain_that_is_started_during_the_copy_keeps_its_variables() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec { uefi: true, ..DomainSpec::with_disks(&[DiskFormat::Qcow2]) };
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("rnd vda 20480 40960");
    let taken = take(&env, &domain, &mut guest, &["full"]);
    domain.shut_down(&mut guest);
    let nvram = env.path("nvram.fd");
    let mut changed = fs::read(&nvram).expect("made at the first start");
    let last = changed.len() - 1;
    changed[last] ^= 0xff;
    fs::write(&nvram, changed).expect("own file");

    // Another format goes to another file: nothing locks the one the domain uses.
    let before = listing(&env);
    let args = ["restore", &taken.id, "--define", "--force", "--format", "raw"];
    let mut restore = env.spawn_vmbackup(&args);
    wait_until("the copy", 60, || listing(&env) != before || !restore.is_running());
    restore.signal("STOP");
    let target = domain.disk(0).with_extension("raw");
    assert!(restore.is_running() && !target.exists(), "the copy was over too soon");
    domain.virsh(&["start", domain.name()]).ok();
    // The firmware writes them in place; a restore would put another file there.
    let inode = || fs::metadata(&nvram).expect("still there").ino();
    let variables = inode();
    restore.signal("CONT");
    let failed = restore.wait().fails();
    assert_eq!(failed.code, Some(7), "{failed:?}");
    assert!(failed.stderr.contains("is running") && failed.stderr.contains("--as"), "{failed:?}");
    assert_eq!(domain.state(), "running");
    assert_eq!(inode(), variables, "the variables were replaced");
    // Hours of copying may be in it.
    let copy = format!("{}.restored-{}", target.display(), &taken.id[..8]);
    let hint = format!("mv {copy} {}", target.display());
    assert!(failed.stderr.contains("no existing image was replaced"), "{failed:?}");
    assert!(failed.stderr.contains(&hint), "{failed:?}");
    env.vmbackup(&["verify", &taken.id, "--against", &format!("{copy},format=raw")]).ok();
    fs::remove_file(&copy).expect("the copy");
    assert_eq!(listing(&env), before, "something else was left");
}

/// Makes libvirt refuse to define one domain while it lives.
struct Unsaveable(PathBuf);

impl Unsaveable {
    fn new(domain: &Domain<'_>) -> Self {
        // libvirt writes the description there before it renames it (`virFileRewrite`).
        let path = Path::new("/etc/libvirt/qemu").join(format!("{}.xml.new", domain.name()));
        fs::create_dir(&path).expect("tests of libvirt run as root");
        Self(path)
    }
}

impl Drop for Unsaveable {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The old images were gone before libvirt had accepted the new definition.
#[test]
fn a_definition_that_libvirt_refuses_leaves_the_old_vm_whole() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec { uefi: true, ..DomainSpec::with_disks(&[DiskFormat::Qcow2]) };
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("rnd vda 61440 100");
    let at_the_instant = sums(&mut guest, &["vda"]);
    let taken = take(&env, &domain, &mut guest, &["full"]);
    guest.run("rnd vda 61440 1000");
    domain.shut_down(&mut guest);
    let nvram = env.path("nvram.fd");
    let mut variables = fs::read(&nvram).expect("made at the first start");
    let last = variables.len() - 1;
    variables[last] ^= 0xff;
    fs::write(&nvram, &variables).expect("own file");
    let (image, before, xml) =
        (fs::read(domain.disk(0)).expect("own disk"), listing(&env), domain.dump());

    let refusing = Unsaveable::new(&domain);
    let restore = ["restore", &taken.id, "--define", "--force"];
    let failed = env.vmbackup(&restore).fails();
    assert!(failed.stderr.contains("cannot define domain"), "{failed:?}");
    assert!(failed.stderr.contains("as it was"), "{failed:?}");
    assert!(fs::read(domain.disk(0)).expect("own disk") == image, "the image was replaced");
    assert!(fs::read(&nvram).expect("own file") == variables, "the variables were replaced");
    assert_eq!((listing(&env), domain.dump()), (before.clone(), xml));
    drop(refusing);

    env.vmbackup(&restore).ok();
    assert_eq!(listing(&env), before, "the old files are gone, and no others are left");
    assert_eq!(sums(&mut domain.start(), &["vda"]), at_the_instant);
}

/// What a dry run says of a restore, whatever is in its way.
fn preview(env: &TestEnv, args: &[&str]) -> (Value, Option<i32>) {
    let outcome = env.vmbackup(&[args, &["--dry-run", "--json"]].concat());
    (serde_json::from_str(&outcome.stdout).expect("one document"), outcome.code)
}

fn problems(plan: &Value) -> Vec<&str> {
    let list = plan["problems"].as_array().expect("problems");
    list.iter().map(|problem| problem["what"].as_str().expect("text")).collect()
}

#[test]
fn a_dry_run_tells_of_the_domain_what_the_restore_then_does() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec { uefi: true, ..DomainSpec::with_disks(&[DiskFormat::Qcow2]) };
    let (domain, mut guest) = Domain::boot(&env, &spec);
    let taken = take(&env, &domain, &mut guest, &["full"]);
    let everything = || {
        let names = fs::read_dir(env.dir()).expect("own directory");
        let mut names: Vec<_> = names.map(|entry| entry.expect("entry").file_name()).collect();
        names.sort();
        (names, domain.virsh(&["list", "--all", "--name"]).text().matches(domain.name()).count())
    };
    let define = ["restore", &taken.id, "--define"];
    let forced = [&define[..], &["--force", "--format", "raw"]].concat();

    // It runs, its image is there and used.
    let before = everything();
    let (plan, code) = preview(&env, &[&define[..], &["--force"]].concat());
    let found = problems(&plan);
    assert!(found.iter().any(|what| what.contains("is running")), "{plan}");
    assert!(found.iter().any(|what| what.contains("is in use")), "{plan}");
    assert_eq!(code, Some(7), "{plan}");

    // Beside it there is nothing in the way.
    let copy = env.name("copy");
    let (plan, code) = preview(&env, &["restore", &taken.id, "--as", &copy, "--start"]);
    assert_eq!((code, problems(&plan).len()), (Some(0), 0), "{plan}");
    assert_eq!(plan["domain"]["uuid"], Value::Null, "{plan}");
    assert_eq!(plan["domain"]["start"], true, "{plan}");
    assert!(changes(&plan).contains("new MAC address"), "{plan}");
    assert_eq!(everything(), before);

    // Stopped, it is refused for all that would be lost, or replaced.
    domain.shut_down(&mut guest);
    let nvram = env.path("nvram.fd");
    let mut changed = fs::read(&nvram).expect("made at the first start");
    let last = changed.len() - 1;
    changed[last] ^= 0xff;
    fs::write(&nvram, changed).expect("own file");
    let before = everything();
    let (plan, code) = preview(&env, &define);
    assert_eq!((code, problems(&plan).len()), (Some(5), 3), "image, NVRAM, domain: {plan}");
    assert_eq!(plan["disks"][0]["replaces"], true, "{plan}");
    let (plan, code) = preview(&env, &forced);
    assert_eq!((code, problems(&plan).len()), (Some(0), 0), "{plan}");
    assert_eq!(plan["domain"]["replaces"], true, "{plan}");
    let nvram = serde_json::json!([{"path": nvram, "replaces": true}]);
    assert_eq!(plan["files"], nvram, "{plan}");
    assert_eq!(everything(), before);
    let done = env.vmbackup(&[&forced[..], &["--json"]].concat()).json();
    assert_eq!(plan["domain"]["changes"], done["domain"]["changes"]);
    assert_eq!(plan["domain"]["uuid"], done["domain"]["uuid"]);
    assert_eq!(plan["disks"][0]["path"], done["disks"][0]["path"]);
    assert_eq!(plan["files"][0]["path"], done["files"][0]);
}
