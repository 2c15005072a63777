//! What bad input gets: a clear error, an exit code, nothing changed and nothing left behind.

use std::fs;
use std::path::PathBuf;

use crate::rig::{assert_no_trace, take};
use crate::support::{DiskFormat, Domain, DomainSpec, SmallDisk, TestEnv, wait_until};

#[test]
fn an_unknown_domain_is_answered_with_the_names_that_exist() {
    let env = TestEnv::new();
    env.init_repo();
    let domain = Domain::define(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let refused = env.vmbackup(&["full", "--domain", "no-such-domain"]).fails();
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert!(refused.stderr.contains(domain.name()), "{refused:?}");
}

#[test]
fn a_name_that_is_the_uuid_of_another_domain_is_ambiguous_and_both_are_named() {
    let env = TestEnv::new();
    env.init_repo();
    let domain = Domain::define(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let (wanted, other) = (domain.uuid(), uuid::Uuid::new_v4().to_string());
    let xml = format!(
        "<domain type='qemu'><name>{wanted}</name><uuid>{other}</uuid><title>{}</title>\
         <memory unit='MiB'>32</memory><os><type arch='x86_64'>hvm</type></os></domain>",
        env.name("")
    );
    let file = env.path("other.xml");
    fs::write(&file, xml).expect("own directory");
    // Removed by its UUID: its name would take the first away.
    let _other = Domain::adopt(&env, &other);
    domain.virsh(&["define", &file.to_string_lossy()]).ok();
    for command in ["plan", "full"] {
        let refused = env.vmbackup(&[command, "--domain", &wanted]);
        let refused = refused.fails_with(&[domain.name(), &other, "hint: "]);
        assert_eq!(refused.code, Some(4), "{refused:?}");
    }
}

#[test]
fn scratch_without_room_is_refused_before_anything_is_begun() {
    let env = TestEnv::new();
    env.init_repo();
    let domain = Domain::define(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    domain.virsh(&["start", domain.name()]).ok();
    let small = SmallDisk::mount(env.dir(), "4M");
    let filler = small.path.join("filler");
    fs::write(&filler, vec![1; 3_500_000]).expect("own file system");
    for command in ["plan", "full"] {
        let scratch = small.path.to_string_lossy();
        let refused =
            env.vmbackup(&[command, "--domain", domain.name(), "--scratch-dir", &scratch]).fails();
        assert_eq!(refused.code, Some(9), "{refused:?}");
        let said = format!("{}{}", refused.stdout, refused.stderr);
        assert!(said.contains(&*scratch) && said.contains("almost full"), "{refused:?}");
        assert!(said.contains("--scratch-dir"), "{refused:?}");
        assert_eq!(small.files(), std::slice::from_ref(&filler));
        assert_no_trace(&domain);
        assert_eq!(domain.bitmaps(), Vec::<String>::new());
    }
    assert_eq!(env.vmbackup(&["list", "--json"]).json()["points"], serde_json::json!([]));
}

#[test]
fn an_incremental_without_a_base_says_why_and_changes_nothing() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, _guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let refused = env.vmbackup(&["incremental", "--domain", domain.name()]).fails();
    assert_eq!(refused.code, Some(17), "{refused:?}");
    assert_no_trace(&domain);
    assert_eq!(env.vmbackup(&["list", "--json"]).json()["points"].as_array().unwrap().len(), 0);
}

#[test]
fn a_foreign_backup_job_is_left_alone() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, _guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let xml = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/>\
         </domainbackup>",
        env.open_dir("foreign").join("nbd.sock").display()
    );
    let file = env.path("foreign.xml");
    fs::write(&file, xml).expect("own directory");
    domain.virsh(&["backup-begin", domain.name(), &file.to_string_lossy()]).ok();
    let refused = env.vmbackup(&["full", "--domain", domain.name()]).fails();
    assert_eq!(refused.code, Some(7), "{refused:?}");
    assert!(domain.has_backup_job(), "the foreign job was ended");
    domain.virsh(&["domjobabort", domain.name()]).ok();
    // One thread of libvirt handles the events of all domains: one that hangs there delays all.
    wait_until("libvirt to forget the job", 60, || {
        domain.virsh(&["backup-dumpxml", domain.name()]).code != Some(0)
    });
    env.vmbackup(&["full", "--domain", domain.name()]).ok();
    assert_no_trace(&domain);
}

