//! Images, and the ways in which clients start the server themselves.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::Stdio;

use crate::rig::{DISK_BYTES, Serve, content, qemu_io, read};
use crate::support::{Process, TestEnv, wait_until};

fn env() -> TestEnv {
    let env = TestEnv::new();
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    env
}

#[test]
fn a_raw_image_is_written_in_place_by_one_server_at_a_time() {
    let env = env();
    let serve = Serve::start(&env, &["disk.raw", "--writable"]);
    let uri = serve.uri(0);
    qemu_io(&env, &uri, &["write -f -P 7 1000 5000", "write -z -u 3M 64k"]).ok();
    for second in [&["serve", "disk.raw", "--writable"][..], &["serve", "disk.raw"]] {
        assert_eq!(env.vmbackup(second).code, Some(7), "{second:?}");
    }
    let locked = qemu_io(&env, "disk.raw", &["write -P 9 0 512"]);
    assert_ne!(locked.code, Some(0), "QEMU sees that it is written: {locked:?}");
    serve.stop();
    let mut expected = content(1);
    expected[1000..6000].fill(7);
    expected[3 << 20..(3 << 20) + 65536].fill(0);
    assert!(std::fs::read(env.path("disk.raw")).unwrap() == expected);
}

/// As nbdkit serves it; who needs whole sectors reads zeroes behind the end, as QEMU does.
#[test]
fn a_raw_image_is_served_as_long_as_it_is() {
    let env = env();
    let odd = content(1)[..1_000_001].to_vec();
    std::fs::write(env.path("odd.raw"), &odd).unwrap();
    for how in [&["odd.raw"][..], &["odd.raw", "--writable"]] {
        let serve = Serve::start(&env, how);
        let uri = serve.uri(0);
        assert_eq!(env.run("nbdinfo", &["--size", &uri]).text(), "1000001", "{how:?}");
        assert!(read(&env, &uri) == odd, "{how:?}");
        env.run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, "out"]).ok();
        let mut expected = odd.clone();
        expected.resize(1_000_448, 0);
        assert!(std::fs::read(env.path("out")).unwrap() == expected, "as QEMU sees it");
        serve.stop();
    }
    assert!(std::fs::read(env.path("odd.raw")).unwrap() == odd);
}

/// A file system with a file `nbd` of a MiB, whose syncs fail while `env`'s file `failing` is there.
struct Unsound {
    directory: PathBuf,
    _server: Process,
}

impl Unsound {
    fn mount(env: &TestEnv) -> Self {
        let directory = env.path("unsound");
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(env.path("content"), vec![0; 1 << 20]).unwrap();
        let (content, failing) = (env.path("content"), env.path("failing"));
        let (content, failing) = (content.display(), failing.display());
        let mut command = env.command("nbdfuse");
        command.arg(&directory).args(["--command", "nbdkit", "-s", "--exit-with-parent", "eval"]);
        command.args(["get_size=echo 1M", "can_write=exit 0", "can_flush=exit 0"]);
        command.arg(format!("pread=dd if={content} iflag=skip_bytes,count_bytes skip=$4 count=$3"));
        command.arg(format!("pwrite=dd of={content} oflag=seek_bytes conv=notrunc seek=$4"));
        let syncs = env.path("syncs");
        let count = format!("echo sync >>{}", syncs.display());
        command.arg(format!("flush={count}; if [ -e {failing} ]; then echo EIO >&2; exit 1; fi"));
        let server = Process::spawn(&mut command);
        wait_until("the mount", 60, || directory.join("nbd").exists());
        Self { directory, _server: server }
    }
}

impl Drop for Unsound {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.directory).status();
    }
}

