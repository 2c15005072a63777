//! A real QEMU in a directory of its own, with a monitor socket; killed when dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp::{Address, Monitor, Options};

pub(crate) struct Qemu {
    child: Child,
    dir: tempfile::TempDir,
}

impl Qemu {
    /// Starts QEMU with its working directory in a fresh temporary one, so that every file name
    /// in the conversation is relative and a recording holds on any machine. `images` are qcow2
    /// files made before.
    pub(crate) fn start(images: &[(&str, &str)], arguments: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("qmp").tempdir().unwrap();
        for (name, size) in images {
            let format = if name.ends_with("raw") { "raw" } else { "qcow2" };
            let status = Command::new("qemu-img")
                .args(["create", "-q", "-f", format, name, size])
                .current_dir(dir.path())
                .status();
            assert!(status.expect("qemu-img runs").success());
        }
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-nographic", "-S", "-accel", "tcg", "-m", "16"])
            .args(["-qmp", "unix:monitor.sock,server=on,wait=off"])
            .args(arguments)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 runs");
        let mut qemu = Self { child, dir };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !qemu.socket().exists() {
            assert!(qemu.child.try_wait().unwrap().is_none(), "QEMU ended at start");
            assert!(Instant::now() < deadline, "QEMU made no monitor socket");
            std::thread::sleep(Duration::from_millis(20));
        }
        qemu
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("monitor.sock")
    }

    pub(crate) async fn connect(&self) -> Monitor {
        Monitor::connect(&Address::Unix(self.socket()), Options::default()).await.unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