#[test]
fn a_backup_without_a_repository_does_not_make_one_at_a_named_place() {
    let env = TestEnv::new();
    let (domain, _guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let refused = env.vmbackup(&["full", "--domain", domain.name()]).fails();
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert!(!env.repo().exists(), "a typo must not become an empty repository");
    assert_no_trace(&domain);
}

/// One thread of libvirt handles the events of all domains, hence the long limit: one that hangs there
/// delays all.
#[test]
fn ctrl_c_ends_a_backup_at_once_and_leaves_nothing() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 60");
    let scratch = env.open_dir("scratch");
    let full = ["full", "--domain", domain.name(), "--scratch-dir", &scratch.to_string_lossy()];
    let backup = env.stopped_at("after:job", &full);
    assert!(domain.has_backup_job() && !domain.bitmaps().is_empty());
    backup.ends_by_ctrl_c(45);
    assert_eq!(env.vmbackup(&["list", "--json"]).json()["points"], serde_json::json!([]));
    assert_no_trace(&domain);
    assert_eq!(domain.bitmaps(), Vec::<String>::new());
    assert_eq!(domain.sockets(), Vec::<PathBuf>::new());
    assert_eq!(fs::read_dir(&scratch).expect("own directory").count(), 0);
    assert_eq!(env.vmbackup(&["recover"]).text(), "nothing is left to undo");
    env.vmbackup(&full).ok();
}

#[test]
fn plan_says_what_would_happen_and_changes_nothing() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Raw]);
    let (domain, _guest) = Domain::boot(&env, &spec);
    let plan = env.vmbackup(&["plan", "--domain", domain.name(), "--json"]).json();
    assert_eq!(plan["disks"].as_array().map(Vec::len), Some(2), "{plan}");
    assert_eq!(plan["disks"][0]["read"]["mode"], "full", "{plan}");
    assert_no_trace(&domain);
    env.vmbackup(&["full", "--domain", domain.name()]).ok();
    let plan = env.vmbackup(&["plan", "--domain", domain.name(), "--json"]).json();
    assert_eq!(plan["disks"][0]["read"]["mode"], "incremental", "{plan}");
    assert_eq!(plan["disks"][1]["read"]["mode"], "full", "{plan}");
    assert_no_trace(&domain);
}

/// Found in review: exit code 20, and nothing about what to do.
#[test]
fn a_domain_that_is_saved_while_its_backup_begins_is_named_and_the_next_backup_works() {
    let env = TestEnv::new();
    env.init_repo();
    let domain = Domain::define(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    domain.virsh(&["start", domain.name()]).ok();
    let backup = env.stopped_at("before:job", &["full", "--domain", domain.name()]);
    domain.virsh(&["managedsave", domain.name()]).ok();
    backup.signal("CONT");
    let refused = backup.wait().fails_with(&[domain.name(), "saved", "hint: run the backup again"]);
    assert_eq!(refused.code, Some(7), "{refused:?}");
    env.vmbackup(&["full", "--domain", domain.name()]).ok();
    domain.virsh(&["managedsave-remove", domain.name()]).ok();
}

/// libvirt lets one job at a time work on a domain: that of the backup is waited for, and after half
/// a minute (`QEMU_JOB_WAIT_TIME`) the save is given up.
#[test]
fn a_domain_is_not_saved_while_it_is_backed_up() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, _guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let backup = env.stopped_at("before:manifest", &["full", "--domain", domain.name()]);
    domain.virsh(&["managedsave", domain.name()]).fails_with(&["state change lock"]);
    assert_eq!(domain.state(), "running");
    backup.signal("CONT");
    backup.wait().ok();
    assert_no_trace(&domain);
}

/// A domain has a mount namespace of its own, made when it starts.
#[test]
fn scratch_on_a_file_system_that_is_newer_than_the_domain_is_explained() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, _guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    let late = env.open_dir("late");
    let scratch = late.to_string_lossy();
    env.run("mount", &["-t", "tmpfs", "-o", "size=64M,mode=777", "vmbtest", &scratch]).ok();
    let full = ["full", "--domain", domain.name(), "--scratch-dir", &scratch];
    let refused = env.vmbackup(&full);
    let left = fs::read_dir(&late).expect("own directory").count();
    env.run("umount", &[&*scratch]).ok();
    let refused = refused.fails_with(&["does not find scratch", &scratch, "mounted after"]);
    assert_eq!((refused.code, left), (Some(3), 0), "{refused:?}");
    assert_no_trace(&domain);
}

#[test]
fn plan_says_that_the_tpm_is_left_out_without_a_key() {
    let env = TestEnv::new();
    env.init_repo();
    let spec = DomainSpec { tpm: true, ..DomainSpec::with_disks(&[DiskFormat::Qcow2]) };
    let domain = Domain::define(&env, &spec);
    let plan = env.vmbackup(&["plan", "--domain", domain.name()]).text();
    assert!(plan.contains("not captured: TPM state"), "{plan}");
    assert!(plan.contains("vmbackup repo key add"), "{plan}");
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
