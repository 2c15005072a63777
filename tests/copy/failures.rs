//! What breaks on the way, and what is left of it.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::ends::is_running;
use crate::support::{NbdServer, Outcome, Process, SmallDisk, TestEnv, is_listening, wait_until};

fn source(env: &TestEnv, len: usize) -> PathBuf {
    let path = env.path("source.raw");
    fs::write(&path, vec![0x5a; len]).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_target_that_is_too_small_is_refused_before_the_first_write() {
    let env = TestEnv::new();
    let source = source(&env, 2 << 20);
    let target = env.path("target.raw");
    fs::write(&target, vec![0xaa; 1 << 20]).unwrap();
    let server = NbdServer::nbdkit(&env, &["--filter=log", "memory", "1M", "logfile=log"]);
    let command = format!("[ nbdkit file {} ]", text(&target));
    for to in [text(&target), &server.uri(""), &command] {
        let outcome = env.vmbackup(&["copy", text(&source), to, "--in-place"]);
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        outcome.fails_with(&["does not fit", "2097152"]);
    }
    assert!(fs::read(&target).unwrap().iter().all(|byte| *byte == 0xaa));
    let log = fs::read_to_string(env.path("log")).unwrap();
    assert!(!log.contains("Write") && !log.contains("Zero"), "{log}");
    env.vmbackup(&["copy", text(&source), "new.qcow2", "--target-size", "1M"])
        .fails_with(&["does not fit"]);
    assert!(!env.path("new.qcow2").exists());
}

#[test]
fn what_is_no_file_is_not_replaced_by_one() {
    let env = TestEnv::new();
    let source = source(&env, 4096);
    let (fifo, link) = (env.path("fifo.raw"), env.path("link.raw"));
    env.run("mkfifo", &[&fifo]).ok();
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    fs::create_dir(env.path("dir.raw")).unwrap();
    for target in [&fifo, &link, &env.path("dir.raw")] {
        let before = fs::symlink_metadata(target).unwrap();
        for how in [&["--force"][..], &["--in-place"], &[]] {
            let args = [&["copy", text(&source), text(target)], how].concat();
            let outcome = env.vmbackup(&args).fails_with(&["is no file"]);
            assert!(!outcome.stderr.contains("--force"), "{outcome:?}");
        }
        let now = fs::symlink_metadata(target).unwrap();
        assert_eq!(before.file_type(), now.file_type());
    }
}

#[test]
fn a_full_target_ends_the_copy_with_its_name_and_the_offset() {
    let env = TestEnv::new();
    let source = source(&env, 4 << 20);
    let trigger = env.path("full");
    File::create(&trigger).unwrap();
    let file = format!("error-file={}", text(&trigger));
    let server = NbdServer::nbdkit(
        &env,
        &["--filter=error", "memory", "4M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", &file],
    );
    let uri = server.uri("");
    let outcome = env.vmbackup(&["copy", text(&source), &uri]);
    assert_eq!(outcome.code, Some(9), "{outcome:?}");
    outcome.fails_with(&["cannot write bytes", &uri, "no space left", "after 0 bytes"]);
}

/// What had only begun to be written was told as written.
#[test]
fn a_full_target_of_a_pipe_is_told_with_what_was_written() {
    let env = TestEnv::new();
    let source = source(&env, 16 << 20);
    let small = SmallDisk::mount(&env.path("."), "4M");
    let target = small.path.join("new.raw");
    let mut command = env.vmbackup_command(&["copy", "-", text(&target)]);
    let outcome = Outcome::of(command.stdin(File::open(source).unwrap()));
    assert_eq!(outcome.code, Some(9), "{outcome:?}");
    let told = outcome.stderr.split_once("failed after ").expect("it says so").1;
    let told: usize = told.split_whitespace().next().unwrap().parse().unwrap();
    assert!(told <= 4 << 20 && told > 0, "{outcome:?}");
}

/// A write of part of a grain that vmdk could not copy up came back as an invalid argument.
#[test]
fn a_full_file_system_is_told_whatever_the_format() {
    let env = TestEnv::new();
    let mut bytes = vec![0; 16 << 20];
    for grain in bytes.chunks_mut(64 << 10) {
        grain[20 << 10..48 << 10].fill(0x5a);
    }
    let source = env.path("source.raw");
    fs::write(&source, bytes).unwrap();
    let small = SmallDisk::mount(&env.path("."), "4M");
    for format in ["vmdk", "vdi", "qcow2", "vhdx"] {
        let image = small.path.join(format!("image.{format}"));
        let target = format!("{format}:{}", text(&image));
        let check = |how: &[&str]| {
            let outcome = env.vmbackup(&[&["copy", text(&source), &target][..], how].concat());
            assert_eq!(outcome.code, Some(9), "{target} {how:?}: {outcome:?}");
            // Written or zeroed, whichever finds the disk full first; with the offset.
            outcome.fails_with(&["because: cannot", " bytes ", text(&image), "no space left"]);
        };
        check(&[]);
        assert!(!image.exists());
        env.run("qemu-img", &["create", "-q", "-f", format, text(&image), "16M"]).ok();
        check(&["--in-place"]);
        fs::remove_file(&image).unwrap();
    }
}

/// CVE-2022-0485 (nbdcopy): what could not be read was written as garbage.
#[test]
fn cve_2022_0485_a_read_error_leaves_no_target() {
    let env = TestEnv::new();
    for target in ["new.raw", "new.qcow2"] {
        // One for each: nbdkit 1.32 may end with a failed assertion (raw_send_socket) when its client
        // leaves with answers under way.
        let server = NbdServer::nbdkit(
            &env,
            &["--filter=error", "pattern", "8M", "error-pread=EIO", "error-pread-rate=50%"],
        );
        let outcome = env.vmbackup(&["copy", &server.uri(""), target]);
        assert_eq!(outcome.code, Some(20), "{outcome:?}");
        outcome.fails_with(&["cannot read bytes"]);
        assert!(!env.path(target).exists());
    }
    let left: Vec<_> = fs::read_dir(env.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("new")), "{left:?}");
}

