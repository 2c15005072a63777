//! Running `qemu-img`: short calls that are never cut off.
//!
//! A writable opener of a qcow2 image that is killed leaves all its bitmaps unusable, foreign ones
//! too. So a call runs to its end in its own process group (no Ctrl-C of a terminal reaches it)
//! and in its own task (no dropped future does); when it takes too long we stop waiting, not it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use crate::error::{Error, Kind, READ_ONLY, Result};

/// Longest wait for a call that touches metadata only.
const WAIT: Duration = Duration::from_secs(120);
/// Most output kept: the description of an image with thousands of bitmaps.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;
/// Most of the error output kept.
const STDERR_BYTES_MAX: u64 = 4096;

/// The name of what [`qemu_img_on`] is given. It is the open file, whatever has its name.
pub(super) const STDIN_FILE: &str = "/proc/self/fd/0";

/// Runs `qemu-img` with `args`; `what` says in errors what it was for ("add bitmap x to a.qcow2").
/// Yields its output. Not cancel-safe in effect: dropped, the call still happens.
pub(super) async fn qemu_img(args: Vec<&OsStr>, what: &str) -> Result<Vec<u8>> {
    qemu_img_on(Stdio::null(), args, what).await
}

/// The same with an open file, which `args` name as [`STDIN_FILE`].
pub(super) async fn qemu_img_on(stdin: Stdio, args: Vec<&OsStr>, what: &str) -> Result<Vec<u8>> {
    let mut command = Command::new("qemu-img");
    command.args(args).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Messages are looked at below: not translated.
    command.env("LC_ALL", "C").process_group(0);
    let mut child = command.spawn().map_err(|e| missing("qemu-img", e))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let run = tokio::spawn(async move {
        let (output, errors) =
            tokio::join!(drain(stdout, OUTPUT_BYTES_MAX), drain(stderr, STDERR_BYTES_MAX));
        (child.wait().await, output, errors)
    });
    let timeout = || {
        Error::new(
            Kind::Timeout,
            format!("cannot {what}: qemu-img takes over {} s", WAIT.as_secs()),
        )
        .hint("it was left running; check the storage the image is on")
    };
    let ended = tokio::time::timeout(WAIT, run).await.map_err(|_| timeout())?;
    let (status, output, errors) =
        ended.map_err(|e| Error::new(Kind::Internal, "a task died").source(e))?;
    let status = status.map_err(|e| Error::io(format!("cannot {what}"), e))?;
    if status.success() {
        return Ok(output);
    }
    Err(failed(what, &text(&errors)))
}

/// An absolute path: QEMU takes a name without a slash before its first colon for a protocol.
pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io(format!("cannot find {}", path.display()), e))
}

/// The program is not there (or cannot be run).
pub(super) fn missing(program: &str, error: std::io::Error) -> Error {
    Error::io(format!("cannot run {program}"), error).hint("install QEMU's tools (qemu-utils)")
}

/// An error from what a tool of QEMU said.
pub(super) fn failed(what: &str, said: &str) -> Error {
    let said = said.trim();
    let message =
        format!("cannot {what}: {}", if said.is_empty() { "no reason given" } else { said });
    let has = |needle: &str| said.contains(needle);
    if has("Failed to get") && has("lock") {
        return Error::new(Kind::Busy, message)
            .hint("another program (a running VM?) uses the image; stop it, or back up the VM while it runs");
    }
    let (kind, hint) = if has("No such file") {
        (Kind::NotFound, "check the path, and those of the backing files in the image")
    } else if has("Permission denied") {
        (Kind::Permission, "run as root, or as a user who may open it")
    } else if has("Read-only file system") {
        (Kind::Permission, READ_ONLY)
    } else if has("No space left") {
        (Kind::NoSpace, "free space there, or choose another place")
    } else if has("Unknown driver") || has("Image is not in") {
        (Kind::Usage, "say the format it has: PATH,format=qcow2 or PATH,format=raw")
    } else if has("does not support image creation") {
        (Kind::Unsupported, "choose qcow2 or raw")
    } else {
        return Error::new(Kind::Io, message);
    };
    Error::new(kind, message).hint(hint)
}

/// Text of a tool without control characters.
pub(super) fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Reads to the end and keeps the first `bytes_max`.
async fn drain(stream: Option<impl AsyncRead + Unpin>, bytes_max: u64) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else { return kept };
    // What a tool says is advice beside its exit status: a broken pipe loses only that.
    let _ = (&mut stream).take(bytes_max).read_to_end(&mut kept).await;
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    kept
}
