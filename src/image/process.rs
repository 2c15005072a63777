//! A `qemu-nbd` that serves one image on a private socket, to us alone, and ends with us.
//!
//! It ends by itself when our last connection closes (it is not `--persistent`); [`OwnChild`] sees
//! to all other ways.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tokio::net::UnixStream;

use super::child::{OwnChild, PASSED_FILE, Passed};
use super::node::doubled;
use super::private::PrivateDir;
use super::tool::{failed, missing};
use crate::error::{Error, Kind, Result};

/// Longest wait for the socket.
const START: Duration = Duration::from_secs(30);
/// How often the socket is looked for.
const POLL: Duration = Duration::from_millis(5);
/// Longest wait for the process to end once its last client is gone: it writes and syncs what is left,
/// as slowly as a flush may be ([`crate::nbd::Timeouts::slow`]).
const END: Duration = Duration::from_secs(30 * 60);
/// Longest wait for a process that broke a connection to end as well.
const BROKEN: Duration = Duration::from_millis(500);
/// Connections served at once: more than a client of ours opens.
const SHARED: &str = "8";

/// How an image is served.
#[derive(Debug)]
pub(super) struct Serve<'a> {
    /// Its name, in messages only if it is open.
    pub(super) path: &'a Path,
    /// The file itself, for an image in a directory where others may change names.
    pub(super) open: Option<OwnedFd>,
    pub(super) format: &'a str,
    /// How to open it, where path and format do not say all.
    pub(super) node: Option<OsString>,
    pub(super) mode: ServeMode,
    /// Bitmaps to offer.
    pub(super) bitmaps: &'a [String],
}

/// Whether the image may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ServeMode {
    Read,
    Write,
    /// Clusters are compressed as they are written, whole and once each.
    WriteCompressed,
}

/// A running qemu-nbd.
#[derive(Debug)]
pub(super) struct QemuNbd {
    child: OwnChild,
    what: String,
    /// Holds the socket; removed with the handle.
    directory: PrivateDir,
}

impl QemuNbd {
    /// Starts it and waits until its socket answers.
    pub(super) async fn start(serve: Serve<'_>) -> Result<Self> {
        let what = format!("open {} as {}", serve.path.display(), serve.format);
        let directory = PrivateDir::create()?;
        let arguments = arguments(&serve, &directory.path().join("nbd"));
        let passed = serve.open.map_or(Passed::Nothing, Passed::File);
        let child = OwnChild::spawn(arguments, passed).await.map_err(|e| missing("qemu-nbd", e))?;
        let mut started = Self { child, what, directory };
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
        let ended = self.child.child.try_wait();
        match ended.map_err(|e| Error::io("cannot ask for a process", e))? {
            None => Ok(()),
            Some(status) => Err(self.ended(status).await),
        }
    }

    /// The same after it has dropped a connection: it may be about to end.
    pub(super) async fn settle(&mut self) -> Result<()> {
        let _ = tokio::time::timeout(BROKEN, self.child.child.wait()).await;
        self.check_alive().await
    }

    /// Waits until it has ended by itself, after the last connection was closed.
    pub(super) async fn ended_well(mut self) -> Result<()> {
        let Ok(status) = tokio::time::timeout(END, self.child.child.wait()).await else {
            let message = format!("cannot {}: qemu-nbd does not end", self.what);
            return Err(Error::new(Kind::Timeout, message));
        };
        let status = status.map_err(|e| Error::io("cannot wait for qemu-nbd", e))?;
        if status.success() { Ok(()) } else { Err(self.ended(status).await) }
    }

    /// Ends it at once, which harms nothing while it only reads.
    pub(super) async fn kill(&mut self) -> Result<()> {
        // Waits for the end, too, so that its locks are gone afterwards. Not running is no error.
        self.child.child.kill().await.map_err(|e| Error::io("cannot end qemu-nbd", e))
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
        let said = self.child.last_words().await;
        failed(
            &self.what,
            if said.is_empty() { format!("qemu-nbd ended with {status}") } else { said }.as_str(),
        )
    }
}

fn arguments(serve: &Serve<'_>, socket: &Path) -> Vec<OsString> {
    let path = if serve.open.is_some() { Path::new(PASSED_FILE) } else { serve.path };
    let mut arguments: Vec<OsString> =
        ["qemu-nbd", "--shared", SHARED].iter().map(OsString::from).collect();
    match serve.mode {
        ServeMode::Read => arguments.push("--read-only".into()),
        // Zeroes may become holes: whoever writes to the image says what it holds.
        ServeMode::Write | ServeMode::WriteCompressed => arguments.push("--discard=unmap".into()),
    }
    for bitmap in serve.bitmaps {
        arguments.extend(["--bitmap".into(), bitmap.into()]);
    }
    arguments.extend(["--socket".into(), socket.into()]);
    if serve.mode == ServeMode::WriteCompressed {
        let format = serve.format;
        let mut node = OsString::from(format!(
            "driver=compress,file.driver={format},file.discard=unmap,\
             file.file.driver=file,file.file.filename="
        ));
        node.push(OsString::from_vec(doubled(path)));
        arguments.extend(["--image-opts".into(), node]);
    } else if let Some(node) = &serve.node {
        arguments.extend(["--image-opts".into(), node.clone()]);
    } else {
        arguments.extend(["--format".into(), serve.format.into(), path.into()]);
    }
    arguments
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn nobody_else_gets_to_the_socket() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let (path, mode) = (image.path(), ServeMode::Write);
        let serve = Serve { path, open: None, format: "raw", node: None, mode, bitmaps: &[] };
        let served = QemuNbd::start(serve).await.unwrap();
        let mode = served.directory.path().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700, "whatever the umask");
    }
}