#[test]
fn a_lost_connection_is_told_with_the_offset_reached() {
    let env = TestEnv::new();
    let mut server = NbdServer::nbdkit(&env, &["--filter=delay", "pattern", "64M", "rdelay=20ms"]);
    let uri = server.uri("");
    let target = env.path("new.raw");
    let copy = env.spawn_vmbackup(&["copy", &uri, text(&target), "--requests", "1"]);
    wait_until("the temporary file", 20, || {
        fs::read_dir(env.dir())
            .unwrap()
            .any(|e| e.unwrap().path().extension().is_some_and(|x| x == "part"))
    });
    std::thread::sleep(std::time::Duration::from_millis(200));
    server.process().signal("KILL");
    let outcome = copy.wait();
    assert_eq!(outcome.code, Some(13), "{outcome:?}");
    outcome.fails_with(&["the copy failed after", "cannot read bytes", "nbdkit"]);
    assert!(!target.exists());
}

/// nbdkit on the socket `s`, slow enough to be ended in the middle of a copy.
fn slow(env: &TestEnv, image: &str) -> Process {
    let _ = fs::remove_file(env.path("s"));
    let mut command = env.command("nbdkit");
    command.args(["-f", "-U"]).arg(env.path("s")).args([
        "--filter=delay",
        "file",
        image,
        "rdelay=20ms",
    ]);
    let mut server = Process::spawn(&mut command);
    wait_until("the server's socket", 20, || {
        assert!(server.is_running(), "nbdkit ended at once");
        env.path("s").exists()
    });
    server
}

