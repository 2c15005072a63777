//! Disks that are volumes of storage pools: libvirt resolves them when it starts the domain, and its
//! description never shows what they are.

use std::fs;

use serde_json::Value;

use crate::rig::{assert_no_trace, prove, take, take_stopped};
use crate::support::{DiskFormat, Domain, DomainSpec, Pool, TestEnv};

fn spec(formats: &[DiskFormat]) -> DomainSpec {
    DomainSpec { pool: true, ..DomainSpec::with_disks(formats) }
}

/// Where the disks of a point were.
fn origins(env: &TestEnv, point: &str) -> Vec<String> {
    let shown = env.vmbackup(&["show", point, "--json"]).json();
    let disks = shown["disks"].as_array().expect("disks");
    disks.iter().map(|disk| disk["origin"].as_str().expect("text").to_owned()).collect()
}

fn changes(report: &Value) -> String {
    report["domain"]["changes"].to_string()
}

#[test]
fn one_chain_goes_through_running_and_stopped() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &spec(&[DiskFormat::Qcow2, DiskFormat::Raw]));
    guest.run("fill vda 0 8; rnd vdb 61440 100");
    let first = take(&env, &domain, &mut guest, &["full"]);
    let files = [0, 1].map(|index| domain.disk(index).display().to_string());
    assert_eq!(origins(&env, &first.id), files);
    guest.run("pat vda 63000000 7777; zero vda 2048 300; rnd vdb 61500 77");
    let plan = env.vmbackup(&["plan", "--domain", domain.name(), "--json"]).json();
    assert_eq!(plan["disks"][0]["read"]["mode"], "incremental", "{plan}");
    // What QEMU has open is the same, whatever becomes of the pool.
    domain.pool().virsh("pool-destroy");
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    domain.pool().virsh("pool-start");
    assert_eq!((second.mode(0), second.mode(1)), ("incremental", "full"), "{}", second.report);
    assert_eq!(origins(&env, &second.id), files);
    assert_no_trace(&domain);

    domain.shut_down(&mut guest);
    let plan = env.vmbackup(&["plan", "--domain", domain.name(), "--json"]).json();
    assert_eq!(plan["disks"][0]["read"]["mode"], "incremental", "{plan}");
    assert_eq!(plan["disks"][1]["size_bytes"], 64 << 20, "{plan}");
    let stopped = take_stopped(&env, &domain, &["incremental"]);
    assert_eq!((stopped.mode(0), stopped.mode(1)), ("incremental", "full"), "{}", stopped.report);
    assert_eq!(origins(&env, &stopped.id), files);
    let mut guest = domain.start();
    guest.run("pat vda 999 1001");
    let last = take(&env, &domain, &mut guest, &["incremental"]);
    assert_eq!(last.mode(0), "incremental", "{}", last.report);
    for taken in [&first, &second, &stopped, &last] {
        prove(&env, taken);
    }
}

#[test]
fn a_volume_below_a_snapshot_is_still_the_image_of_the_last_point() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &spec(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 8");
    take(&env, &domain, &mut guest, &["full"]);
    let overlay = env.path("overlay.qcow2");
    let disk = format!("vda,file={}", overlay.display());
    let snapshot = ["snapshot-create-as", domain.name(), "s", "--disk-only", "--no-metadata"];
    domain.virsh(&[&snapshot[..], &["--diskspec", &disk]].concat()).ok();
    guest.run("pat vda 5000001 70000; sync");
    let report = env.vmbackup(&["incremental", "--domain", domain.name(), "--json"]).json();
    assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{report}");
}

