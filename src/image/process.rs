//! A `qemu-nbd` that serves one image on a private socket, to us alone, and ends with us.
//!
//! It ends by itself when our last connection closes (it is not `--persistent`), is ended by the
//! kernel when we die before it has one (`setpriv --pdeathsig`), and is killed when its handle is
//! dropped. Ctrl-C of a terminal does not reach it: whoever stops decides when.
//!
//! The kernel counts the *thread* that started a child as its parent, so a thread of its own
//! starts it and waits until the handle is gone.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use super::tool::{failed, missing, text};
use crate::error::{Error, Kind, Result};

/// Longest wait for the socket.
const START: Duration = Duration::from_secs(30);
/// How often the socket is looked for.
const POLL: Duration = Duration::from_millis(5);
/// Longest wait for the process to end once its last client is gone: it may have much to write.
const END: Duration = Duration::from_secs(120);
/// Most of the error output kept.
const STDERR_BYTES_MAX: usize = 4096;
/// Connections served at once: more than a client of ours opens.
const SHARED: &str = "8";

/// How an image is served.
#[derive(Clone, Debug)]
pub(super) struct Serve<'a> {
    pub(super) path: &'a Path,
    pub(super) format: &'a str,
    pub(super) mode: ServeMode,
    /// Bitmaps to offer.
    pub(super) bitmaps: &'a [String],
}

/// Whether the image may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ServeMode {
    Read,
    Write,
}

/// A running qemu-nbd.
#[derive(Debug)]
pub(super) struct QemuNbd {
    child: Child,
    what: String,
    stderr: Arc<Mutex<Vec<u8>>>,
    /// Holds the socket; removed with the handle.
    directory: TempDir,
    /// The thread that counts as parent ends when this is dropped.
    _parent: mpsc::Sender<()>,
}

impl QemuNbd {
    /// Starts it and waits until its socket answers.
    pub(super) async fn start(serve: &Serve<'_>) -> Result<Self> {
        let what = format!("open {} as {}", serve.path.display(), serve.format);
        let directory = tempfile::Builder::new()
            .prefix("vmbackup-")
            .tempdir()
            .map_err(|e| Error::io("cannot create a directory for a socket", e))?;
        let arguments = arguments(serve, &directory.path().join("nbd"));
        let (mut child, parent) = spawn(arguments).await.map_err(|e| missing("qemu-nbd", e))?;
        let stderr = Arc::default();
        if let Some(stream) = child.stderr.take() {
            tokio::spawn(collect(stream, Arc::clone(&stderr)));
        }
        let mut started = Self { child, what, stderr, directory, _parent: parent };
        let Ok(answers) = tokio::time::timeout(START, started.answers()).await else {
            let message = format!("cannot {}: qemu-nbd does not start", started.what);
            return Err(Error::new(Kind::Timeout, message));
        };
        answers?;
        Ok(started)
    }

    /// Where it serves.
    pub(super) fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd")
    }

    /// `Err` with what it said if it has ended.
    pub(super) async fn check_alive(&mut self) -> Result<()> {
        let ended = self.child.try_wait();
        match ended.map_err(|e| Error::io("cannot ask for a process", e))? {
            None => Ok(()),
            Some(status) => Err(self.ended(status).await),
        }
    }

    /// Waits until it has ended by itself, after the last connection was closed.
    pub(super) async fn ended_well(mut self) -> Result<()> {
        let Ok(status) = tokio::time::timeout(END, self.child.wait()).await else {
            let message = format!("cannot {}: qemu-nbd does not end", self.what);
            return Err(Error::new(Kind::Timeout, message));
        };
        let status = status.map_err(|e| Error::io("cannot wait for qemu-nbd", e))?;
        if status.success() { Ok(()) } else { Err(self.ended(status).await) }
    }

    /// Ends it at once, which harms nothing while it only reads.
    pub(super) async fn kill(&mut self) -> Result<()> {
        // Waits for the end, too, so that its locks are gone afterwards. Not running is no error.
        self.child.kill().await.map_err(|e| Error::io("cannot end qemu-nbd", e))
    }

    /// Waits for the socket to answer, or for the process to end.
    async fn answers(&mut self) -> Result<()> {
        let socket = self.socket();
        loop {
            self.check_alive().await?;
            // It may be bound but not yet listened on: whoever connects tries again.
            if socket.exists() {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn ended(&self, status: ExitStatus) -> Error {
        // The pipe is read by another task: give it a moment to see the end.
        for _ in 0..20 {
            if !self.said().is_empty() {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        let said = self.said();
        failed(
            &self.what,
            if said.is_empty() { format!("qemu-nbd ended with {status}") } else { said }.as_str(),
        )
    }

    fn said(&self) -> String {
        text(&self.stderr.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn arguments(serve: &Serve<'_>, socket: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> =
        ["--shared", SHARED, "--format", serve.format].iter().map(OsString::from).collect();
    match serve.mode {
        ServeMode::Read => arguments.push("--read-only".into()),
        // Zeroes may become holes: the image is ours and new.
        ServeMode::Write => arguments.push("--discard=unmap".into()),
    }
    for bitmap in serve.bitmaps {
        arguments.extend(["--bitmap".into(), bitmap.into()]);
    }
    arguments.extend(["--socket".into(), socket.into(), serve.path.into()]);
    arguments
}

/// Starts qemu-nbd from a thread that lives as long as the sender that comes back.
async fn spawn(arguments: Vec<OsString>) -> io::Result<(Child, mpsc::Sender<()>)> {
    let runtime = tokio::runtime::Handle::current();
    let (done, child) = oneshot::channel();
    let (keep, kept) = mpsc::channel::<()>();
    std::thread::Builder::new().name("qemu-nbd parent".to_owned()).spawn(move || {
        let _inside = runtime.enter();
        if done.send(spawn_here(&arguments)).is_ok() {
            // An error means that the sender is gone: that is what is waited for.
            let _ = kept.recv();
        }
    })?;
    let child = child.await.map_err(|_| io::Error::other("the thread of a child died"))??;
    Ok((child, keep))
}

fn spawn_here(arguments: &[OsString]) -> io::Result<Child> {
    let run = |program: &str, before: &[&str]| {
        Command::new(program)
            .args(before.iter().map(OsStr::new))
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    };
    // SIGTERM, at which qemu-nbd closes its image properly. setpriv is part of util-linux; without
    // it the other two ways to end remain.
    match run("setpriv", &["--pdeathsig", "TERM", "--", "qemu-nbd"]) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => run("qemu-nbd", &[]),
        result => result,
    }
}

/// Keeps the first of what the process says and drains the rest.
async fn collect(mut stream: impl tokio::io::AsyncRead + Unpin, kept: Arc<Mutex<Vec<u8>>>) {
    let mut piece = [0; 1024];
    while let Ok(read) = stream.read(&mut piece).await {
        if read == 0 {
            return;
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let room = STDERR_BYTES_MAX.saturating_sub(kept.len());
        kept.extend_from_slice(&piece[..read.min(room)]);
    }
}

/// Connects to a socket that may not be listened on yet.
pub(super) async fn connect(socket: &Path) -> io::Result<UnixStream> {
    let begun = tokio::time::Instant::now();
    loop {
        match UnixStream::connect(socket).await {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused && begun.elapsed() < START =>
            {
                tokio::time::sleep(POLL).await;
            }
            result => return result,
        }
    }
}
