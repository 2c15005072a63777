//! A server in this process on a socket in its own directory, and tools that talk to it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::task::JoinHandle;
use vmbackup::block::memory::MemoryDisk;
use vmbackup::block::{ByteRange, conformance};
use vmbackup::nbd::NbdUri;
use vmbackup::nbd::server::{Export, Exports, Limits, Listener, Server};

/// A listening server; stops when dropped.
pub struct Rig {
    pub server: Server,
    pub dir: TempDir,
    listening: Option<JoinHandle<()>>,
}

impl Rig {
    pub fn new(exports: impl IntoIterator<Item = Export>) -> Self {
        Self::with_limits(exports, limits())
    }

    pub fn with_limits(exports: impl IntoIterator<Item = Export>, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::new(Exports::new(exports).unwrap(), limits);
        let listener = Listener::unix(&dir.path().join("s")).unwrap();
        let listening = server.clone();
        let listening = tokio::spawn(async move { listening.listen(listener).await });
        Self { server, dir, listening: Some(listening) }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn uri(&self, export: &str) -> NbdUri {
        NbdUri::unix(self.socket(), export)
    }

    /// The URI as tools take it.
    pub fn text(&self, export: &str) -> String {
        self.uri(export).to_string()
    }

    /// Runs a tool in the rig's directory and requires success.
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        run(program, args, self.dir.path())
    }

    /// Stops the server and waits until it has.
    pub async fn stop(&mut self) {
        self.server.stop();
        self.listening.take().unwrap().await.unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.server.stop();
    }
}

/// Short ones: nothing in these tests is slow.
pub fn limits() -> Limits {
    let second = Duration::from_secs(1);
    Limits { handshake: 10 * second, stall: 20 * second, ..Limits::default() }
}

/// A disk with the conformance pattern.
pub fn pattern(len: usize) -> (Arc<MemoryDisk>, Vec<u8>) {
    let content = conformance::pattern(len);
    (Arc::new(MemoryDisk::with_content(content.clone())), content)
}

/// A disk whose ranges were changed since some base.
pub fn changed(len: usize, ranges: &[(u64, u64)]) -> Arc<MemoryDisk> {
    let ranges = ranges.iter().map(|(offset, len)| ByteRange::new(*offset, *len)).collect();
    Arc::new(MemoryDisk::changed_since_base(vec![1; len], ranges))
}

/// Runs a tool to its end and requires success.
pub fn run(program: &str, args: &[&str], dir: &Path) -> String {
    let (success, text) = try_run(program, args, dir);
    assert!(success, "{program} {args:?}: {text}");
    text
}

/// Runs a tool to its end: whether it succeeded, and what it said.
pub fn try_run(program: &str, args: &[&str], dir: &Path) -> (bool, String) {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed: {e}"));
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        text.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    (output.status.success(), text)
}
