//! What servers and files see of the options of a copy: connections, requests open at once, flushes,
//! space; and of those of `nbd bench` that have the same names.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::support::{NbdLog, NbdServer, Outcome, TestEnv, assert_same_content};

const MIB: usize = 1 << 20;

/// A raw file of data only, sixteen requests of 256 KiB.
fn source(env: &TestEnv) {
    fs::write(env.path("source.raw"), vec![0x5a; 4 * MIB]).unwrap();
}

/// nbdkit that takes its time for each read and write and logs what it is asked.
fn slow(env: &TestEnv, args: &[&str]) -> NbdServer {
    let front = ["--filter=log", "--filter=delay", "logfile=log", "rdelay=50ms", "wdelay=50ms"];
    let _ = fs::remove_file(env.path("log"));
    NbdServer::nbdkit(env, &[&front[..2], args, &front[2..]].concat())
}

/// What the server of [`slow`] was asked.
fn asked(env: &TestEnv) -> NbdLog {
    NbdLog::of(&env.path("log"))
}

#[test]
fn servers_get_as_many_connections_and_requests_at_once_as_was_said() {
    let env = TestEnv::new();
    source(&env);
    for (options, connections, on_one, on_all) in [
        (&["--connections", "4", "--requests", "3"][..], 4, 3, 12),
        (&["--connections", "1", "--requests", "2"], 1, 2, 2),
        (&["--connections", "3", "--requests", "2", "--retries", "1"], 3, 2, 6),
        (&["--requests", "5"], 2, 5, 10),
        (&["--synchronous"], 1, 1, 1),
        (&["--queue-size", "768k"], 2, 3, 3),
    ] {
        for (server, kind) in [(&["memory", "4M"][..], "Write"), (&["file", "source.raw"], "Read")]
        {
            // Whether all of them are open at once is a matter of time, too; that more are never is not.
            let reached = (0..3).any(|_| {
                let server = slow(&env, server);
                let uri = server.uri("");
                let (from, to) =
                    if kind == "Read" { (&*uri, "null:") } else { ("source.raw", &*uri) };
                let copy = ["copy", from, to, "--request-size", "256k"];
                env.vmbackup(&[&copy[..], options].concat()).ok();
                let asked = asked(&env);
                let case = format!("{options:?} {kind}: {}", asked.0);
                assert_eq!(asked.connections(), connections, "{case}");
                let open = asked.open(kind);
                assert!(open.0 <= on_one && open.1 <= on_all, "{open:?}, {case}");
                assert_eq!(asked.bytes(kind), 4 * MIB, "{case}");
                open.1 == on_all
            });
            assert!(reached, "{options:?} {kind}: never {on_all} at once");
        }
    }
}

#[test]
fn a_server_that_allows_one_connection_gets_one() {
    let env = TestEnv::new();
    source(&env);
    let server = slow(&env, &["--filter=multi-conn", "memory", "4M", "multi-conn-mode=disable"]);
    let args = ["copy", "source.raw", &server.uri(""), "--connections", "4", "--requests", "2"];
    env.vmbackup(&args).ok();
    assert_eq!(asked(&env).connections(), 1);
}

#[test]
fn a_benchmark_has_as_many_connections_and_requests_as_was_said() {
    let env = TestEnv::new();
    for (mode, connections) in [("plugin", 3), ("disable", 1)] {
        let mode = format!("multi-conn-mode={mode}");
        let reached = (0..3).any(|_| {
            let server = slow(&env, &["--filter=multi-conn", "memory", "4M", &mode]);
            let args = ["nbd", "bench", &server.uri(""), "--time", "1", "--request-size", "4k"];
            let how = ["--connections", "3", "--requests", "4", "--json"];
            let report = env.vmbackup(&[&args[..], &how].concat()).json();
            assert_eq!(report["connections"], connections, "{report}");
            assert_eq!(report["in_flight"], 4 * connections, "{report}");
            let asked = asked(&env);
            assert_eq!(asked.connections(), connections, "{mode}");
            let open = asked.open("Read");
            assert!(open.0 <= 4 && open.1 <= 4 * connections, "{mode}: {open:?}");
            open.1 == 4 * connections
        });
        assert!(reached, "{mode}: never all at once");
    }
}

#[test]
fn a_target_is_flushed_after_its_last_write_unless_told_not_to() {
    let env = TestEnv::new();
    source(&env);
    for (options, flushed) in [(&[][..], true), (&["--flush"], true), (&["--no-flush"], false)] {
        let server = slow(&env, &["memory", "4M"]);
        let args = ["copy", "source.raw", &server.uri(""), "--json"];
        let report = env.vmbackup(&[&args[..], options].concat()).json();
        assert_eq!(report["durable"], flushed, "{options:?}");
        let asked = asked(&env);
        let lines: Vec<&str> = asked.0.lines().collect();
        let last = lines.iter().rposition(|line| line.contains(" ...Write id=")).unwrap();
        let after = lines[last..].iter().filter(|line| line.contains(" Flush id=")).count();
        assert_eq!(after > 0, flushed, "{options:?}: {}", asked.0);
        assert_eq!(asked.requests("Flush").count(), after, "{options:?}: {}", asked.0);
        assert!(!asked.0.contains("fua=1"), "{options:?}: {}", asked.0);
        for target in ["new.raw", "new.qcow2"] {
            let args = ["copy", "source.raw", target, "--force", "--json"];
            let report = env.vmbackup(&[&args[..], options].concat()).json();
            assert_eq!(report["durable"], flushed, "{options:?} {target}");
        }
    }
}

