//! A remote host: this one, through an SSH daemon of the test's own on a free port, or through a
//! program that carries libvirt's words alone.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use vmbackup::block::Buffer;
use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::Platform;
use vmbackup::platform::libvirt::{Libvirt, LibvirtOptions};
use vmbackup::vm::ReadMode;

use crate::bare::{Bare, backup, known, point, qcow2, request, take};
use crate::support::{Process, TestEnv, assert_same_content, wait_until};

/// An SSH daemon that lets the test's key in as root.
struct Ssh {
    port: u16,
    key: PathBuf,
    daemon: Process,
}

impl Ssh {
    fn start(env: &TestEnv) -> Self {
        let path = |name: &str| env.path(name).to_string_lossy().into_owned();
        for key in ["hostkey", "key"] {
            env.run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]).ok();
        }
        std::fs::copy(env.path("key.pub"), env.path("authorized")).expect("own directory");
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(env.path("authorized"), private).expect("own file");
        // Separated privileges want a directory that only root has; systems make it at boot.
        std::fs::create_dir_all("/run/sshd").expect("tests run as root");
        let port =
            TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
        let options = [
            "Port=PORT",
            "ListenAddress=127.0.0.1",
            "HostKey=DIR/hostkey",
            "UsePAM=no",
            "AuthorizedKeysFile=DIR/authorized",
            "StrictModes=no",
            "PidFile=none",
            "PermitRootLogin=prohibit-password",
            "PasswordAuthentication=no",
        ];
        let mut command = env.command("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f", "/dev/null"]);
        let dir = env.dir().to_string_lossy();
        for option in options {
            let option = option.replace("PORT", &port.to_string()).replace("DIR", &dir);
            command.args(["-o", &option]);
        }
        let daemon = Process::spawn(&mut command);
        wait_until("sshd", 20, || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { port, key: env.path("key"), daemon }
    }

    fn uri(&self) -> String {
        let (port, key) = (self.port, self.key.display());
        format!("qemu+ssh://root@127.0.0.1:{port}/system?keyfile={key}&no_verify=1")
    }

    fn options(&self, bare: &Bare<'_>) -> LibvirtOptions {
        LibvirtOptions { uri: Some(self.uri()), ..bare.options() }
    }

    /// Cuts all that goes through it; it lets in who comes anew.
    fn cut(&self, env: &TestEnv) {
        env.run("pkill", &["-KILL", "-P", &self.daemon.id().to_string()]).ok();
    }
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
    let remote = Libvirt::open(ssh.options(&bare)).await.expect("connects");
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
    let remote = Libvirt::open(ssh.options(&bare)).await.expect("connects");
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
    let job = bare.virsh(&["domjobinfo", &bare.name]).text();
    assert!(job.contains("None"), "{job}");
}
