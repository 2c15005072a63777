//! What is shown while a copy runs: JSON lines, plain lines, or bars.

use std::fs;
use std::process::Stdio;

use serde_json::Value;

use crate::support::{Outcome, Process, TestEnv};

/// Longer than the second after which machines are told again.
const COPY: [&str; 5] = ["copy", "source.raw", "null:", "--rate-limit", "2M"];
const SIZE_BYTES: usize = 5 << 20;

#[test]
fn progress_is_lines_of_json_for_machines_plain_in_a_log_and_bars_on_a_terminal() {
    let env = TestEnv::new();
    fs::write(env.path("source.raw"), vec![0x5a; SIZE_BYTES]).unwrap();
    let json = env.spawn_vmbackup(&[&COPY[..], &["--json"]].concat());
    let plain = env.spawn_vmbackup(&COPY);
    let line = format!("{} {}", env!("CARGO_BIN_EXE_vmbackup"), COPY.join(" "));
    let mut bars = env.command("script");
    bars.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env("TERM", "xterm");
    let bars = Process::spawn(bars.stdin(Stdio::null()));
    is_json(json.wait().ok());
    is_plain(&plain.wait().ok());
    has_bars(&bars.wait().ok());
}

/// The fields of docs/json.md, in that order, and no others.
fn is_json(outcome: Outcome) {
    let lines: Vec<Value> =
        outcome.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names =
        |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    let progress: Vec<&Value> = lines.iter().filter(|line| line["type"] == "progress").collect();
    for line in &progress {
        let fields = ["type", "phase", "disks", "bytes_per_second", "seconds_left"];
        assert_eq!(names(line), fields, "{line}");
        assert!(line["phase"].as_str().is_some_and(|phase| !phase.is_empty()), "{line}");
    }
    let last = progress.iter().rfind(|line| line["phase"] == "copying").expect("it copied");
    let disk = &last["disks"][0];
    assert_eq!(names(disk), ["name", "total_bytes", "done_bytes", "read_bytes"], "{last}");
    assert_eq!((&disk["name"], &disk["total_bytes"]), (&"null:".into(), &SIZE_BYTES.into()));
    for of in ["done_bytes", "read_bytes"] {
        let bytes = disk[of].as_u64().unwrap();
        assert!((1..=SIZE_BYTES as u64).contains(&bytes), "{last}");
    }
    assert!(last["bytes_per_second"].as_u64().is_some_and(|rate| rate > 0), "{last}");
    assert!(last["seconds_left"].is_u64(), "{last}");
    assert_eq!(outcome.json()["document"], "copy");
}

fn is_plain(outcome: &Outcome) {
    assert!(outcome.stderr.lines().any(|line| line.starts_with("copying")), "{outcome:?}");
    assert!(!outcome.stderr.contains(['\u{1b}', '\r', '{']), "{outcome:?}");
}

/// `script` shows all of it on its standard output.
fn has_bars(outcome: &Outcome) {
    let screen = &outcome.stdout;
    assert!(screen.contains('\u{1b}'), "{outcome:?}");
    for shown in ["null:", "5.00 MiB", "MiB/s", "left"] {
        assert!(screen.contains(shown), "no {shown} in {outcome:?}");
    }
}
