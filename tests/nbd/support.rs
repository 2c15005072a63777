//! Real NBD servers for these tests, each on its own socket in its own directory, ended with it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmbackup::block::conformance;
use vmbackup::nbd::{Access, Client, ClientOptions, InitialContent, NbdUri};

use crate::listening::is_listening;

/// Patience for a server to come up on a loaded machine.
const START: Duration = Duration::from_secs(30);

/// A server process and its directory.
pub struct Server {
    child: Child,
    pub dir: TempDir,
}

impl Server {
    /// Starts `program args…` in `dir` and waits for its socket `s`.
    pub fn start(dir: TempDir, program: &str, args: &[&str]) -> Self {
        let child = Command::new(program)
            .args(args)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{program} is needed: {e}"));
        let mut server = Self { child, dir };
        let begun = Instant::now();
        while !is_listening(&server.socket()) {
            assert!(begun.elapsed() < START, "{program} {args:?} has no socket");
            if let Some(status) = server.child.try_wait().unwrap() {
                panic!("{program} {args:?} ended with {status}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// `nbdkit` with `args`.
    pub fn nbdkit(args: &[&str]) -> Self {
        let mut all = vec!["-f", "--exit-with-parent", "-U", "s"];
        all.extend_from_slice(args);
        Self::start(tempdir(), "nbdkit", &all)
    }

    /// `qemu-nbd` of an image in `dir`.
    pub fn qemu_nbd(dir: TempDir, args: &[&str]) -> Self {
        let socket = dir.path().join("s");
        let mut all = vec!["-t", "-k", socket.to_str().unwrap()];
        all.extend_from_slice(args);
        Self::start(dir, "qemu-nbd", &all)
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn uri(&self, export: &str) -> NbdUri {
        NbdUri::unix(self.socket(), export)
    }

    pub async fn open(&self, options: ClientOptions) -> Client {
        Client::open_uri(&self.uri(""), options).await.expect("open the export")
    }

    pub async fn reader(&self) -> Client {
        self.open(ClientOptions::default()).await
    }

    pub async fn writer(&self) -> Client {
        self.open(writing()).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn writing() -> ClientOptions {
    ClientOptions { access: Access::Write(InitialContent::Unknown), ..ClientOptions::default() }
}

pub fn tempdir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs a tool to its end.
pub fn run(program: &str, args: &[&str], dir: &Path) -> String {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed: {e}"));
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {err}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Version of the installed qemu-nbd: what it can do depends on it.
pub fn qemu_version(dir: &Path) -> (u32, u32) {
    let text = run("qemu-nbd", &["--version"], dir);
    let version = text.split_whitespace().nth(1).expect("qemu-nbd VERSION …");
    let mut numbers = version.split('.').map(|number| number.parse().expect("a version"));
    let mut next = || numbers.next().expect("major.minor");
    (next(), next())
}

/// A directory with `raw` (the conformance pattern of `len` bytes) and what it holds.
pub fn pattern_dir(len: usize) -> (TempDir, Vec<u8>) {
    let dir = tempdir();
    let content = conformance::pattern(len);
    std::fs::write(dir.path().join("raw"), &content).unwrap();
    (dir, content)
}

/// What `image` holds, as qemu-img reads it.
pub fn content_of(dir: &Path, image: &str, format: &str) -> Vec<u8> {
    run("qemu-img", &["convert", "-U", "-f", format, "-O", "raw", image, "content"], dir);
    std::fs::read(dir.join("content")).unwrap()
}
