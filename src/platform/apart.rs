//! Work that hangs with a disk that hangs, done by a process of its own: that can hang without a thread of
//! ours. A thread that waits for such a disk cannot be killed, and neither can the process it is of: it would
//! keep its locks, and who waits for its exit code would wait as well. Where no process can be started a
//! thread does it all the same.

use std::io;
use std::process::Stdio;

use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

/// Who does it.
#[derive(Debug)]
pub(super) enum Apart {
    /// Killed when it is dropped; one that hangs ends later.
    Process(Child),
    /// Where no process can be started: no such program, or no more descriptors or processes.
    Thread(JoinHandle<()>),
}

impl Apart {
    /// Begins `command`, which ends with 0 or 1 when it has done its work; a thread does `instead` if it cannot
    /// be started.
    pub(super) fn begin(mut command: Command, instead: impl FnOnce() + Send + 'static) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match command.kill_on_drop(true).spawn() {
            Ok(child) => Self::Process(child),
            Err(error) => {
                let program = command.as_std().get_program().display().to_string();
                tracing::warn!(%error, "cannot start '{program}': a thread does its work");
                Self::on_thread(instead)
            }
        }
    }

    pub(super) fn on_thread(work: impl FnOnce() + Send + 'static) -> Self {
        Self::Thread(tokio::task::spawn_blocking(work))
    }

    /// Whether it has ended by now.
    pub(super) fn is_over(&mut self) -> bool {
        match self {
            Self::Process(child) => !matches!(child.try_wait(), Ok(None)),
            Self::Thread(thread) => thread.is_finished(),
        }
    }

    /// Nobody waits any more. One that cannot be killed goes on.
    pub(super) fn kill(&mut self) {
        if let Self::Process(child) = self
            && let Err(error) = child.start_kill()
        {
            tracing::debug!(%error, "it has ended");
        }
    }

    /// Waits for its end, and has a thread do `instead` where the process did not get to it; an error if
    /// nobody did it. Cancel-safe, and not called again after it returned.
    pub(super) async fn end(&mut self, instead: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let ended = self.over().await;
        match (&ended, &self) {
            (Err(error), Self::Process(_)) => {
                tracing::warn!(%error, "a process did not do its work: a thread does");
                *self = Self::on_thread(instead);
                self.over().await
            }
            _ => ended,
        }
    }

    /// Waits for its end; an error if it did not do its work. Cancel-safe, and not called again after it
    /// returned.
    pub(super) async fn over(&mut self) -> io::Result<()> {
        match self {
            Self::Process(child) => {
                let status = child.wait().await?;
                match status.code() {
                    Some(0 | 1) => Ok(()),
                    // Killed, or not even loaded.
                    _ => Err(io::Error::other(format!("it ended with {status}"))),
                }
            }
            Self::Thread(thread) => thread.await.map_err(io::Error::other),
        }
    }
}