#[test]
fn after_a_flush_that_failed_none_is_answered_with_success() {
    let env = TestEnv::new();
    let unsound = Unsound::mount(&env);
    let serve = Serve::start(&env, &["unsound/nbd,format=raw", "--writable"]);
    let uri = serve.uri(0);
    qemu_io(&env, &uri, &["write -P 7 0 4096", "flush"]).ok();
    std::fs::write(env.path("failing"), "").unwrap();
    assert_ne!(qemu_io(&env, &uri, &["write -P 8 0 4096", "flush"]).code, Some(0));
    std::fs::remove_file(env.path("failing")).unwrap();
    // Linux would tell the second client that all is well: it told the first that it is not.
    assert_ne!(qemu_io(&env, &uri, &["write -P 9 8192 4096", "flush"]).code, Some(0));
    let said = serve.stop_with(20);
    assert!(said.contains("a sync of it failed"), "{said}");
    drop(unsound);
}

/// How often the file system of [`Unsound`] was told to sync while libnbd did this to a served file of
/// it, with a connection `h`, and `h2` beside it. They stay open: nothing is flushed at an end.
fn syncs_of(commands: &str) -> usize {
    let env = TestEnv::new();
    let _unsound = Unsound::mount(&env);
    let serve = Serve::start(&env, &["unsound/nbd,format=raw", "--writable"]);
    let (uri, log) = (serve.uri(0), env.path("syncs"));
    let script = format!(
        "import os, nbd\nh, h2 = nbd.NBD(), nbd.NBD()\n\
         h.connect_uri('{uri}')\nh2.connect_uri('{uri}')\nassert h.can_multi_conn()\n\
         count = lambda: open('{log}').read().count('sync') if os.path.exists('{log}') else 0\n\
         before = count()\n{commands}\nprint(count() - before)\n",
        log = log.display()
    );
    let outcome = env.run("/usr/bin/python3", &["-c", &script]).ok();
    outcome.stdout.trim().parse().unwrap()
}

#[test]
fn a_write_is_synced_before_it_is_answered_if_it_is_to_be_durable_and_only_then() {
    assert_eq!(syncs_of("h.pwrite(b'x' * 4096, 0)"), 0);
    assert!(syncs_of("h.pwrite(b'x' * 4096, 0, nbd.CMD_FLAG_FUA)") > 0);
}

#[test]
fn a_flush_syncs_what_was_written_over_another_connection() {
    assert!(syncs_of("h.pwrite(b'x' * 4096, 0)\nh2.flush()") > 0);
}

#[test]
fn zeroes_become_holes_unless_they_are_to_stay_allocated() {
    use std::os::unix::fs::MetadataExt;
    let env = TestEnv::new();
    std::fs::write(env.path("disk.raw"), vec![7; 4 << 20]).unwrap();
    let serve = Serve::start(&env, &["disk.raw", "--writable"]);
    let allocated = || std::fs::metadata(env.path("disk.raw")).unwrap().blocks() * 512;
    let full = allocated();
    assert!(full >= 4 << 20);
    // NO_HOLE without -u.
    qemu_io(&env, &serve.uri(0), &["write -z 1M 1M", "flush"]).ok();
    assert_eq!(allocated(), full);
    env.run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", "write -z -u 2M 1M", &serve.uri(0)])
        .ok();
    assert!(allocated() <= full - (1 << 20), "{} of {full}", allocated());
    serve.stop();
    let content = std::fs::read(env.path("disk.raw")).unwrap();
    assert!(content[1 << 20..3 << 20].iter().all(|byte| *byte == 0));
    assert!(content[..1 << 20].iter().chain(&content[3 << 20..]).all(|byte| *byte == 7));
}

#[test]
fn other_formats_are_read_and_not_written() {
    let env = env();
    env.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "d.qcow2"]).ok();
    assert_eq!(env.vmbackup(&["serve", "d.qcow2", "--writable"]).code, Some(8));
    let serve = Serve::start(&env, &["d.qcow2"]);
    assert!(read(&env, &serve.uri(0)) == content(1));
    // And through another server of ours.
    let second = Serve::start(&env, &[&serve.uri(0), "--socket", "second"]);
    assert!(read(&env, &second.uri(0)) == content(1));
}