/// A server that is not told how to flush.
const NO_FLUSH: [&str; 5] =
    ["eval", "get_size=echo 4M", "can_write=exit 0", "pread=exit 1", "pwrite=cat >/dev/null"];

#[test]
fn a_target_that_cannot_flush_is_refused_before_the_first_write_if_it_has_to() {
    let env = TestEnv::new();
    source(&env);
    let server = slow(&env, &NO_FLUSH);
    let uri = server.uri("");
    for (from, options) in
        [("source.raw", &[][..]), ("source.raw", &["--retries", "1"]), ("-", &[])]
    {
        let args = [&["copy", from, &uri, "--flush"][..], options].concat();
        let mut command = env.vmbackup_command(&args);
        command.stdin(fs::File::open(env.path("source.raw")).unwrap());
        let outcome = Outcome::of(&mut command);
        assert_eq!(outcome.code, Some(8), "{outcome:?}");
        // Nothing was written, and nothing else is said.
        assert!(!outcome.stderr.contains("written in part"), "{outcome:?}");
        assert!(!outcome.stderr.contains("failed after"), "{outcome:?}");
        outcome.fails_with(&[&format!("{uri} cannot be flushed"), "leave out --flush"]);
    }
    assert_eq!(asked(&env).requests("Write").count(), 0);
}

#[test]
fn a_target_that_cannot_flush_gets_the_disk_with_a_warning() {
    let env = TestEnv::new();
    source(&env);
    let server = slow(&env, &NO_FLUSH);
    let warning = "cannot be flushed: what was written may be lost in a power cut";
    for (options, warned) in [(&[][..], true), (&["--no-flush"], false)] {
        let args = ["copy", "source.raw", &server.uri(""), "--json"];
        let outcome = env.vmbackup(&[&args[..], options].concat()).ok();
        assert_eq!(outcome.stderr.contains(warning), warned, "{options:?}: {outcome:?}");
        assert_eq!(outcome.json()["durable"], false, "{options:?}");
    }
}

/// QEMU makes zeroes that are to stay allocated a mark in the tables of some formats where nothing is
/// allocated yet: a copy with `--allocated` once took no space.
#[test]
fn allocated_zeroes_take_space_whatever_the_format() {
    let env = TestEnv::new();
    source(&env);
    let file = fs::OpenOptions::new().write(true).open(env.path("source.raw")).unwrap();
    file.set_len(12 << 20).unwrap();
    for format in ["raw", "qcow2", "qed", "parallels", "vmdk", "vdi", "vpc", "vhdx"] {
        let target = format!("{format}:new");
        let taken = |options: &[&str]| {
            env.vmbackup(&[&["copy", "source.raw", &target, "--force"][..], options].concat()).ok();
            assert_same_content(&env, (&env.path("source.raw"), "raw"), (&env.path("new"), format));
            env.path("new").metadata().unwrap().blocks() * 512
        };
        let (sparse, allocated) = (taken(&[]), taken(&["--allocated"]));
        assert!(sparse < 8 << 20, "{format}: {sparse}");
        assert!(allocated >= 12 << 20, "{format}: {allocated}");
    }
    env.run("qemu-img", &["create", "-q", "-f", "qcow2", "there.qcow2", "12M"]).ok();
    env.vmbackup(&["copy", "source.raw", "there.qcow2", "--in-place", "--allocated"]).ok();
    let taken = env.path("there.qcow2").metadata().unwrap().blocks() * 512;
    assert!(taken >= 12 << 20, "in place: {taken}");
}

#[test]
fn a_copy_that_is_verified_reads_its_source_once() {
    let env = TestEnv::new();
    source(&env);
    // To a target that has to be cleared, a block of the source tells whether both are one disk.
    let cleared = NbdServer::nbdkit(&env, &["--filter=noextents", "memory", "4M"]);
    for (target, more) in [("new.raw", 0), ("new.qcow2", 0), (&*cleared.uri(""), 8192)] {
        let server = slow(&env, &["file", "source.raw"]);
        let report = env.vmbackup(&["copy", &server.uri(""), target, "--verify", "--json"]).json();
        assert_eq!(report["content_root"], env.vmbackup(&["hash", "source.raw"]).text().as_str());
        let read = asked(&env).bytes("Read");
        assert!((4 * MIB..=4 * MIB + more).contains(&read), "{target}: {read}");
    }
}
