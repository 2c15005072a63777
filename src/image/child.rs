//! A child process that ends with us.
//!
//! It is ended by the kernel when we die (`setpriv --pdeathsig`) and killed when its handle is
//! dropped. Ctrl-C of a terminal does not reach it: whoever stops decides when.
//!
//! The kernel counts the *thread* that started a child as its parent, so a thread of its own
//! starts it and waits until the handle is gone.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use super::tool::text;

/// Most of the error output kept.
const STDERR_BYTES_MAX: usize = 4096;
/// How long and how often the last of the error output is waited for.
const LAST_WORDS: (usize, Duration) = (20, Duration::from_millis(5));

/// SIGTERM on our death, at which servers close their disks properly. setpriv is part of
/// util-linux; without it the other ways to end remain. What is passed comes on standard input and
/// becomes descriptor 3, which is where `sd_listen_fds(3)` has the first socket; its environment
/// names the process.
const WRAPPER: &str = r#"
if [ "$1" = listening ]; then export LISTEN_PID=$$ LISTEN_FDS=1; fi
if [ "$1" != nothing ]; then exec 3<&0; fi
shift
exec </dev/null
command -v "$1" >/dev/null || { echo "$1: No such file or directory" >&2; exit 127; }
command -v setpriv >/dev/null && exec setpriv --pdeathsig TERM -- "$@"
exec "$@"
"#;

/// The name of a [`Passed::File`] in the child. It is the open file, whatever has its name.
pub(super) const PASSED_FILE: &str = "/proc/self/fd/3";

/// What a child gets besides its arguments.
#[derive(Debug)]
pub(crate) enum Passed {
    Nothing,
    /// A listening socket, as socket activation passes it.
    Listening(OwnedFd),
    /// A file, as [`PASSED_FILE`].
    File(OwnedFd),
}

/// A running child.
#[derive(Debug)]
pub(crate) struct OwnChild {
    pub(crate) child: Child,
    stderr: Arc<Mutex<Vec<u8>>>,
    /// The thread that counts as parent ends when this is dropped.
    _parent: mpsc::Sender<()>,
}

impl OwnChild {
    /// Starts `line`, program and arguments.
    pub(crate) async fn spawn(line: Vec<OsString>, passed: Passed) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        let (done, child) = oneshot::channel();
        let (keep, kept) = mpsc::channel::<()>();
        std::thread::Builder::new().name("parent of a child".to_owned()).spawn(move || {
            let _inside = runtime.enter();
            if done.send(spawn_here(&line, passed)).is_ok() {
                // An error means that the sender is gone: that is what is waited for.
                let _ = kept.recv();
            }
        })?;
        let mut child =
            child.await.map_err(|_| io::Error::other("the thread of a child died"))??;
        let stderr = Arc::default();
        if let Some(stream) = child.stderr.take() {
            tokio::spawn(collect(stream, Arc::clone(&stderr)));
        }
        Ok(Self { child, stderr, _parent: keep })
    }

    /// What it has said on standard error, after it has ended.
    pub(crate) async fn last_words(&self) -> String {
        // The pipe is read by another task: give it a moment to see the end.
        for _ in 0..LAST_WORDS.0 {
            if !self.said().is_empty() {
                break;
            }
            tokio::time::sleep(LAST_WORDS.1).await;
        }
        self.said()
    }

    fn said(&self) -> String {
        text(&self.stderr.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn spawn_here(line: &[OsString], passed: Passed) -> io::Result<Child> {
    let (kind, stdin) = match passed {
        Passed::Nothing => ("nothing", Stdio::null()),
        Passed::Listening(socket) => ("listening", Stdio::from(socket)),
        Passed::File(file) => ("file", Stdio::from(file)),
    };
    let mut command = Command::new("sh");
    command.args(["-c", WRAPPER, "sh", kind]);
    command
        .args(line)
        .env("LC_ALL", "C")
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A talkative ssh filled its pipe and stood still, and the backup with it.
    #[tokio::test]
    async fn more_than_a_pipe_holds_is_read_and_its_beginning_kept() {
        let line = ["sh", "-c", "echo first >&2; head -c 1000000 /dev/zero >&2; echo done >&2"];
        let line = line.map(OsString::from).to_vec();
        let mut own = OwnChild::spawn(line, Passed::Nothing).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(20), own.child.wait());
        assert!(ended.await.expect("it does not stand still").unwrap().success());
        let said = own.last_words().await;
        assert!(said.starts_with("first") && said.len() <= STDERR_BYTES_MAX);
    }
}
