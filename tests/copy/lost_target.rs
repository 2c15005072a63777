//! Targets that are lost in the middle of a copy and come back: with all they were given, with what
//! they had made durable, or with nothing.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::support::{Outcome, Process, TestEnv, wait_until};

const MIB: u32 = 1 << 20;

/// Bytes that tell where they are from, with holes.
fn source(env: &TestEnv, mib: u32) -> Vec<u8> {
    let mut bytes: Vec<u8> = (1..=mib * MIB / 4).flat_map(u32::to_le_bytes).collect();
    for hole in bytes.chunks_mut(3 << 20).filter(|chunk| chunk.len() == 3 << 20) {
        hole[1 << 20..2 << 20].fill(0);
    }
    fs::write(env.path("source.raw"), &bytes).unwrap();
    bytes
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

/// A server on the socket `s`, which may have been another's.
fn server(env: &TestEnv, program: &str, args: &[&str]) -> Process {
    let _ = fs::remove_file(env.path("s"));
    let mut process = Process::spawn(env.command(program).args(args));
    wait_until("the server's socket", 20, || {
        assert!(process.is_running(), "{program} ended at once: {args:?}");
        UnixStream::connect(env.path("s")).is_ok()
    });
    process
}

/// nbdkit, slow enough to be ended in the middle of a copy, with a log of its requests.
fn nbdkit(env: &TestEnv, args: &[&str]) -> Process {
    let _ = fs::remove_file(env.path("log"));
    let (socket, log) = (env.path("s"), format!("logfile={}", env.path("log").display()));
    let front = ["-f", "-U", socket.to_str().unwrap(), "--filter=log", "--filter=delay"];
    server(env, "nbdkit", &[&front, args, &["wdelay=20ms", &log]].concat())
}

/// Waits until nbdkit has answered so many requests of a kind.
fn answered(env: &TestEnv, what: &str, count: usize) {
    let what = format!("...{what} ");
    wait_until("the middle of the copy", 60, || {
        let log = fs::read_to_string(env.path("log")).unwrap_or_default();
        log.lines().filter(|line| line.contains(&what)).count() >= count
    });
}

/// A copy to the socket `s` that takes a while.
fn slow_copy(env: &TestEnv, options: &[&str]) -> Process {
    let to = uri(&env.path("s"));
    let one = ["--connections", "1", "--requests", "4", "--request-size", "256k"];
    env.spawn_vmbackup(&[&["copy", "source.raw", &to], &one[..], options].concat())
}

/// Passes connections on to `to`, and cuts as many as `cuts` says after so many bytes written.
fn cutting_proxy(at: &Path, to: PathBuf, cuts: &Arc<AtomicU32>, after_bytes: usize) {
    let listener = UnixListener::bind(at).unwrap();
    let cuts = Arc::clone(cuts);
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let server = UnixStream::connect(&to).unwrap();
            let (mut from, mut back) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut back);
                let _ = back.shutdown(Shutdown::Both);
            });
            let cuts = Arc::clone(&cuts);
            std::thread::spawn(move || pass_on(client, server, &cuts, after_bytes));
        }
    });
}

