//! The case study of "Making the Most of NBD" (Blake and Jones): what zeroes cost, in requests.
//!
//! The source is a qcow2 image of 100 MiB in which every other MiB is data. The destination is
//! nbdkit's memory disk behind filters that make zeroing impossible, slow, or fast, that delay each
//! write, that hide what it holds, and that count.

use std::fs;
use std::path::PathBuf;

use crate::support::{NbdServer, TestEnv};

const MIB: u64 = 1 << 20;
const DISK_MIB: u64 = 100;

/// What reached the destination.
#[derive(Debug)]
struct Counts {
    /// Writes and zero requests as the copy made them.
    sent: (usize, usize),
    /// Writes that the disk saw, which includes zeroes that the server writes itself.
    stored: usize,
    /// What the copy says it wrote as data.
    written_bytes: u64,
}

impl Counts {
    /// Requires at most so many writes of the copy (their size follows what the server takes),
    /// and exactly so many zero requests of it and writes of 256 KiB at the disk.
    #[track_caller]
    fn are(&self, (sent_max, zeroes): (usize, usize), stored: usize) {
        assert!(self.sent.0 <= sent_max, "{self:?}");
        assert_eq!((self.sent.1, self.stored), (zeroes, stored), "{self:?}");
    }
}

/// Every other MiB is data, in qcow2; and the same as a raw file.
struct Source {
    _env: TestEnv,
    raw: PathBuf,
    qcow2: PathBuf,
}

impl Source {
    fn new() -> Self {
        let env = TestEnv::new();
        let (raw, qcow2) = (env.path("source.raw"), env.path("source.qcow2"));
        let mut bytes = vec![0; usize::try_from(DISK_MIB * MIB).unwrap()];
        let data = bytes.chunks_mut(1 << 20).enumerate().filter(|(index, _)| index % 2 == 0);
        for (index, block) in data {
            block.fill(u8::try_from(index).unwrap() | 1);
        }
        fs::write(&raw, &bytes).unwrap();
        let (from, to) = (raw.to_str().unwrap(), qcow2.to_str().unwrap());
        env.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", from, to]).ok();
        Self { _env: env, raw, qcow2 }
    }
}

/// Copies to a memory disk behind `nozero` in these modes; what it cost.
fn copy(source: &Source, modes: (&str, &str), server: &[&str], options: &[&str]) -> Counts {
    let env = TestEnv::new();
    let Source { raw, qcow2, .. } = source;
    let (stats, log) = (env.path("stats"), env.path("log"));
    let parameters = [
        format!("zeromode={}", modes.0),
        format!("fastzeromode={}", modes.1),
        format!("statsfile={}", stats.display()),
        format!("logfile={}", log.display()),
    ];
    let mut args = vec!["--filter=log", "--filter=nozero", "--filter=blocksize", "--filter=delay"];
    args.push("--filter=stats");
    args.extend(server);
    args.extend(["memory", "100M", "maxdata=256k", "wdelay=5ms"]);
    args.extend(parameters.iter().map(String::as_str));
    let nbdkit = NbdServer::nbdkit(&env, &args);
    let uri = nbdkit.uri("");
    let mut command = vec!["copy", qcow2.to_str().unwrap(), &uri, "--json"];
    command.extend(options);
    let report = env.vmbackup(&command).json();
    // The proof before the counts: a copy that leaves out too much is cheap.
    let counted = fs::read_to_string(&log).unwrap();
    let compare = ["compare", "-f", "raw", "-F", "raw", raw.to_str().unwrap(), &uri];
    env.run("qemu-img", &compare).ok();
    end(nbdkit);
    let sent =
        |name: &str| counted.lines().filter(|line| line.contains(&format!(" {name} id="))).count();
    // What a trim leaves need not read as zero.
    assert_eq!(sent("Trim"), 0, "{counted}");
    let stats = fs::read_to_string(&stats).unwrap();
    let stored = stats.lines().find_map(|line| line.strip_prefix("write: "));
    let stored = stored.map_or(0, |rest| rest.split_once(' ').unwrap().0.parse().unwrap());
    let written_bytes = report["written_bytes"].as_u64().unwrap();
    Counts { sent: (sent("Write"), sent("Zero")), stored, written_bytes }
}

/// Ends a server, which then writes its statistics.
fn end(mut server: NbdServer) {
    server.process().signal("TERM");
    crate::support::wait_until("the end of nbdkit", 20, || !server.process().is_running());
}

const HIDDEN: [&str; 1] = ["--filter=noextents"];
/// What the filter makes of requests that are to be done only if they are fast.
const FAST_MODES: [&str; 3] = ["none", "default", "ignore"];

#[test]
fn where_zeroing_does_not_exist_zeroes_are_written_as_data_once() {
    let source = Source::new();
    for fast in FAST_MODES {
        let counts = copy(&source, ("none", fast), &HIDDEN, &[]);
        assert_eq!(counts.sent.1, 0, "{fast}: {counts:?}");
        assert_eq!(counts.stored, 400, "{fast}: {counts:?}");
    }
}

#[test]
fn where_it_is_not_said_to_be_fast_each_hole_is_zeroed() {
    let source = Source::new();
    let counts = copy(&source, ("plugin", "none"), &HIDDEN, &[]);
    counts.are((200, 50), 200);
}

#[test]
fn where_it_is_fast_all_is_zeroed_in_advance() {
    let source = Source::new();
    for fast in ["default", "ignore"] {
        let counts = copy(&source, ("plugin", fast), &HIDDEN, &[]);
        assert!(counts.sent.1 <= 4, "{fast}: {counts:?}");
        counts.are((200, counts.sent.1), 200);
    }
}

#[test]
fn where_the_server_emulates_zeroes_nothing_is_cleared_in_advance() {
    let source = Source::new();
    for fast in FAST_MODES {
        let counts = copy(&source, ("emulate", fast), &HIDDEN, &[]);
        // nbdkit turns the 50 zero requests into writes before its filters, the disk sees 400.
        counts.are((250, 0), 400);
        // That many writes could be the copy's own zeroes.
        assert_eq!(counts.written_bytes, 50 * MIB, "{fast}");
    }
}

#[test]
fn a_destination_known_to_be_zero_gets_no_zeroes() {
    let source = Source::new();
    for mode in ["none", "plugin", "emulate"] {
        for fast in FAST_MODES {
            let counts = copy(&source, (mode, fast), &HIDDEN, &["--destination-is-zero"]);
            counts.are((200, 0), 200);
        }
    }
}

#[test]
fn a_destination_that_says_it_is_zero_gets_no_zeroes() {
    let source = Source::new();
    for mode in ["none", "plugin", "emulate"] {
        for fast in FAST_MODES {
            let counts = copy(&source, (mode, fast), &[], &[]);
            counts.are((200, 0), 200);
        }
    }
}

#[test]
fn allocated_zeroes_are_made_hole_by_hole_and_never_in_advance() {
    let source = Source::new();
    let counts = copy(&source, ("plugin", "default"), &[], &["--allocated"]);
    counts.are((200, 50), 200);
}