#[test]
fn clients_start_it_by_socket_activation() {
    let env = env();
    let program = env!("CARGO_BIN_EXE_vmbackup");
    let mut command = env.vmbackup_command::<&str>(&[]);
    let variables: Vec<_> =
        command.get_envs().map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned))).collect();
    command = env.command("nbdcopy");
    command.envs(variables.into_iter().filter_map(|(key, value)| Some((key, value?))));
    command.args(["--", "[", program, "serve", "disk.raw", "]", "out"]);
    crate::support::Outcome::of(&mut command).ok();
    assert!(std::fs::read(env.path("out")).unwrap() == content(1));
}

#[test]
fn standard_streams_without_a_client_are_refused_in_plain_words() {
    let env = env();
    let file = |name: &str| std::fs::File::create(env.path(name)).unwrap();
    let serve = || env.vmbackup_command(&["serve", "--stdio", "disk.raw"]);
    let run = |command: &mut std::process::Command| crate::support::Outcome::of(command);
    let null = std::process::Stdio::null;
    for (outcome, said) in [
        (run(serve().stdin(null())), "standard input is a device"),
        (run(serve().stdin(file("in"))), "standard input is a file"),
        (
            {
                let mut command = serve();
                // The pipe's writer stays with us until it has ended.
                let (reader, _writer) = std::io::pipe().unwrap();
                let output = command.stdin(reader).stdout(file("out")).output().unwrap();
                crate::support::Outcome::from_output("serve".into(), &output)
            },
            "standard output is a file",
        ),
    ] {
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        outcome.fails_with(&[said, "--stdio"]);
    }
}

#[test]
fn clients_start_it_on_standard_input_and_output() {
    let env = env();
    let program = env!("CARGO_BIN_EXE_vmbackup");
    // A socket pair, as libnbd makes it, and two pipes.
    let script = format!(
        "import nbd\nh = nbd.NBD()\n\
         h.connect_command(['{program}', 'serve', '--stdio', 'disk.raw'])\n\
         assert h.get_size() == {DISK_BYTES}\n\
         open('out', 'wb').write(h.pread(65536, 0))\nh.shutdown()\n"
    );
    env.run("/usr/bin/python3", &["-c", &script]).ok();
    assert!(std::fs::read(env.path("out")).unwrap() == content(1)[..65536]);
    let mut command = env.command("bash");
    // Client flags, then ABORT: the greeting and an ACK come back.
    let abort = "\\x00\\x00\\x00\\x03IHAVEOPT\\x00\\x00\\x00\\x02\\x00\\x00\\x00\\x00";
    let line = format!("printf '{abort}' | {program} serve --stdio disk.raw | wc -c");
    let outcome = crate::support::Outcome::of(command.args(["-c", &line])).ok();
    assert_eq!(outcome.stdout.trim(), "38");
}

/// The beginning of a session without NBD_OPT_GO (NBD protocol, "fixed newstyle negotiation"): the size
/// of the default export.
fn begin(to_server: &mut impl Write, from_server: &mut impl Read) -> u64 {
    let mut greeting = [0; 18];
    from_server.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    let option = [&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 0]].concat();
    to_server.write_all(&option).unwrap();
    let mut export = [0; 10];
    from_server.read_exact(&mut export).unwrap();
    u64::from_be_bytes(export[..8].try_into().unwrap())
}

/// A request, and what it is answered with that many bytes.
fn ask(
    (to_server, from_server): (&mut impl Write, &mut impl Read),
    (command, offset, len): (u16, u64, u32),
    data: &[u8],
) -> Vec<u8> {
    let cookie = offset.to_be_bytes();
    let head = [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0], &command.to_be_bytes(), &cookie];
    let request = [&head.concat()[..], &offset.to_be_bytes(), &len.to_be_bytes(), data].concat();
    to_server.write_all(&request).unwrap();
    let mut reply = [0; 16];
    from_server.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "simple, without an error");
    assert_eq!(reply[8..], cookie);
    let mut bytes = vec![0; if command == 0 { len as usize } else { 0 }];
    from_server.read_exact(&mut bytes).unwrap();
    bytes
}

