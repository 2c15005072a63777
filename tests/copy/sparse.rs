//! What `--sparse` leaves out: not only equal content, but space that is not taken.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::support::{NbdServer, Outcome, TestEnv};

const MIB: usize = 1 << 20;

/// `source.raw`, 8 MiB without a hole: every other MiB is zeroes written as data.
fn source(env: &TestEnv) -> Vec<u8> {
    let mut bytes = vec![0; 8 * MIB];
    for data in bytes.chunks_mut(2 * MIB) {
        data[..MIB].fill(0x5a);
    }
    fs::write(env.path("source.raw"), &bytes).unwrap();
    assert!(allocated(&env.path("source.raw")) >= 8 * MIB as u64);
    bytes
}

fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// Thresholds below, at and above the size of requests, given and usual.
const OPTIONS: [&[&str]; 6] = [
    &[],
    &["--sparse", "256k"],
    &["--sparse", "1M"],
    &["--request-size", "4k"],
    &["--request-size", "64k", "--sparse", "64k"],
    &["--synchronous", "--sparse", "512k"],
];

#[test]
fn runs_of_zeroes_as_long_as_the_threshold_take_no_space_in_files() {
    let env = TestEnv::new();
    let bytes = source(&env);
    for options in OPTIONS {
        let args = [&["copy", "source.raw", "new.raw", "--force"][..], options].concat();
        env.vmbackup(&args).ok();
        assert!(fs::read(env.path("new.raw")).unwrap() == bytes, "{options:?}");
        let taken = allocated(&env.path("new.raw"));
        assert!(taken < 5 * MIB as u64, "{options:?}: {taken}");
    }
    env.vmbackup(&["copy", "source.raw", "new.raw", "--force", "--sparse", "0"]).ok();
    assert!(allocated(&env.path("new.raw")) >= 8 * MIB as u64, "none is looked for");
    env.vmbackup(&["copy", "source.raw", "new.raw", "--force", "--sparse", "2M"]).ok();
    assert!(allocated(&env.path("new.raw")) >= 8 * MIB as u64, "no run is that long");
}

#[test]
fn runs_of_zeroes_as_long_as_the_threshold_take_no_space_in_images() {
    let env = TestEnv::new();
    source(&env);
    for options in OPTIONS {
        let args = [&["copy", "source.raw", "new.qcow2", "--force"][..], options].concat();
        env.vmbackup(&args).ok();
        crate::support::assert_same_content(
            &env,
            (&env.path("source.raw"), "raw"),
            (&env.path("new.qcow2"), "qcow2"),
        );
        let taken = env.path("new.qcow2").metadata().unwrap().len();
        assert!(taken < 5 * MIB as u64, "{options:?}: {taken}");
    }
}

#[test]
fn runs_of_zeroes_as_long_as_the_threshold_take_no_space_from_a_pipe_or_a_server() {
    let env = TestEnv::new();
    let bytes = source(&env);
    // Without extents the zeroes come as data.
    let server = NbdServer::nbdkit(&env, &["--filter=noextents", "file", "source.raw"]);
    for options in OPTIONS {
        for from in ["-", &server.uri("")] {
            let args = [&["copy", from, "new.raw", "--force"][..], options].concat();
            let pipe = File::open(env.path("source.raw")).unwrap();
            Outcome::of(env.vmbackup_command(&args).stdin(pipe)).ok();
            assert!(fs::read(env.path("new.raw")).unwrap() == bytes, "{from} {options:?}");
            let taken = allocated(&env.path("new.raw"));
            assert!(taken < 5 * MIB as u64, "{from} {options:?}: {taken}");
        }
    }
}

#[test]
fn a_server_of_small_requests_gets_no_runs_of_zeroes_as_data() {
    let env = TestEnv::new();
    source(&env);
    let server = NbdServer::nbdkit(
        &env,
        &["--filter=log", "--filter=blocksize-policy", "memory", "8M", "logfile=log"]
            .into_iter()
            .chain(["blocksize-maximum=256k", "blocksize-preferred=4k", "blocksize-minimum=1"])
            .collect::<Vec<_>>(),
    );
    env.vmbackup(&["copy", "source.raw", &server.uri(""), "--sparse", "1M", "--verify"]).ok();
    let log = fs::read_to_string(env.path("log")).unwrap();
    let writes = log.lines().filter(|line| line.contains(" Write id=")).count();
    assert_eq!(writes, 16, "4 MiB of data: {log}");
}

#[test]
fn a_threshold_above_the_size_of_requests_is_refused() {
    let env = TestEnv::new();
    source(&env);
    for options in [&["--request-size", "64k", "--sparse", "1M"][..], &["--sparse", "64M"]] {
        let outcome = env.vmbackup(&[&["copy", "source.raw", "new.raw"][..], options].concat());
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        outcome.fails_with(&["--sparse", "request"]);
        assert!(!env.path("new.raw").exists());
    }
}