/// Bytes that tell where they are from.
fn numbered(len: u32) -> Vec<u8> {
    (0..len / 4).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_source_that_comes_back_is_read_to_its_end() {
    let env = TestEnv::new();
    let content = numbered(64 << 20);
    fs::write(env.path("source.raw"), &content).unwrap();
    let server = slow(&env, "source.raw");
    let uri = format!("nbd+unix:///?socket={}", env.path("s").display());
    let args = ["copy", &uri, "new.raw", "--requests", "2", "--request-size", "256k", "--verify"];
    let copy = env.spawn_vmbackup(&[&args[..], &["--retries", "5", "--retry-delay", "1"]].concat());
    std::thread::sleep(std::time::Duration::from_millis(700));
    drop(server);
    // Away for a while: the first attempt to go on fails, too.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let _server = slow(&env, "source.raw");
    let outcome = copy.wait().ok();
    assert!(outcome.stderr.contains("was lost"), "it was ended in the middle: {outcome:?}");
    assert!(fs::read(env.path("new.raw")).unwrap() == content);
}

#[test]
fn a_source_that_stays_away_or_comes_back_as_another_ends_the_copy() {
    let env = TestEnv::new();
    fs::write(env.path("source.raw"), numbered(64 << 20)).unwrap();
    fs::write(env.path("other.raw"), numbered(63 << 20)).unwrap();
    let uri = format!("nbd+unix:///?socket={}", env.path("s").display());
    let args = ["copy", &uri, "new.raw", "--requests", "2", "--request-size", "256k"];
    let args = [&args[..], &["--retries", "2", "--retry-delay", "1"]].concat();
    for (next, code, said) in
        [(None, 13, "2 attempts to go on failed"), (Some("other.raw"), 18, "another export")]
    {
        let server = slow(&env, "source.raw");
        let copy = env.spawn_vmbackup(&args);
        std::thread::sleep(std::time::Duration::from_millis(700));
        drop(server);
        let _server = next.map(|image| slow(&env, image));
        let outcome = copy.wait();
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        outcome.fails_with(&[said]);
        assert!(!env.path("new.raw").exists());
    }
}

#[test]
fn a_server_of_ours_ends_when_we_are_killed() {
    let env = TestEnv::new();
    let pid = env.path("pid");
    let from = format!("[ nbdkit -P {} --filter=delay pattern 64M rdelay=1 ]", text(&pid));
    let copy = env.spawn_vmbackup(&["copy", &from, "null:"]);
    wait_until("the server", 20, || pid.exists() && is_running(&pid));
    copy.signal("KILL");
    wait_until("the end of the server", 20, || !is_running(&pid));
}

/// A process that is no child of the test, by its id.
struct KilledOnDrop(String);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(&self.0).output();
    }
}

#[test]
fn ctrl_c_ends_the_wait_for_a_server_that_does_not_end_and_says_what_the_target_is() {
    let env = TestEnv::new();
    let (source, closing) = (source(&env, 1 << 20), env.path("closing"));
    let plugin = format!(
        "#!/bin/sh\ncase $1 in get_size) echo 1M ;; can_write) exit 0 ;; pwrite) cat >/dev/null ;;\n\
         pread) dd if=/dev/zero count=$3 iflag=count_bytes status=none ;;\n\
         unload) echo $$ >{}; exec sleep 60 >/dev/null 2>&1 ;; *) exit 2 ;; esac\n",
        closing.display()
    );
    fs::write(env.path("plugin"), plugin).unwrap();
    fs::set_permissions(env.path("plugin"), fs::Permissions::from_mode(0o755)).unwrap();
    let to = format!("[ nbdkit sh {} ]", env.path("plugin").display());
    let copy = env.spawn_vmbackup(&["copy", text(&source), &to]);
    let sleeper = || fs::read_to_string(&closing).ok().filter(|pid| pid.ends_with('\n'));
    wait_until("the end of the server", 20, || sleeper().is_some());
    let _sleeper = KilledOnDrop(sleeper().unwrap().trim().to_owned());
    let begun = Instant::now();
    copy.signal("INT");
    let outcome = copy.wait();
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}: {outcome:?}");
    assert_eq!(outcome.code, Some(130), "{outcome:?}");
    outcome.fails_with(&["may be written in part"]);
}

