//! A libvirt of a test's own, to be restarted, or to be kept from its work: all tests share the other one,
//! and its one thread for events holds up every domain when one does.

use std::path::Path;
use std::process::{Command, Stdio};

use super::tools::wait_until;

/// In the environment of a test that has one: the process id that the test has outside.
const INSIDE: &str = "VMBACKUP_TEST_OWN_LIBVIRT";

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
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/own_libvirt.sh");
        let status = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(script)
            .arg(std::env::current_exe().expect("a path"))
            .args(["--exact", name, "--nocapture", "--include-ignored"])
            .env(INSIDE, std::process::id().to_string())
            .stdin(Stdio::null())
            .status();
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
        let status = Command::new("/usr/sbin/libvirtd").args(["-d", "-p", self.pid_file]).status();
        assert!(status.expect("libvirtd runs").success(), "libvirtd did not start");
        wait_until("libvirtd answers", 60, || {
            let mut virsh = Command::new("virsh");
            let asked = virsh.args(["-q", "-c", super::libvirt::URI, "uri"]).output();
            asked.expect("virsh runs").status.success()
        });
    }
}

/// The process id of the test outside of namespaces of its own, where names are made for the whole machine.
pub(crate) fn outside_id() -> Option<String> {
    std::env::var(INSIDE).ok()
}
