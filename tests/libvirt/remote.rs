//! A domain of another host: this machine, through an SSH daemon of the test's own.

use std::fs;
use std::path::{Path, PathBuf};

use crate::killed::{Places, assert_not_frozen, mentions, prove};
use crate::rig::{assert_no_trace, prove_with, take};
use crate::support::{
    DiskFormat, DiskSpec, Domain, DomainSpec, Guest, GuestFiles, Process, SlowDisk, Ssh, TestEnv,
    wait_until,
};

/// Instead of a step: when a part of the second disk has been read.
const READING: &str = "reading";

/// A backup that has stopped at a step, or is at work on the second disk, and the socket it reads from then.
#[track_caller]
fn begun_until(
    (env, slow): (&TestEnv, &SlowDisk),
    step: &str,
    args: &[&str],
) -> (Process, Option<PathBuf>) {
    if step != READING {
        return (env.stopped_at(step, args), None);
    }
    slow.be_slow();
    let before = slow.read_bytes();
    let mut backup = env.spawn_vmbackup(args);
    wait_until("a part of the disk is read", 60, || {
        assert!(backup.is_running(), "it ended before");
        slow.read_bytes() >= before + (1 << 20)
    });
    let processes = env.processes();
    let forward =
        processes.iter().find_map(|line| line.split_once(" -L ")).expect("an ssh of ours");
    let (socket, _) = forward.1.split_once(':').expect("a socket here, and one there");
    assert!(PathBuf::from(socket).exists(), "{processes:?}");
    (backup, Some(socket.into()))
}

/// Requires that of a run that has ended neither a process is left nor a way in.
#[track_caller]
fn assert_has_left(env: &TestEnv, ssh: &Ssh, step: &str) {
    wait_until(&format!("{step}: processes end"), 20, || env.processes().is_empty());
    wait_until(&format!("{step}: sessions end"), 20, || ssh.sessions(env).is_empty());
}

/// A running domain of another host, of two disks, and a point of it.
struct There<'env> {
    places: Places,
    ssh: Ssh,
    domain: Domain<'env>,
    /// Below the second disk.
    slow: SlowDisk,
}

impl<'env> There<'env> {
    fn begin(env: &'env TestEnv) -> (Self, Guest) {
        env.init_repo();
        let disk = DiskSpec { format: DiskFormat::Qcow2, size_mib: 16 };
        let spec = DomainSpec { disks: vec![disk; 2], ..DomainSpec::with_disks(&[]) };
        let domain = Domain::define(env, &spec);
        let slow = SlowDisk::below(env, domain.disk(1), "24M");
        let guest = domain.start();
        domain.wait_for_agent();
        let (places, ssh) = (Places::new(env), Ssh::start(env));
        let there = Self { places, ssh, domain, slow };
        env.vmbackup(&there.run("full", &there.ssh.uri())).ok();
        (there, guest)
    }

    /// The arguments of a backup.
    fn run<'a>(&'a self, command: &'a str, uri: &'a str) -> Vec<&'a str> {
        [&self.places.backup(command, &self.domain)[..], &["--connect", uri]].concat()
    }
}

/// The socket that is forwarded lies in a directory of ours, here; scratch and the socket of the export there.
#[test]
fn a_backup_of_a_remote_domain_can_be_killed_while_it_reads() {
    let env = TestEnv::new();
    let (there, mut guest) = There::begin(&env);
    let There { places, ssh, domain, slow } = &there;
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt && sync");
    let uri = ssh.uri();
    let run = |command| there.run(command, &uri);
    let killed =
        [("after:freeze", false), (READING, true), (READING, false), ("after:manifest", true)];
    for (at, (step, is_asked_for)) in killed.into_iter().enumerate() {
        guest.run(&format!("rnd vdb {} 20; echo {at} >/mnt/file; sync", 4096 + at * 100));
        let full = [&run("full")[..], &["--quiesce", "require"]].concat();
        let (backup, socket) = begun_until((&env, slow), step, &full);
        guest.run(&format!("rnd vdb {} 20", 4130 + at * 100));
        backup.signal("KILL");
        backup.wait();
        slow.be_fast();
        assert_eq!(domain.state(), "running", "{step}");
        assert_not_frozen(&mut guest, step);
        // What it had here ends by itself, and its sessions there.
        assert_has_left(&env, ssh, step);

        let mut said = String::new();
        if is_asked_for {
            let recover = ["recover", "--domain", domain.name(), "--connect", &uri];
            said.push_str(&env.vmbackup(&recover).ok().stdout);
            assert!(!domain.has_backup_job(), "{step}: {said}");
            assert_no_trace(domain);
            assert_eq!(domain.sockets(), Vec::<PathBuf>::new(), "{step}");
            // Of a job that was not answered, and of a point that took nobody's place yet, it is kept.
            if step == READING {
                places.assert_empty(&env, step);
            }
        }
        // What a mounted file system writes when nobody looks is not in the oracle's instant.
        guest.run("umount /mnt && sync");
        let next = env.vmbackup(&run("incremental"));
        said.push_str(&next.stderr);
        assert!(mentions(&said), "{step}: {said}");
        let report = next.json();
        domain.suspend();
        let oracles = domain.oracles(&at.to_string());
        domain.resume();
        guest.run("mount /dev/vda /mnt");
        prove(&env, &report, &oracles, step);
        assert_no_trace(domain);
        let point = report["point"].as_str().expect("a point id");
        let held = domain.bitmaps();
        assert!(held.len() == 1 && held[0].contains(point), "{step}: {held:?}");
        assert_eq!(domain.sockets(), Vec::<PathBuf>::new(), "{step}");
        places.assert_empty(&env, step);
        let directory = socket.as_deref().and_then(Path::parent);
        assert!(directory.is_none_or(|path| !path.exists()), "{step}: {directory:?}");
        assert_has_left(&env, ssh, step);
    }
}

