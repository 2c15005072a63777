//! Images in a directory of their own, tools to change them, and a QEMU that uses one.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmbackup::block::{BlockSource, ExtentKind, conformance, read_all};
use vmbackup::platform::{BackupMode, KnownPoint, Quiesce, SnapshotRequest};
use vmbackup::vm::{DiskDescription, DiskLayer, PointId};

/// Size of the disks.
pub const LEN: usize = 4 << 20;
/// Id of the repository.
pub const REPOSITORY: &str = "0123456789abcdef";

/// A directory with images.
pub struct Images(TempDir);

impl Images {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A raw image with the conformance pattern.
    pub fn raw(&self, name: &str) -> Vec<u8> {
        let content = conformance::pattern(LEN);
        std::fs::write(self.path(name), &content).unwrap();
        content
    }

    /// An image of another format with the same content.
    pub fn converted(&self, name: &str, format: &str) -> Vec<u8> {
        let content = self.raw("pattern.tmp");
        self.run("qemu-img", &["convert", "-f", "raw", "-O", format, "pattern.tmp", name]);
        content
    }

    /// A qcow2 image whose data is in a raw file of that name, which may be relative.
    pub fn data_file(&self, name: &str, data: &str) {
        let data = data.replace(',', ",,");
        let options = format!("data_file={data},data_file_raw=on");
        self.run("qemu-img", &["create", "-f", "qcow2", "-o", &options, name, "4M"]);
    }

    /// A qcow2 image that is encrypted inside.
    pub fn luks(&self, name: &str) {
        let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        let secret = ["--object", "secret,id=s,data=x", "-o", options];
        let create = [&["create", "-f", "qcow2"], &secret[..], &[name, "1M"]].concat();
        // As in tests/support/luks.rs: a fast machine is an error for some versions, now and then.
        let mut made = (0..20).map(|_| self.output("qemu-img", &create).status.success());
        assert!(made.any(|success| success), "qemu-img {create:?}");
    }

    fn output(&self, program: &str, args: &[&str]) -> Output {
        let output = Command::new(program).args(args).current_dir(self.0.path()).output();
        output.unwrap_or_else(|e| panic!("{program} is needed: {e}"))
    }

    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.output(program, args);
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {err}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn qemu_io(&self, image: &str, command: &str) {
        self.run("qemu-io", &["-f", "qcow2", "-c", command, image]);
    }

    /// The names of the bitmaps in an image.
    pub fn bitmaps(&self, image: &str) -> Vec<String> {
        let info = self.run("qemu-img", &["info", "-U", "--output=json", "-f", "qcow2", image]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned();
        let name = |bitmap: &serde_json::Value| bitmap["name"].as_str().unwrap().to_owned();
        list.unwrap_or_default().iter().map(name).collect()
    }

    /// What an image holds, as qemu-img reads it.
    pub fn content(&self, image: &str, format: &str) -> Vec<u8> {
        self.run("qemu-img", &["convert", "-U", "-f", format, "-O", "raw", image, "content.tmp"]);
        std::fs::read(self.path("content.tmp")).unwrap()
    }

    /// A QEMU that has the image as a writable disk; ended when dropped.
    pub fn vm(&self, image: &str, format: &str) -> Vm {
        let qmp = self.path("qmp");
        let _ = std::fs::remove_file(&qmp);
        let path = self.path(image).display().to_string().replace(',', ",,");
        let drive = format!("file={path},format={format},if=virtio");
        let child = Command::new("qemu-system-x86_64")
            .args(["-S", "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg"])
            .args(["-drive", &drive, "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("QEMU is needed");
        let mut vm = Vm(child);
        let begun = Instant::now();
        while vm.runs() && !greets(&qmp) {
            assert!(begun.elapsed() < Duration::from_secs(30), "QEMU does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        vm
    }
}

/// Whether the monitor executes a command: it does so in the main loop, once all is set up.
fn greets(qmp: &Path) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut monitor = UnixStream::connect(qmp)?;
        monitor.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
        let answer = BufReader::new(monitor).lines().nth(1).transpose()?;
        Ok(answer.is_some_and(|line| line.contains("return")))
    };
    ask().unwrap_or(false)
}

/// A QEMU process.
pub struct Vm(Child);

impl Vm {
    pub fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// What it said, once it has ended.
    pub fn refusal(mut self) -> String {
        let mut said = String::new();
        let begun = Instant::now();
        while self.runs() && begun.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!self.runs(), "QEMU runs although it must not");
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn point(n: u8) -> PointId {
    PointId([n; 16])
}

/// A qcow2 disk as a manifest describes it.
fn disk(name: &str, len: usize) -> DiskDescription {
    DiskDescription {
        name: name.to_owned(),
        size_bytes: len as u64,
        format: "qcow2".to_owned(),
        origin: format!("{name}.qcow2"),
        layer: DiskLayer::Plain,
        file: None,
    }
}

/// A request for point `n`, with the points before it known.
pub fn request(mode: BackupMode, n: u8, known: &[(u8, &[(&str, usize)])]) -> SnapshotRequest {
    let known_points = known
        .iter()
        .map(|(n, disks)| KnownPoint {
            id: point(*n),
            disks: disks.iter().map(|(name, len)| disk(name, *len)).collect(),
            checkpoint_xml: None,
        })
        .collect();
    SnapshotRequest {
        mode,
        point: point(n),
        repository: REPOSITORY.to_owned(),
        known_points,
        point_ids: HashSet::new(),
        repository_has_key: false,
        quiesce: Quiesce::Auto,
        freeze_budget: Duration::from_secs(10),
        scratch_dir: None,
        exclude_disks: Vec::new(),
        insecure_tcp: false,
        guest_first: false,
        guardian: None,
        clock: std::sync::Arc::new(vmbackup::clock::SystemClock),
    }
}

/// All bytes of a source.
pub async fn content(source: &Arc<dyn BlockSource>) -> Vec<u8> {
    read_all(source.as_ref(), LEN).await.unwrap()
}

/// The ranges that are not Unchanged.
pub async fn changed(source: &Arc<dyn BlockSource>) -> Vec<(u64, u64, ExtentKind)> {
    conformance::all_extents(source.as_ref())
        .await
        .iter()
        .filter(|extent| extent.kind != ExtentKind::Unchanged)
        .map(|extent| (extent.range.offset(), extent.range.len(), extent.kind))
        .collect()
}