fn pass_on(mut client: UnixStream, mut server: UnixStream, cuts: &AtomicU32, after_bytes: usize) {
    let (mut piece, mut passed) = (vec![0; 64 << 10], 0);
    while let Ok(len @ 1..) = client.read(&mut piece) {
        passed += len;
        let cut = |left: u32| left.checked_sub(1);
        let now = passed >= after_bytes;
        if now && cuts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, cut).is_ok() {
            break;
        }
        if server.write_all(&piece[..len]).is_err() {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}

const RETRY: [&str; 4] = ["--retries", "5", "--retry-delay", "1"];

#[test]
fn a_target_whose_connections_are_cut_gets_all_of_the_disk() {
    for program in ["qemu-nbd", "nbdkit"] {
        let env = TestEnv::new();
        let content = source(&env, 48);
        let target = env.path("target.raw");
        fs::write(&target, vec![0xee; content.len()]).unwrap();
        let (socket, path) = (env.path("s"), target.to_str().unwrap());
        let socket = socket.to_str().unwrap();
        let _server = match program {
            "nbdkit" => server(&env, program, &["-f", "-U", socket, "file", path]),
            _ => server(
                &env,
                program,
                &["-t", "-e", "16", "-f", "raw", "--discard=unmap", "-k", socket, path],
            ),
        };
        let cuts = Arc::new(AtomicU32::new(3));
        cutting_proxy(&env.path("proxy"), env.path("s"), &cuts, 6 << 20);
        let to = uri(&env.path("proxy"));
        let args = [&["copy", "source.raw", &to, "--verify"], &RETRY[..]].concat();
        let outcome = env.vmbackup(&args).ok();
        assert_eq!(cuts.load(Ordering::SeqCst), 0, "{program}: {outcome:?}");
        assert!(outcome.stderr.contains("was lost"), "{program}: {outcome:?}");
        assert!(fs::read(&target).unwrap() == content, "{program}");
    }
}

/// Copies to nbdkit on the socket `s`, ends it with SIGKILL when it is `ready`, and starts it again.
fn copy_over_a_crash(
    env: &TestEnv,
    args: &[&str],
    ready: impl FnOnce(),
    options: &[&str],
) -> (Outcome, Process) {
    let first = nbdkit(env, args);
    let copy = slow_copy(env, &[&RETRY, options].concat());
    ready();
    first.signal("KILL");
    drop(first);
    let second = nbdkit(env, args);
    (copy.wait(), second)
}

/// Waits until a copy has made something durable, and knows.
fn flushed(env: &TestEnv) {
    answered(env, "Flush", 1);
    std::thread::sleep(Duration::from_millis(200));
}

/// What is written stays in nbdkit's own cache until it is flushed, and dies with nbdkit.
#[test]
fn a_target_that_lost_what_was_not_durable_is_given_it_again() {
    for mib in [48, 144] {
        let env = TestEnv::new();
        let content = source(&env, mib);
        let target = env.path("target.raw");
        // Not zero, so that a hole left out shows.
        fs::write(&target, vec![0xee; content.len()]).unwrap();
        let args = ["--filter=cache", "file", target.to_str().unwrap(), "cache=writeback"];
        let ready = || match mib {
            48 => answered(&env, "Write", 20),
            _ => flushed(&env),
        };
        let (outcome, second) = copy_over_a_crash(&env, &args, ready, &["--verify"]);
        let outcome = outcome.ok();
        assert!(outcome.stderr.contains("was lost"), "it was ended in the middle: {outcome:?}");
        // Durable means that it is in the file whatever becomes of the server.
        second.signal("KILL");
        drop(second);
        assert!(fs::read(&target).unwrap() == content, "{mib}");
    }
}

/// nbdkit's memory disk answers to a flush and keeps nothing. The disk is larger than the log, so
/// that part of it counts as durable when the server goes.
#[test]
fn a_target_that_comes_back_without_what_was_durable_ends_the_copy() {
    let env = TestEnv::new();
    source(&env, 144);
    let (outcome, _server) = copy_over_a_crash(&env, &["memory", "144M"], || flushed(&env), &[]);
    assert_eq!(outcome.code, Some(18), "{outcome:?}");
    outcome.fails_with(&["cannot write again", "without what it had made durable"]);
}

/// A disk of another size must not take the rest of the copy.
#[test]
fn a_target_that_stays_away_or_comes_back_as_another_ends_the_copy() {
    for (next, code, said) in
        [(None, 13, "2 attempts to go on failed"), (Some("49M"), 18, "another export")]
    {
        let env = TestEnv::new();
        source(&env, 48);
        let first = nbdkit(&env, &["memory", "48M"]);
        let copy = slow_copy(&env, &["--retries", "2", "--retry-delay", "1"]);
        answered(&env, "Write", 20);
        drop(first);
        let _second = next.map(|size| nbdkit(&env, &["memory", size]));
        let outcome = copy.wait();
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        outcome.fails_with(&["cannot write", said]);
    }
}

/// Nobody knows what a server without flush has kept, so all of it is written again, as far as it is
/// still known.
#[test]
fn a_target_that_cannot_flush_goes_on_as_far_as_memory_reaches() {
    for (mib, cut_mib, code) in [(12, 6, 0), (114, 72, 13)] {
        let env = TestEnv::new();
        let content = source(&env, mib);
        let target = env.path("target.raw");
        fs::write(&target, vec![0xee; content.len()]).unwrap();
        let (socket, file) = (env.path("s"), target.display());
        let scripts = [
            format!("get_size=stat -c %s {file}"),
            format!("pread=dd if={file} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none"),
            format!("pwrite=dd of={file} oflag=seek_bytes seek=$4 conv=notrunc bs=1M status=none"),
            "can_write=exit 0".to_owned(),
        ];
        let front = ["-f", "-U", socket.to_str().unwrap(), "eval"];
        let scripts: Vec<&str> = scripts.iter().map(String::as_str).collect();
        let _server = server(&env, "nbdkit", &[&front, &scripts[..]].concat());
        let cuts = Arc::new(AtomicU32::new(1));
        cutting_proxy(&env.path("proxy"), socket.clone(), &cuts, cut_mib << 20);
        let to = uri(&env.path("proxy"));
        let outcome = env
            .vmbackup(&[&["copy", "source.raw", &to, "--request-size", "1M"], &RETRY[..]].concat());
        assert_eq!(cuts.load(Ordering::SeqCst), 0, "it was cut: {outcome:?}");
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        if code == 0 {
            assert!(fs::read(&target).unwrap() == content);
        } else {
            outcome.fails_with(&["the server has no flush", "the copy failed after"]);
        }
    }
}
