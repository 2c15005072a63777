//! A remote host: this one, through an SSH daemon of the test's own on a free port, or through a
//! program that carries libvirt's words alone.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use vmbackup::block::Buffer;
use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::Platform;
use vmbackup::platform::libvirt::{Libvirt, LibvirtOptions};
use vmbackup::vm::ReadMode;

use crate::bare::{Bare, backup, known, point, qcow2, request, take};
use crate::support::{Ssh, TestEnv, assert_same_content};

fn over(ssh: &Ssh, bare: &Bare<'_>) -> LibvirtOptions {
    LibvirtOptions { uri: Some(ssh.uri()), ..bare.options() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_of_a_remote_host_is_read_through_ssh() {
    let env = TestEnv::new();
    let ssh = Ssh::start(&env);
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    bare.io(0, "write -P 6 1M 1M");
    // A point taken on the host serves as the base of one taken from afar.
    let (first, _) = backup(&bare, &request(1)).await.expect("backs up");
    bare.io(0, "write -P 7 2M 64k");
    let mut next = request(2);
    next.known_points = vec![first];
    let remote = Libvirt::open(over(&ssh, &bare)).await.expect("connects");
    let mut snapshot = remote.open_snapshot(&next, &Control::new()).await.expect("opens");
    let taken = take(&mut *snapshot).await;
    assert_eq!(taken[0].read, ReadMode::Incremental { base: point(1) });
    assert_eq!(taken[0].changed, [(2 << 20, (2 << 20) + 65536)]);
    assert_eq!((taken[0].bytes[1 << 20], taken[0].bytes[2 << 20]), (6, 7));
    snapshot.still_valid().await.expect("still valid");
    let _ = known(point(2), &*snapshot);
    snapshot.commit().await.expect("commits");
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(2))]);
    assert_eq!(bare.checkpoints(), Vec::<String>::new());
    assert_eq!(bare.sockets(), Vec::<PathBuf>::new());

    bare.virsh(&["destroy", &bare.name]).ok();
    let error = remote.open_snapshot(&request(3), &Control::new()).await.err().expect("refused");
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("on another host"), "{error}");
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
    bare.io(0, "flush");
    let (uri, oracle) = (ssh.uri(), env.path("oracle.raw"));
    let image = env.path("vda.qcow2").to_string_lossy().into_owned();
    env.run("qemu-img", &["convert", "-U", "-O", "raw", &image, &oracle.to_string_lossy()]).ok();
    for step in ["after:job", "before:manifest", "after:manifest"] {
        let backup =
            env.stopped_at(step, &["full", "--domain", &bare.name, "--connect", &uri, "--json"]);
        ssh.cut(&env);
        backup.signal("CONT");
        let report = backup.wait().json();
        let (id, to) = (report["point"].as_str().expect("a point id"), env.path(step));
        env.vmbackup(&["restore", id, "--to", &to.to_string_lossy(), "--format", "raw"]).ok();
        assert_same_content(&env, (&to.join("vda.raw"), "raw"), (&oracle, "raw"));
        assert!(bare.bitmaps().len() == 1 && bare.bitmaps()[0].contains(id), "{step}");
        env.assert_nothing_runs(step);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_to_a_remote_host_that_is_cut_in_a_read_fails_it_and_leaves_nothing_there() {
    let env = TestEnv::new();
    let ssh = Ssh::start(&env);
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    bare.io(0, "write -P 6 1M 1M");
    let remote = Libvirt::open(over(&ssh, &bare)).await.expect("connects");
    let mut snapshot = remote.open_snapshot(&request(1), &Control::new()).await.expect("opens");
    let source = snapshot.source(0).await.expect("opens");
    let window = || Buffer::unbudgeted(vec![0; 1 << 20]);
    let read = source.read(1 << 20, window()).await.expect("reads");
    assert_eq!(read[0], 6);
    ssh.cut(&env);
    let error = source.read(1 << 20, window()).await.expect_err("there is no way");
    assert_eq!(error.kind(), Kind::Connection, "{error}");
    drop(source);
    snapshot.abort().await.expect("it is connected anew");
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
    assert_eq!(bare.checkpoints(), Vec::<String>::new());
    assert!(!bare.has_backup_job());
}
