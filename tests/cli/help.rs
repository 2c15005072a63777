//! The help texts are an interface: what they say changes on purpose only.
//!
//! After a wanted change run the test with `VMBACKUP_UPDATE_SNAPSHOTS=1` and read the difference.

use std::path::Path;

use crate::support::TestEnv;

const COMMANDS: [&str; 31] = [
    "",
    "full",
    "incremental",
    "backup",
    "plan",
    "list",
    "show",
    "restore",
    "serve",
    "verify",
    "hash",
    "copy",
    "check",
    "forget",
    "gc",
    "recover",
    "nbd",
    "nbd info",
    "nbd list",
    "nbd map",
    "nbd read",
    "nbd write",
    "nbd zero",
    "nbd trim",
    "nbd flush",
    "nbd bench",
    "repo",
    "repo init",
    "repo info",
    "repo key add",
    "repo key remove",
];

#[test]
fn every_command_explains_itself_in_the_recorded_words() {
    let env = TestEnv::new();
    let mut changed = Vec::new();
    for command in COMMANDS {
        let mut args: Vec<&str> = command.split_whitespace().collect();
        args.push("--help");
        // The test's own environment must not show up in the text.
        let mut process = env.vmbackup_command(&args);
        process.env_remove("VMBACKUP_REPO");
        let text = crate::support::Outcome::of(&mut process).ok().stdout;
        let name = if command.is_empty() { "vmbackup" } else { command }.replace(' ', "-");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/cli/help/{name}.txt"));
        if std::env::var_os("VMBACKUP_UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &text).expect("the snapshot can be written");
        } else if std::fs::read_to_string(&path).unwrap_or_default() != text {
            changed.push(format!("--- {name}\n{text}"));
        }
    }
    assert!(changed.is_empty(), "help texts differ from tests/cli/help:\n{}", changed.join("\n"));
}

#[test]
fn no_option_takes_a_secret_itself() {
    let env = TestEnv::new();
    for command in COMMANDS {
        let mut args: Vec<&str> = command.split_whitespace().collect();
        args.push("--help");
        let text = env.vmbackup(&args).ok().stdout;
        for line in text.lines().map(str::trim_start).filter(|line| line.starts_with("--")) {
            let takes_secret = line.contains("password") || line.contains("key-file");
            assert!(!takes_secret || line.contains("<FILE>"), "{command}: {line}");
        }
    }
}

#[test]
fn wrong_usage_is_exit_code_2_and_a_json_line_with_json() {
    let env = TestEnv::new();
    let outcome = env.vmbackup(&["full", "--domain", "a", "--qmp", "b"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stdout.is_empty(), "{outcome:?}");
    let outcome = env.vmbackup(&["--json", "no-such-command"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    let line: serde_json::Value = serde_json::from_str(outcome.stderr.trim()).expect("a JSON line");
    assert_eq!(line["type"], "error");
    assert_eq!(line["kind"], "usage");
    assert_eq!(line["exit_code"], 2);
}

#[test]
fn help_and_version_are_data() {
    let env = TestEnv::new();
    let version = env.vmbackup(&["--version"]).ok();
    assert_eq!(version.stdout, format!("vmbackup {}\n", env!("CARGO_PKG_VERSION")));
    assert!(version.stderr.is_empty(), "{version:?}");
}
