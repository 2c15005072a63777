//! A running `vmbackup serve` and the disks it serves.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::support::{Outcome, TestEnv, peak_mib};

/// Size of test disks: several chunks, and a tail that fills none.
pub(crate) const DISK_BYTES: usize = (5 << 20) + 4096;

/// Bytes that depend on `seed` and on their place, with a hole of a MiB.
pub(crate) fn content(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes: Vec<u8> = (0..DISK_BYTES)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect();
    bytes[1 << 20..2 << 20].fill(0);
    bytes
}

/// An environment with a raw image `disk.raw` and its point in the repository.
pub(crate) fn env_with_point() -> (TestEnv, String) {
    let env = TestEnv::new();
    env.init_repo();
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    let point = back_up(&env);
    (env, point)
}

/// Backs `disk.raw` up; the point's id.
pub(crate) fn back_up(env: &TestEnv) -> String {
    let report = env.vmbackup(&["full", "--image", "disk.raw", "--name", "web", "--json"]).json();
    report["point"].as_str().unwrap().to_owned()
}

/// A server; killed when dropped before [`Serve::stop`].
pub(crate) struct Serve {
    child: Child,
    /// The document it printed.
    pub(crate) report: Value,
}

impl Serve {
    pub(crate) fn start(env: &TestEnv, args: &[&str]) -> Self {
        let mut command = env.vmbackup_command(&["serve", "--json"]);
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut text = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        // The document ends with the only line that begins with a brace after the first.
        while output.read_line(&mut text).unwrap() > 0 && !text.ends_with("\n}\n") {}
        let Ok(report) = serde_json::from_str(&text) else {
            let output = child.wait_with_output().unwrap();
            panic!("serve {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        };
        Self { child, report }
    }

    /// The URI of export `index`.
    pub(crate) fn uri(&self, index: usize) -> String {
        self.report["exports"][index]["uri"].as_str().unwrap().to_owned()
    }

    /// The socket, for those who take no URI.
    pub(crate) fn socket(&self) -> PathBuf {
        let uri = self.uri(0);
        PathBuf::from(uri.split_once("socket=").unwrap().1)
    }

    /// The highest resident memory it had until now, in MiB.
    pub(crate) fn peak_mib(&self) -> u64 {
        peak_mib(self.child.id())
    }

    /// Ends it as an operator does, and requires that it ends well; what it said on standard error.
    pub(crate) fn stop(self) -> String {
        self.stop_with(0)
    }

    /// The same with another exit code.
    pub(crate) fn stop_with(mut self, code: i32) -> String {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &id]).status().unwrap().success());
        let mut text = String::new();
        std::io::Read::read_to_string(&mut self.child.stderr.take().unwrap(), &mut text).unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), Some(code), "serve ended with {status}: {text}");
        text
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What an export holds, as nbdcopy reads it.
pub(crate) fn read(env: &TestEnv, uri: &str) -> Vec<u8> {
    env.run("nbdcopy", &[uri, "out"]).ok();
    let content = std::fs::read(env.path("out")).unwrap();
    std::fs::remove_file(env.path("out")).unwrap();
    content
}

/// Commands of qemu-io on an export.
pub(crate) fn qemu_io(env: &TestEnv, uri: &str, commands: &[&str]) -> Outcome {
    let mut command = env.command("qemu-io");
    command.args(["-f", "raw"]);
    for text in commands {
        command.args(["-c", text]);
    }
    Outcome::of(command.arg(uri))
}
