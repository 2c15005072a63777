//! A libvirt of a test's own, to be restarted, or to be kept from its work: all tests share the other one,
//! and its one thread for events holds up every domain when one does. And a second one beside it, which is
//! another host to migrate to.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::env::TestEnv;
use super::libvirt::URI;
use super::tools::wait_until;

/// In the environment of a test that has one: the process id that the test has outside.
const INSIDE: &str = "VMBACKUP_TEST_OWN_LIBVIRT";

/// Where the first host sees what the other has in `/run/libvirt`.
const BESIDE: &str = "/run/libvirt/beside";

/// The other host's libvirt, as the first host reaches it.
pub(crate) const BESIDE_URI: &str = "qemu+unix:///system?socket=/run/libvirt/beside/libvirt-sock";

/// What starts the daemon of a host, but for its pid file.
const DAEMON: [&str; 3] = ["/usr/sbin/libvirtd", "-d", "-p"];

/// The daemon. It ends with the namespace of its test.
pub(crate) struct OwnLibvirt {
    pid_file: &'static str,
}

impl OwnLibvirt {
    /// Runs the body of a test with one: the test is run once more, alone, in namespaces of its own.
    #[track_caller]
    pub(crate) fn with(test: impl FnOnce(&Self)) {
        if outside_id().is_some() {
            let libvirt = Self { pid_file: "/run/libvirt/libvirtd.pid" };
            libvirt.start();
            return test(&libvirt);
        }
        let thread = std::thread::current();
        let name = thread.name().expect("the runner names the thread of a test");
        assert_ne!(name, "main", "--test-threads=1 leaves the name of the test unknown");
        let status = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(script())
            .arg(std::env::current_exe().expect("a path"))
            .args(["--exact", name, "--nocapture", "--include-ignored"])
            .env(INSIDE, std::process::id().to_string())
            .stdin(Stdio::null())
            .status();
        remove_cgroups();
        assert!(status.expect("unshare runs").success(), "it failed in namespaces of its own");
    }

    /// Restarts it, as an upgrade of its package does. Domains run on.
    pub(crate) fn restart(&self) {
        self.end("TERM");
        self.start();
    }

    /// Ends it by a signal and waits until it is gone.
    pub(crate) fn end(&self, signal: &str) {
        let pid = std::fs::read_to_string(self.pid_file).expect("a running daemon has a pid file");
        let status = Command::new("kill").args(["-s", signal, pid.trim()]).status();
        assert!(status.expect("kill runs").success(), "libvirtd is not there");
        let process = Path::new("/proc").join(pid.trim());
        wait_until("libvirtd has ended", 60, || !process.exists());
    }

    /// Starts it and waits until it answers.
    pub(crate) fn start(&self) {
        let [daemon, options @ ..] = DAEMON;
        start(Command::new(daemon).args(options).arg(self.pid_file), URI);
    }

    /// Another host, with a libvirt and a vmbackup of its own: what is run in the environment that this gives
    /// runs there. It has the same files and processes, and the repository of `env`.
    pub(crate) fn beside(&self, env: &TestEnv) -> TestEnv {
        std::fs::create_dir(BESIDE).expect("a directory of this libvirt");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--uts"]).arg(script()).args(["--beside", BESIDE]);
        start(command.args(DAEMON).arg(self.pid_file), BESIDE_URI);
        let pid_file = Path::new(self.pid_file).file_name().expect("a file");
        let daemon = std::fs::read_to_string(Path::new(BESIDE).join(pid_file));
        env.on_host_of(daemon.expect("a running daemon has a pid file").trim())
    }
}

/// Removes the control groups of domains that ended with their libvirt, which else would have done it.
fn remove_cgroups() {
    let of_test = format!("*/machine/qemu-*-vmbtest-{}-*", std::process::id());
    let find = ["/sys/fs/cgroup", "-type", "d", "-path", &of_test, "-delete"];
    // Those of others come and go meanwhile, of which it complains.
    Command::new("find").args(find).stderr(Stdio::null()).status().expect("find runs");
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/own_libvirt.sh")
}

/// Starts a daemon and waits until it answers.
fn start(daemon: &mut Command, uri: &str) {
    assert!(daemon.status().expect("libvirtd runs").success(), "libvirtd did not start");
    wait_until("libvirtd answers", 60, || {
        let asked = Command::new("virsh").args(["-q", "-c", uri, "uri"]).output();
        asked.expect("virsh runs").status.success()
    });
}

/// The process id of the test outside of namespaces of its own, where names are made for the whole machine.
pub(crate) fn outside_id() -> Option<String> {
    std::env::var(INSIDE).ok()
}