/// A pipe holds 64 KiB: what is more has to wait, in both directions.
#[test]
fn data_goes_through_two_pipes_in_both_directions() {
    let env = env();
    let mut command = env.vmbackup_command(&["serve", "--stdio", "--writable", "disk.raw"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut expected = content(1);
    assert_eq!(begin(&mut to, &mut from), expected.len() as u64);
    let len = u32::try_from(expected.len()).unwrap();
    let (read, write, flush) = (0, 1, 3);
    assert!(ask((&mut to, &mut from), (read, 0, len), &[]) == expected);
    expected[1 << 20..4 << 20].fill(7);
    ask((&mut to, &mut from), (write, 1 << 20, 3 << 20), &expected[1 << 20..4 << 20]);
    ask((&mut to, &mut from), (flush, 0, 0), &[]);
    assert!(std::fs::read(env.path("disk.raw")).unwrap() == expected);
    assert!(ask((&mut to, &mut from), (read, 0, len), &[]) == expected);
    let bye = [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, 2], &[0; 20]].concat();
    to.write_all(&bye).unwrap();
    let mut rest = Vec::new();
    from.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "{rest:?}");
    assert!(child.wait().unwrap().success());
}

/// Starts `vmbackup serve disk.raw` as systemd does for a unit with two sockets: `unix` and a port of
/// `address`, which is written to `port`.
fn activated(env: &TestEnv, address: &str) -> Process {
    let socket = env.path("unix").display().to_string();
    let script = format!(
        "import os, socket, sys\n\
         u, t = socket.socket(socket.AF_UNIX), socket.socket()\n\
         u.bind('{socket}')\nt.bind(('{address}', 0))\n\
         open('port', 'w').write(str(t.getsockname()[1]))\n\
         for s in u, t: s.listen()\n\
         for n, s in enumerate([u, t]): os.dup2(s.fileno(), 20 + n)\n\
         for n in 3, 4: os.dup2(17 + n, n)\n\
         os.environ.update(LISTEN_FDS='2', LISTEN_PID=str(os.getpid()))\n\
         os.execv(sys.argv[1], sys.argv[1:])"
    );
    let program = env!("CARGO_BIN_EXE_vmbackup");
    let mut command = env.command("/usr/bin/python3");
    command.env("VMBACKUP_STATE_DIR", env.path("state"));
    Process::spawn(command.args(["-c", &script, program, "serve", "disk.raw"]))
}

#[test]
fn all_sockets_of_an_activation_are_served() {
    let env = env();
    let server = activated(&env, "127.0.0.1");
    wait_until("the socket", 20, || crate::support::is_listening(&env.path("unix")));
    let port = std::fs::read_to_string(env.path("port")).unwrap();
    let unix = format!("nbd+unix:///?socket={}", env.path("unix").display());
    for uri in [unix, format!("nbd://127.0.0.1:{port}/")] {
        // Who connects to a socket that nobody serves waits for ever.
        env.run("timeout", &["20", "nbdinfo", "--size", &uri]).ok();
        assert!(read(&env, &uri) == content(1), "{uri}");
    }
    server.signal("TERM");
    server.wait().ok();
}

#[test]
fn an_activation_that_shows_the_disk_to_other_hosts_is_refused() {
    let env = env();
    let mut server = activated(&env, "0.0.0.0");
    wait_until("the refusal", 20, || !server.is_running());
    let outcome = server.wait();
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    outcome.fails_with(&["can be reached by other hosts", "--insecure-tcp"]);
}
