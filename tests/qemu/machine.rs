//! A QEMU of a test: two disks, two monitors (ours and the one under test), guest-like writes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp::{Address, Monitor};
use vmbackup::journal::Journals;
use vmbackup::platform::qemu::{Qemu, QemuOptions};
use vmbackup::vm::PointId;

pub(crate) const UUID: &str = "c0ffee00-0000-4000-8000-00000000000a";
pub(crate) const SIZE: u64 = 16 << 20;

/// Whether the QEMU here has what came with a version; says so if it does not.
#[allow(clippy::print_stderr, reason = "says why nothing was tested")]
pub(crate) fn qemu_is_since(major: u32, minor: u32) -> bool {
    let said = Command::new("qemu-system-x86_64").arg("--version").output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    let version = said.split_whitespace().nth(3).unwrap();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let is_since = (numbers.next(), numbers.next()) >= (Some(major), Some(minor));
    if !is_since {
        eprintln!("not tested: QEMU {version} is older than {major}.{minor}");
    }
    is_since
}

/// What the VM does by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Guest {
    /// Nothing: it never runs.
    Still,
    /// It runs, and writes nothing.
    Idle,
    /// It runs this boot sector of disk-a. Between disk-a and disk-b it has further disks, so that
    /// going through all of them takes time.
    Boots(&'static [u8]),
    /// The same, once it is let go.
    WillBoot(&'static [u8]),
}

/// Counts for ever: writes the next number to sector 64 of disk-a, then to that of disk-b.
///
/// ```text
///  cli; ds = es = ss = 0; sp = 0x7c00; sti
///  1: inc dword [0x8000]; int 13h (ah=43h, dl=80h, dap); int 13h (dl=81h, dap); jmp 1b
///  dap: 1 sector from 0:8000 to LBA 64
/// ```
pub(crate) const COUNTER: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0x66, 0xff, 0x06,
    0x00, 0x80, 0xbe, 0x28, 0x7c, 0xb8, 0x00, 0x43, 0xb2, 0x80, 0xcd, 0x13, 0xbe, 0x28, 0x7c, 0xb8,
    0x00, 0x43, 0xb2, 0x81, 0xcd, 0x13, 0xeb, 0xe5, 0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00,
    0x40, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// Fills disk-a with 0x77 from 1 MiB to 16 MiB, 32 KiB at a time, and stops at the first error.
///
/// ```text
///  cli; ds = ss = 0; sp = 0x7c00; es = 0x1000; rep stosw 0x7777; sti
///  1: int 13h (ah=43h, dl=80h, dap); jc 2f; add dword [lba], 64; cmp [lba], 32768; jb 1b
///  2: hlt; jmp 2b
///  dap: 64 sectors from 1000:0 to lba, which begins at 2048
/// ```
pub(crate) const FILLER: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xb8, 0x00, 0x10, 0x8e, 0xc0, 0x31,
    0xff, 0xb8, 0x77, 0x77, 0xb9, 0x00, 0x40, 0xfc, 0xf3, 0xab, 0xfb, 0xbe, 0x3c, 0x7c, 0xb8, 0x00,
    0x43, 0xb2, 0x80, 0xcd, 0x13, 0x72, 0x11, 0x66, 0x83, 0x06, 0x44, 0x7c, 0x40, 0x66, 0x81, 0x3e,
    0x44, 0x7c, 0x00, 0x80, 0x00, 0x00, 0x72, 0xe3, 0xf4, 0xeb, 0xfd, 0x90, 0x10, 0x00, 0x40, 0x00,
    0x00, 0x00, 0x00, 0x10, 0x00, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// A VM with `disk-a` on a.qcow2 and `disk-b` on b.raw, which are written through the monitor, as
/// if by the guest, or by the guest.
pub(crate) struct Machine {
    guest: Guest,
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

/// Makes a file of so many MiB that nothing compresses.
pub(crate) fn noise(path: &Path, mib: u64) {
    let random = std::fs::File::open("/dev/urandom").unwrap();
    let mut file = std::fs::File::create_new(path).unwrap();
    std::io::copy(&mut random.take(mib << 20), &mut file).unwrap();
}

fn start(dir: &Path, guest: Guest) -> Child {
    for socket in ["qmp.sock", "side.sock"] {
        let _ = std::fs::remove_file(dir.join(socket));
    }
    let between = if matches!(guest, Guest::Boots(_)) { 0..8 } else { 0..0 };
    let between = between.map(|n| {
        let node = format!("null-co,node-name=n{n},size=65536,read-zeroes=on");
        (node, format!("virtio-blk-pci,drive=n{n},id=disk-n{n}"))
    });
    let between: Vec<_> = between.collect();
    let said = std::fs::File::create(dir.join("said")).unwrap();
    // What `qemu-io` says goes to QEMU's own output, at once.
    let child = Command::new("stdbuf")
        .args(["-o0", "qemu-system-x86_64"])
        .args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-m", "16"])
        .args(matches!(guest, Guest::Still | Guest::WillBoot(_)).then_some("-S"))
        .args(["-name", "plain", "-uuid", UUID])
        .args(["-qmp", "unix:qmp.sock,server=on,wait=off"])
        .args(["-qmp", "unix:side.sock,server=on,wait=off"])
        .args([
            "-blockdev",
            // The firmware knows no flush, so that QEMU would flush after each of its writes.
            "qcow2,node-name=a,discard=unmap,cache.no-flush=on,file.driver=file,\
             file.filename=a.qcow2",
        ])
        .args([
            "-blockdev",
            "raw,node-name=b,discard=unmap,cache.no-flush=on,file.driver=file,file.filename=b.raw",
        ])
        .args(["-device", "virtio-blk-pci,drive=a,id=disk-a,bootindex=0"])
        .args(between.iter().flat_map(|(node, device)| ["-blockdev", node, "-device", device]))
        .args(["-device", "virtio-blk-pci,drive=b,id=disk-b,bootindex=1"])
        .args(["-device", "virtio-scsi-pci", "-device", "scsi-cd,id=cd"])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(said)
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
        Self::with(Guest::Still).await
    }

    pub(crate) async fn with(guest: Guest) -> Self {
        let make = |dir: &Path| {
            tool("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "16M"], dir);
        };
        Self::made(guest, make).await
    }

    /// The same with a disk-a of so many MiB that nothing compresses, whose content is in `content`.
    pub(crate) async fn filled(guest: Guest, mib: u64) -> Self {
        let make = |dir: &Path| {
            noise(&dir.join("content"), mib);
            let convert = ["convert", "-f", "raw", "-O", "qcow2", "content", "a.qcow2"];
            tool("qemu-img", &convert, dir);
        };
        Self::made(guest, make).await
    }

    /// The same with a disk-a whose data is in a.raw, a raw image by itself.
    pub(crate) async fn with_data_file() -> Self {
        let make = |dir: &Path| {
            let options = "data_file=a.raw,data_file_raw=on";
            tool(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "16M"],
                dir,
            );
        };
        Self::made(Guest::Still, make).await
    }

    /// The same with a disk-a of qcow2 version 2.
    pub(crate) async fn of_version_2() -> Self {
        let make = |dir: &Path| {
            let options = ["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "a.qcow2", "16M"];
            tool("qemu-img", &options, dir);
        };
        Self::made(Guest::Still, make).await
    }

    async fn made(guest: Guest, make: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::Builder::new().prefix("vmb-qemu-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("scratch")).unwrap();
        make(dir.path());
        tool("qemu-img", &["create", "-q", "-f", "raw", "b.raw", "16M"], dir.path());
        if let Guest::Boots(code) | Guest::WillBoot(code) = guest {
            let mut sector = code.to_vec();
            sector.resize(510, 0);
            sector.extend([0x55, 0xaa]);
            std::fs::write(dir.path().join("boot"), sector).unwrap();
            let write = ["-f", "qcow2", "-c", "write -q -s boot 0 512", "a.qcow2"];
            tool("qemu-io", &write, dir.path());
        }
        let child = start(dir.path(), guest);
        let side = side(dir.path()).await;
        Self { guest, child, dir, side, points: 0 }
    }

    /// Makes a further image of the size of a disk.
    pub(crate) fn make_image(&self, name: &str) {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", name, "16M"], self.dir.path());
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
        let said = self.qemu_io(disk, what).await;
        assert!(!said.to_lowercase().contains("error") && !said.contains("failed"), "{said}");
    }

    async fn qemu_io(&self, disk: &str, what: &str) -> String {
        let device = format!("/machine/peripheral/{disk}/virtio-backend");
        let before = std::fs::read(self.path("said")).unwrap().len();
        let said = self.side.human(&format!("qemu-io -d {device} \"{what}\"")).await.unwrap();
        let all = std::fs::read(self.path("said")).unwrap();
        said + &String::from_utf8_lossy(&all[before..])
    }

    /// Whether a read of a disk finds the pattern it names (`read -P 7 1M 64k`).
    pub(crate) async fn reads(&self, disk: &str, what: &str) -> bool {
        let said = self.qemu_io(disk, what).await;
        assert!(said.contains("read "), "{said}");
        !said.contains("verification failed")
    }

    /// Whether the guest runs.
    pub(crate) async fn runs(&self) -> bool {
        self.side.query_status().await.unwrap().running
    }

    /// The nodes the devices write to.
    pub(crate) async fn tops(&self) -> Vec<String> {
        let devices = self.side.query_block().await.unwrap().into_iter();
        devices.filter_map(|device| Some(device.inserted?.name().to_owned())).collect()
    }

    /// What the disks hold now, read by qemu-img.
    pub(crate) async fn oracle(&self) -> [Vec<u8>; 2] {
        for disk in ["disk-a", "disk-b"] {
            self.guest(disk, "flush").await;
        }
        [self.held_by("a.qcow2"), std::fs::read(self.path("b.raw")).unwrap()]
    }

    /// What an image holds, with all that is below it; QEMU has flushed.
    pub(crate) fn held_by(&self, image: &str) -> Vec<u8> {
        let convert = ["convert", "-U", "-f", "qcow2", "-O", "raw", image, "oracle"];
        tool("qemu-img", &convert, self.dir.path());
        std::fs::read(self.path("oracle")).unwrap()
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

    /// What is in the scratch directory.
    pub(crate) fn scratch(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path("scratch")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Asserts that nothing of ours is there but these points' bitmaps (one per disk each).
    pub(crate) async fn holds_only(&self, points: &[PointId]) {
        let names = self.ours().await;
        assert_eq!(names.len(), points.len() * 2, "{names:?}");
        for point in points {
            let point = point.to_string();
            assert_eq!(names.iter().filter(|name| name.contains(&point)).count(), 2, "{names:?}");
        }
        assert!(self.scratch().is_empty(), "{:?}", self.scratch());
        // The server is stopped: another can be started.
        let socket = self.path("probe.sock");
        self.side.nbd_server_start(&socket, 1).await.unwrap();
        self.side.nbd_server_stop().await.unwrap();
    }

    /// Ends QEMU as an administrator does, and starts it again.
    pub(crate) async fn restart(&mut self) {
        self.restart_after(|_| ()).await;
    }

    /// The same with something done while it does not run.
    pub(crate) async fn restart_after(&mut self, act: impl FnOnce(&Path)) {
        self.side.execute_raw("quit", serde_json::json!({})).await.unwrap();
        self.child.wait().unwrap();
        act(self.dir.path());
        self.start_again().await;
    }

    /// Kills QEMU, and starts it again.
    pub(crate) async fn crash(&mut self) {
        self.kill();
        self.start_again().await;
    }

    /// Kills QEMU.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    async fn start_again(&mut self) {
        self.child = start(self.dir.path(), self.guest);
        self.side = side(self.dir.path()).await;
    }
}

async fn side(dir: &Path) -> Monitor {
    let options =
        qmp::Options { greeting: Duration::from_secs(60), command: Duration::from_secs(60) };
    let address = Address::Unix(dir.join("side.sock"));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // There is a moment between the socket and somebody who listens on it.
        match Monitor::connect(&address, options).await {
            Err(error) if Instant::now() >= deadline => panic!("no monitor: {error:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            Ok(monitor) => return monitor,
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
