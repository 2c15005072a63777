//! A QEMU of a test: two disks, two monitors (ours and the one under test), guest-like writes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp::{Address, Monitor};
use vmbackup::journal::Journals;
use vmbackup::platform::qemu::{Qemu, QemuOptions};
use vmbackup::vm::PointId;

pub(crate) const UUID: &str = "c0ffee00-0000-4000-8000-00000000000a";
pub(crate) const SIZE: u64 = 16 << 20;

/// A VM with `disk-a` on a.qcow2 and `disk-b` on b.raw; its guest never runs, its disks are
/// written through the monitor.
pub(crate) struct Machine {
    child: Child,
    dir: tempfile::TempDir,
    /// The test's own monitor connection.
    pub(crate) side: Monitor,
    points: u8,
}

fn tool(program: &str, arguments: &[&str], dir: &Path) {
    let status = Command::new(program).args(arguments).current_dir(dir).status();
    assert!(status.expect("the tool runs").success(), "{program} {arguments:?}");
}

fn start(dir: &Path) -> Child {
    for socket in ["qmp.sock", "side.sock"] {
        let _ = std::fs::remove_file(dir.join(socket));
    }
    let child = Command::new("qemu-system-x86_64")
        .args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S", "-m", "16"])
        .args(["-name", "plain", "-uuid", UUID])
        .args(["-qmp", "unix:qmp.sock,server=on,wait=off"])
        .args(["-qmp", "unix:side.sock,server=on,wait=off"])
        .args([
            "-blockdev",
            "qcow2,node-name=a,discard=unmap,file.driver=file,file.filename=a.qcow2",
        ])
        .args(["-blockdev", "raw,node-name=b,discard=unmap,file.driver=file,file.filename=b.raw"])
        .args(["-device", "virtio-blk-pci,drive=a,id=disk-a"])
        .args(["-device", "virtio-blk-pci,drive=b,id=disk-b"])
        .args(["-device", "virtio-scsi-pci", "-device", "scsi-cd,id=cd"])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64 runs");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !dir.join("side.sock").exists() {
        assert!(Instant::now() < deadline, "QEMU made no monitor socket");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

impl Machine {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("vmb-qemu-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("scratch")).unwrap();
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "16M"], dir.path());
        tool("qemu-img", &["create", "-q", "-f", "raw", "b.raw", "16M"], dir.path());
        let child = start(dir.path());
        let side = side(dir.path()).await;
        Self { child, dir, side, points: 0 }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// How the platform under test reaches it.
    pub(crate) fn options(&self, socket: &str) -> QemuOptions {
        let journals = Journals::new(self.path("journal"), None);
        QemuOptions { monitor: self.path(socket), agent: None, name: None, journals }
    }

    /// A connection of the platform under test; it holds the monitor until it is dropped.
    pub(crate) async fn platform(&self) -> Qemu {
        Qemu::connect(self.options("qmp.sock")).await.unwrap()
    }

    /// Lets the guest do something to a disk (`write -P 7 1M 64k`).
    pub(crate) async fn guest(&self, disk: &str, what: &str) {
        let device = format!("/machine/peripheral/{disk}/virtio-backend");
        let said = self.side.human(&format!("qemu-io -d {device} \"{what}\"")).await.unwrap();
        assert!(!said.to_lowercase().contains("error") && !said.contains("failed"), "{said}");
    }

    /// What the disks hold now, read by qemu-img.
    pub(crate) async fn oracle(&self) -> [Vec<u8>; 2] {
        for disk in ["disk-a", "disk-b"] {
            self.guest(disk, "flush").await;
        }
        let dir = self.dir.path();
        tool("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "raw", "a.qcow2", "oracle"], dir);
        [std::fs::read(self.path("oracle")).unwrap(), std::fs::read(self.path("b.raw")).unwrap()]
    }

    /// A point id that was not used before.
    pub(crate) fn next_point(&mut self) -> PointId {
        self.points += 1;
        PointId([self.points; 16])
    }

    /// The names of all bitmaps, jobs, exports and nodes that are ours.
    pub(crate) async fn ours(&self) -> Vec<String> {
        let mut names = Vec::new();
        for node in self.side.query_named_block_nodes().await.unwrap() {
            names.push(node.name().to_owned());
            names.extend(node.dirty_bitmaps.into_iter().filter_map(|bitmap| bitmap.name));
        }
        names.extend(self.side.query_jobs().await.unwrap().into_iter().map(|job| job.id));
        names.extend(self.side.query_block_exports().await.unwrap().into_iter().map(|e| e.id));
        names.retain(|name| name.starts_with("vmb-"));
        names.sort();
        names
    }

    /// Asserts that nothing of ours is there but these points' bitmaps (one per disk each).
    pub(crate) async fn holds_only(&self, points: &[PointId]) {
        let names = self.ours().await;
        assert_eq!(names.len(), points.len() * 2, "{names:?}");
        for point in points {
            let point = point.to_string();
            assert_eq!(names.iter().filter(|name| name.contains(&point)).count(), 2, "{names:?}");
        }
        let scratch = std::fs::read_dir(self.path("scratch")).unwrap();
        assert_eq!(scratch.count(), 0, "the scratch directory is empty");
        // The server is stopped: another can be started.
        let socket = self.path("probe.sock");
        self.side.nbd_server_start(&socket, 1).await.unwrap();
        self.side.nbd_server_stop().await.unwrap();
    }

    /// Ends QEMU as an administrator does, and starts it again.
    pub(crate) async fn restart(&mut self) {
        self.side.execute_raw("quit", serde_json::json!({})).await.unwrap();
        self.child.wait().unwrap();
        self.start_again().await;
    }

    /// Kills QEMU, and starts it again.
    pub(crate) async fn crash(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.start_again().await;
    }

    async fn start_again(&mut self) {
        self.child = start(self.dir.path());
        self.side = side(self.dir.path()).await;
    }
}

async fn side(dir: &Path) -> Monitor {
    let options =
        qmp::Options { greeting: Duration::from_secs(60), command: Duration::from_secs(60) };
    Monitor::connect(&Address::Unix(dir.join("side.sock")), options).await.unwrap()
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
