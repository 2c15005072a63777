//! `vmbackup serve` that is stopped in the middle of a copy, as for an update, and started again.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::support::{Process, TestEnv, is_listening, wait_until};

/// Bytes that tell where they are from.
fn content() -> Vec<u8> {
    (1..=4_u32 << 20).flat_map(u32::to_le_bytes).collect()
}

/// A server of this on the socket `s`.
fn serve(env: &TestEnv, served: &[&str]) -> Process {
    let socket = env.path("s");
    let args = ["serve", "--socket", socket.to_str().unwrap()];
    let mut process = env.spawn_vmbackup(&[&args, served].concat());
    wait_until("the server's socket", 20, || {
        assert!(process.is_running(), "it ended at once");
        is_listening(&socket)
    });
    process
}

/// Ends it as an operator does: what is in progress is finished, and what comes then is refused.
fn stop(server: Process) {
    server.signal("TERM");
    server.wait().ok();
}

/// Copies `source.raw` over `target.raw`, which is empty; `served` is one of them, on a server that is
/// stopped in the middle and started again. What the copy said.
fn copy_over_a_restart(env: &TestEnv, ends: &[&str], served: &[&str]) -> String {
    fs::write(env.path("source.raw"), content()).unwrap();
    let target = fs::File::create(env.path("target.raw")).unwrap();
    target.set_len(content().len() as u64).unwrap();
    let first = serve(env, served);
    let slow = ["--rate-limit", "2M", "--request-size", "64k"];
    let retries = ["--retries", "5", "--retry-delay", "1"];
    let copy = env.spawn_vmbackup(&[&["copy"][..], ends, &slow[..], &retries].concat());
    wait_until("the middle of the copy", 60, || written_bytes(&target) > 4 << 20);
    stop(first);
    assert!(
        written_bytes(&target) < 15 << 20,
        "the copy was through before the server was stopped"
    );
    let second = serve(env, served);
    let outcome = copy.wait().ok();
    stop(second);
    assert!(fs::read(env.path("target.raw")).unwrap() == content(), "the copy differs");
    outcome.stderr
}

fn written_bytes(file: &fs::File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

/// The server said why, and that is what the user was told.
fn told_of_the_stop(said: &str) {
    assert!(said.contains("was lost") && said.contains("shutting down"), "{said}");
}

#[test]
fn a_source_whose_server_is_restarted_is_copied_to_its_end() {
    let env = TestEnv::new();
    let from = format!("nbd+unix:///?socket={}", env.path("s").display());
    told_of_the_stop(&copy_over_a_restart(
        &env,
        &[&from, "target.raw", "--in-place"],
        &["source.raw"],
    ));
}

#[test]
fn a_target_whose_server_is_restarted_gets_all_of_the_disk() {
    let env = TestEnv::new();
    let to = format!("nbd+unix:///?socket={}", env.path("s").display());
    let served = ["target.raw", "--writable"];
    told_of_the_stop(&copy_over_a_restart(&env, &["source.raw", &to], &served));
}