/// The bitmaps that it had not stored are gone as well.
#[test]
fn a_remote_backup_that_is_killed_and_its_qemu_too_is_cleared_away() {
    let env = TestEnv::new();
    let (there, _) = There::begin(&env);
    let There { places, ssh, domain, slow } = &there;
    let uri = ssh.uri();
    let run = |command| there.run(command, &uri);
    let (backup, _) = begun_until((&env, slow), READING, &run("full"));
    backup.signal("KILL");
    backup.wait();
    domain.kill_qemu();
    slow.be_fast();
    let mut guest = domain.start();
    let next = env.vmbackup(&run("backup")).ok();
    assert!(next.stderr.contains("-vda.scratch") && next.stderr.contains("went down"), "{next:?}");
    places.assert_empty(&env, "QEMU gone");
    guest.run("rnd vdb 9000 20");
    let report = env.vmbackup(&run("incremental")).json();
    prove(&env, &report, &domain.oracles("gone"), "QEMU gone");
    assert_no_trace(domain);
    assert_eq!(domain.bitmaps().len(), 1);
    assert_has_left(&env, ssh, "QEMU gone");
}

/// What of a point is not its disks lies in files of that host: it is named, with what to do, and whoever
/// restores is told what that means.
#[test]
fn what_cannot_be_read_of_a_remote_domain_is_named_with_what_to_do() {
    let env = TestEnv::new();
    let ssh = Ssh::start(&env);
    let password = env.path("password");
    fs::write(&password, "correct horse\n").expect("own directory");
    let key = ["--password-file", &*password.to_string_lossy()];
    env.vmbackup(&[&["repo", "init"], &key[..]].concat()).ok();
    let spec = DomainSpec { uefi: true, tpm: true, ..DomainSpec::with_disks(&[DiskFormat::Qcow2]) };
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("rnd vda 61440 100");
    let sum = "dd if=/dev/vda bs=1k skip=61440 2>/dev/null | sha256sum";
    let before = guest.run(sum);

    let uri = ssh.uri();
    let there = [&["--connect", &uri], &key[..]].concat();
    let files = [
        format!("NVRAM {}", env.path("nvram.fd").display()),
        format!("kernel {}", env.path("vmlinuz").display()),
        format!("initrd {}", env.path("initrd").display()),
        format!("TPM state /var/lib/libvirt/swtpm/{}/tpm2", domain.uuid()),
    ];
    let host = domain.virsh(&["hostname"]).text();
    let reason = format!("it is a file of host {host}: run vmbackup there, or copy it by hand");
    let lines = files.iter().map(|file| format!("not captured: {file}: {reason}"));
    let lines: Vec<String> = lines.collect();
    let says = |said: &str| {
        for line in &lines {
            assert!(said.lines().any(|one| one == line), "no {line:?} in {said}");
        }
    };
    says(&env.vmbackup(&[&["plan", "--domain", domain.name()], &there[..]].concat()).text());
    let taken = take(&env, &domain, &mut guest, &[&["full"], &there[..]].concat());
    assert_no_trace(&domain);
    prove_with(&env, &taken, &key);
    let show = [&["show", &taken.id], &key[..]].concat();
    says(&env.vmbackup(&show).text());
    let shown = env.vmbackup(&[&show[..], &["--json"]].concat()).json();
    let kinds = shown["artifacts"].to_string();
    for kind in ["nvram", "kernel", "initrd", "tpm"] {
        assert!(!kinds.contains(kind), "{kind}: {kinds}");
    }

    // Stopped, even its disks are out of reach.
    let variables = fs::read(env.path("nvram.fd")).expect("made at the first start");
    domain.destroy();
    let refused = env.vmbackup(&[&["full", "--domain", domain.name()], &there[..]].concat());
    refused.fails_with(&["on another host", "virsh start --paused"]);

    domain.lose();
    let restore = ["restore", &taken.id, "--define", "--json"];
    let report = env.vmbackup(&[&restore[..], &key[..]].concat()).json();
    let changes = report["domain"]["changes"].to_string();
    for what in ["NVRAM", "kernel", "initrd", "TPM state"] {
        let told = changes.split("\",\"").any(|change| {
            change.contains(what) && change.contains("was not captured") && change.contains("exist")
        });
        assert!(told, "{what}: {changes}");
    }
    // As whoever had copied them by hand would.
    fs::write(env.path("nvram.fd"), variables).expect("own directory");
    GuestFiles::into_dir(env.dir());
    let mut guest = domain.start();
    assert_eq!(guest.run(sum), before);
}