#[test]
fn a_stopped_domain_needs_its_pool_and_says_which() {
    let env = TestEnv::new();
    env.init_repo();
    let domain = Domain::define(&env, &spec(&[DiskFormat::Qcow2]));
    let (name, pool) = (domain.name(), domain.pool());
    let start = format!("virsh pool-start {}", pool.name);
    let volume = fs::read(domain.disk(0)).expect("own disk");
    pool.virsh("pool-destroy");
    for command in ["full", "plan"] {
        let words = ["vda", name, &pool.name, "not active", &start];
        let failed = env.vmbackup(&[command, "--domain", name]).fails_with(&words);
        assert_eq!(failed.code, Some(3), "{failed:?}");
    }
    // Nobody needs the pool of a disk that is left out.
    let words = ["every disk", "is left out"];
    env.vmbackup(&["full", "--domain", name, "--exclude-disk", "vda"]).fails_with(&words);
    pool.virsh("pool-start");
    env.vmbackup(&["full", "--domain", name]).ok();
    fs::remove_file(domain.disk(0)).expect("own disk");
    pool.virsh("pool-refresh");
    env.vmbackup(&["full", "--domain", name]).fails_with(&["no volume", "pool-refresh"]);
    fs::write(domain.disk(0), volume).expect("own disk");
    pool.virsh("pool-destroy");
    pool.virsh("pool-undefine");
    env.vmbackup(&["full", "--domain", name]).fails_with(&["does not exist", &start, name]);
}

#[test]
fn a_lost_vm_is_in_its_pool_again() {
    let env = TestEnv::new();
    env.init_repo();
    let formats = [DiskFormat::Qcow2, DiskFormat::Raw];
    let (domain, mut guest) = Domain::boot(&env, &spec(&formats));
    guest.run("fill vda 0 8; rnd vdb 61440 100");
    let sums = "sum vda; sum vdb";
    domain.virsh(&["domblklist", domain.name()]).ok();
    let taken = take(&env, &domain, &mut guest, &["full"]);
    domain.lose();
    let (pool, define) = (domain.pool(), ["restore", &taken.id, "--define"]);
    pool.virsh("pool-refresh");

    // It could be a file system that is not mounted.
    pool.virsh("pool-destroy");
    let start = format!("virsh pool-start {}", pool.name);
    let words = ["vda", domain.name(), &pool.name, "not active", &start, "--to DIR"];
    let refused = env.vmbackup(&define).fails_with(&words);
    assert_eq!(refused.code, Some(3), "{refused:?}");
    let plan = env.vmbackup(&[&define[..], &["--dry-run", "--json"]].concat());
    assert_eq!((plan.code, plan.stdout.matches("pool-start").count()), (Some(3), 2), "{plan:?}");
    assert!(!domain.disk(0).exists());
    pool.virsh("pool-start");

    let report = env.vmbackup(&[&define[..], &["--start", "--json"]].concat()).json();
    assert!(!changes(&report).contains("disk vd"), "{report}");
    let xml = domain.dump();
    for index in 0..formats.len() {
        let volume = domain.disk(index).file_name().expect("a file").to_string_lossy();
        let source = format!("<source pool='{}' volume='{volume}'/>", pool.name);
        assert!(xml.contains(&source), "{xml}");
    }
    prove_guest(&env, &domain, &taken.id, sums);

    // Beside it there is a file of its own; where the pool is elsewhere now, a file as before.
    let copy = Domain::adopt(&env, &env.name("copy"));
    let report = env.vmbackup(&["restore", &taken.id, "--as", copy.name(), "--json"]).json();
    assert!(changes(&report).contains("disk vda: "), "{report}");
    assert!(copy.dump().contains("<disk type='file'"), "{}", copy.dump());
    domain.lose();
    pool.virsh("pool-destroy");
    pool.virsh("pool-undefine");
    let elsewhere = env.open_dir("elsewhere");
    let _elsewhere = Pool::make(&env, &pool.name, &elsewhere);
    let report = env.vmbackup(&[&define[..], &["--start", "--json"]].concat()).json();
    assert!(changes(&report).contains("disk vda: "), "{report}");
    let source = format!("<source file='{}'/>", domain.disk(0).display());
    assert!(domain.dump().contains(&source), "{}", domain.dump());
    assert_eq!(domain.state(), "running");
}

/// The running guest reads what the point holds.
fn prove_guest(env: &TestEnv, domain: &Domain<'_>, point: &str, sums: &str) {
    let found = domain.guest().run(sums);
    let to = env.path("proof");
    env.vmbackup(&["restore", point, "--to", &to.to_string_lossy()]).ok();
    for (disk, sum) in ["vda", "vdb"].iter().zip(found.split_whitespace()) {
        let image = to.join(format!("{disk}.raw")).to_string_lossy().into_owned();
        let expected = env.run("sha256sum", &[&image]).text();
        assert!(expected.starts_with(sum), "{disk}: {expected} is not {sum}");
    }
    fs::remove_dir_all(to).expect("own directory");
}