#[test]
fn a_command_line_that_fails_says_what_it_said() {
    let env = TestEnv::new();
    env.vmbackup(&["copy", "[ nbdkit nosuchplugin ]", "null:"])
        .fails_with(&["cannot start [ nbdkit nosuchplugin ]", "nosuchplugin"]);
    let outcome = env.vmbackup(&["copy", "[ no-such-program ]", "null:"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    outcome.fails_with(&["no-such-program"]);
}

#[test]
fn what_cannot_be_verified_is_refused_at_once() {
    let env = TestEnv::new();
    let source = source(&env, 4096);
    for (from, to) in [(text(&source), "null:"), (text(&source), "-"), ("-", "x.raw")] {
        let outcome = env.vmbackup(&["copy", from, to, "--verify"]);
        assert_eq!(outcome.code, Some(2), "{from} {to}: {outcome:?}");
    }
    assert!(!env.path("x.raw").exists());
}

#[test]
fn an_option_that_would_change_nothing_is_refused_at_once() {
    let env = TestEnv::new();
    let source = source(&env, 4096);
    let server = NbdServer::nbdkit(&env, &["memory", "4096"]);
    let (uri, command) = (server.uri(""), "[ nbdkit memory 4096 ]");
    for (to, args) in [
        ("-", &["--compressed"][..]),
        ("null:", &["--compressed"]),
        (&uri, &["--compressed"]),
        (command, &["--compressed"]),
        (&uri, &["--force"]),
        (command, &["--force"]),
        ("-", &["--force"]),
        ("null:", &["--in-place"]),
        ("-", &["--flush"]),
        ("null:", &["--flush"]),
        ("-", &["--allocated"]),
        ("null:", &["--allocated"]),
        ("-", &["--sparse", "64k"]),
        ("-", &["--destination-is-zero"]),
        ("null:", &["--destination-is-zero"]),
        ("x.raw", &["--retries", "1"]),
        (command, &["--retries", "1"]),
        (&uri, &["--target-size", "1M"]),
        ("-", &["--target-size", "1M"]),
    ] {
        let outcome = env.vmbackup(&[&["copy", text(&source), to][..], args].concat());
        assert_eq!(outcome.code, Some(2), "{to} {args:?}: {outcome:?}");
        assert_eq!(outcome.stdout, "", "{to} {args:?}");
        let outcome = outcome.fails_with(&[to]);
        let advice =
            if args == ["--compressed"] { "qcow2 file with --compressed" } else { args[0] };
        assert!(outcome.stderr.contains(advice), "{outcome:?}");
    }
    for args in [&["--compressed", "--allocated"][..], &["--retry-delay", "1"]] {
        let outcome = env.vmbackup(&[&["copy", text(&source), "x.qcow2"][..], args].concat());
        assert_eq!(outcome.code, Some(2), "{args:?}: {outcome:?}");
    }
    assert!(!env.path("x.raw").exists() && !env.path("x.qcow2").exists());
    // What is true anyway may be said.
    env.vmbackup(&["copy", text(&source), &uri, "--in-place", "--retries", "1"]).ok();
    env.vmbackup(&["copy", text(&source), "x.raw", "--destination-is-zero"]).ok();
}

/// The target keeps another content than it was given: proof is what finds that.
#[test]
fn a_target_that_loses_writes_is_found_out() {
    let env = TestEnv::new();
    let source = source(&env, 1 << 20);
    let server = NbdServer::nbdkit(&env, &["null", "1M"]);
    env.vmbackup(&["copy", text(&source), &server.uri("")]).ok();
    let outcome = env.vmbackup(&["copy", text(&source), &server.uri(""), "--verify"]);
    assert_eq!(outcome.code, Some(18), "{outcome:?}");
    outcome.fails_with(&["does not give back what was written"]);
}

#[test]
fn a_disk_is_not_copied_to_itself() {
    let env = TestEnv::new();
    let source = source(&env, 1 << 20);
    std::os::unix::fs::symlink(&source, env.path("link.raw")).unwrap();
    for how in ["--force", "--in-place"] {
        env.vmbackup(&["copy", text(&source), "link.raw", how]).fails_with(&["to itself"]);
    }
    assert!(fs::read(&source).unwrap().iter().all(|byte| *byte == 0x5a));
}

/// No name and no address tells that two servers, or a server and a file, have one disk behind them.
#[test]
fn a_disk_under_another_name_is_not_cleared_before_it_is_read() {
    let env = TestEnv::new();
    let image = env.path("disk.raw");
    let mut content = vec![0; 24 << 20];
    content[9 << 20..20 << 20].fill(0x5a);
    fs::write(&image, &content).unwrap();
    let server = |name: &str| {
        let socket = env.path(name);
        let mut command = env.command("qemu-nbd");
        command.args(["-t", "-e", "4", "-f", "raw", "-k"]).arg(&socket).arg(&image);
        let process = Process::spawn(&mut command);
        wait_until("qemu-nbd listens", 20, || is_listening(&socket));
        (process, format!("nbd+unix:///?socket={}", socket.display()))
    };
    let ((_one, one), (_other, other)) = (server("one.sock"), server("other.sock"));
    for (from, to) in [(&one, &one), (&one, &other)] {
        let outcome = env.vmbackup(&["copy", from, to]);
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        outcome.fails_with(&["to itself"]);
        assert!(fs::read(&image).unwrap() == content, "the disk is as it was");
    }
    let outcome = env.vmbackup(&["copy", &one, "raw:disk.raw", "--in-place"]);
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    assert!(fs::read(&image).unwrap() == content, "the disk is as it was");
}
