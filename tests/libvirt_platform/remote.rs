//! A remote host: this one, through an SSH daemon of the test's own on a free port, or through a
//! program that carries libvirt's words alone.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::Platform;
use vmbackup::platform::libvirt::{Libvirt, LibvirtOptions};

use crate::bare::{Bare, qcow2, request, take};
use crate::stale::prove;
use crate::support::{SlowDisk, Ssh, TestEnv, wait_until};

#[test]
fn a_domain_of_a_remote_host_is_read_through_ssh() {
    let env = TestEnv::new();
    env.init_repo();
    let (ssh, bare) = (Ssh::start(&env), Bare::start(&env, &qcow2(&env, 'a', "8M")));
    bare.io(0, "write -P 6 1M 1M");
    // A point taken on the host serves as the base of one taken from afar.
    env.vmbackup(&["full", "--domain", &bare.name]).ok();
    bare.io(0, "write -P 7 2M 64k");
    let uri = ssh.uri();
    let there = ["--domain", &bare.name, "--connect", &uri, "--json"];
    let report = env.vmbackup(&[&["incremental"], &there[..]].concat()).json();
    // The chunk that has changed.
    assert_eq!(report["disks"][0]["read_bytes"], 256 << 10, "{report}");
    prove(&bare, &report);
    let id = report["point"].as_str().expect("a point id");
    assert!(bare.bitmaps().len() == 1 && bare.bitmaps()[0].contains(id), "{:?}", bare.bitmaps());
    assert_eq!(bare.checkpoints(), Vec::<String>::new());
    assert_eq!(bare.sockets(), Vec::<PathBuf>::new());
    assert!(env.path("known_hosts").exists());

    bare.virsh(&["destroy", &bare.name]).ok();
    env.vmbackup(&[&["full"], &there[..]].concat()).fails_with(&["on another host"]);
}

/// A way to the same libvirt that can carry nothing else.
fn words_only(env: &TestEnv, bare: &Bare<'_>) -> LibvirtOptions {
    let carrier = env.path("carrier");
    std::fs::write(&carrier, "#!/bin/sh\nexec virt-ssh-helper qemu:///system\n").expect("own file");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&carrier, executable).expect("own file");
    let uri = format!("qemu+ext://127.0.0.1/system?command={}", carrier.display());
    LibvirtOptions { uri: Some(uri), ..bare.options() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plaintext_export_is_opened_only_when_asked_for() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    bare.io(0, "write -P 6 1M 1M");
    let remote = Libvirt::open(words_only(&env, &bare)).await.expect("connects");
    let mut wanted = request(1);
    let refused = remote.open_snapshot(&wanted, &Control::new()).await.err().expect("refused");
    assert_eq!(refused.kind(), Kind::Unsupported, "{refused}");
    wanted.insecure_tcp = true;
    let mut snapshot = remote.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    let taken = take(&mut *snapshot).await;
    assert_eq!(taken[0].bytes[1 << 20], 6);
    snapshot.still_valid().await.expect("still valid");
    snapshot.abort().await.expect("aborts");
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
}

/// At a step of the journal, where nothing is in flight, it is made anew.
#[test]
fn a_way_to_a_remote_host_that_is_cut_between_two_steps_costs_nothing() {
    let env = TestEnv::new();
    env.init_repo();
    let ssh = Ssh::start(&env);
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    bare.io(0, "write -P 6 1M 1M");
    let uri = ssh.uri();
    for step in ["after:job", "before:manifest", "after:manifest"] {
        let backup =
            env.stopped_at(step, &["full", "--domain", &bare.name, "--connect", &uri, "--json"]);
        ssh.cut(&env);
        backup.signal("CONT");
        let report = backup.wait().json();
        prove(&bare, &report);
        let id = report["point"].as_str().expect("a point id");
        assert!(bare.bitmaps().len() == 1 && bare.bitmaps()[0].contains(id), "{step}");
        env.assert_nothing_runs(step);
    }
}

#[test]
fn a_way_to_a_remote_host_that_is_cut_in_a_read_fails_it_and_leaves_nothing_there() {
    let env = TestEnv::new();
    env.init_repo();
    let (ssh, disk) = (Ssh::start(&env), qcow2(&env, 'a', "24M"));
    let slow = SlowDisk::below(&env, &env.path("vda.qcow2"), "24M");
    let bare = Bare::start(&env, &disk);
    slow.be_slow();
    let uri = ssh.uri();
    let before = slow.read_bytes();
    let mut backup = env.spawn_vmbackup(&["full", "--domain", &bare.name, "--connect", &uri]);
    wait_until("a part of the disk is read", 60, || {
        assert!(backup.is_running(), "it ended before");
        slow.read_bytes() >= before + (1 << 20)
    });
    ssh.cut(&env);
    let outcome = backup.wait();
    assert_eq!(outcome.code, Some(13), "{outcome:?}");
    // To undo it libvirt was connected to anew.
    assert!(!bare.has_backup_job());
    assert_eq!((bare.bitmaps(), bare.checkpoints()), (Vec::new(), Vec::new()));
    assert_eq!((bare.sockets(), bare.journals()), (Vec::new(), 0));
    wait_until("processes end", 20, || env.processes().is_empty());
    wait_until("sessions end", 20, || ssh.sessions(&env).is_empty());
}
