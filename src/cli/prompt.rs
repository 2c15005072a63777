//! Secrets from files and from the terminal.
//!
//! On the terminal the echo is off while a password is typed and back on whatever happens. The
//! wait watches for a request to stop, so Ctrl-C works. A secret lives in memory that is wiped.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::job::Secret;

/// A secret on its way into a [`Secret`]; wiped as well.
type Bytes = Zeroizing<Vec<u8>>;

/// Longest password or key: what a person or `head -c 4096 /dev/urandom` makes fits well.
const SECRET_BYTES_MAX: u64 = 64 * 1024;
/// How often a waiting prompt looks whether it is to stop.
const POLL: Duration = Duration::from_millis(100);

/// The password in `path`: its content without one line end. Waits for a FIFO, at most until
/// `control` is cancelled, as does [`key_file`].
pub(crate) async fn password_file(path: &Path, control: &Control) -> Result<Secret> {
    let mut secret = wait_for(path, control).await?;
    if secret.last() == Some(&b'\n') {
        secret.pop();
        if secret.last() == Some(&b'\r') {
            secret.pop();
        }
    }
    if secret.is_empty() {
        return Err(Error::new(Kind::Usage, format!("password file {} is empty", path.display())));
    }
    Ok(sealed(secret))
}

/// The key in `path`: all of its content.
pub(crate) async fn key_file(path: &Path, control: &Control) -> Result<Secret> {
    wait_for(path, control).await.map(sealed)
}

/// Reads on a thread that is left behind when we are to stop: a FIFO nobody writes to holds it.
async fn wait_for(path: &Path, control: &Control) -> Result<Bytes> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || read_file(&path));
    control
        .run(async { read.await.map_err(|e| crate::job::internal("reading a file died", e))? })
        .await
}

/// Moves the bytes, so that no copy stays behind.
fn sealed(mut bytes: Bytes) -> Secret {
    Secret::new(std::mem::take(&mut *bytes))
}

fn read_file(path: &Path) -> Result<Bytes> {
    let fail = |e| Error::io(format!("cannot read {}", path.display()), e);
    let file = File::open(path).map_err(fail)?;
    // Sized for all of it at once: growing would leave copies of the secret behind.
    let mut secret: Bytes = Zeroizing::new(Vec::with_capacity(64 * 1024 + 1));
    file.take(SECRET_BYTES_MAX + 1).read_to_end(&mut secret).map_err(fail)?;
    if secret.is_empty() || secret.len() as u64 > SECRET_BYTES_MAX {
        return Err(Error::new(
            Kind::Usage,
            format!("{} holds no secret of 1 to {SECRET_BYTES_MAX} bytes", path.display()),
        ));
    }
    Ok(secret)
}

/// Asks for a password on the terminal; `None` where there is none. Waits for the user, at most
/// until `control` is cancelled.
pub(crate) async fn ask(question: &str, control: &Control) -> Result<Option<Secret>> {
    let Ok(terminal) = File::options().read(true).write(true).open("/dev/tty") else {
        return Ok(None);
    };
    let (question, control) = (question.to_owned(), control.clone());
    tokio::task::spawn_blocking(move || read_silently(&terminal, &question, &control))
        .await
        .map_err(|e| crate::job::internal("the prompt died", e))?
        .map(Some)
}

/// Asks twice and insists on the same answer, for a password being set.
pub(crate) async fn ask_new(what: &str, control: &Control) -> Result<Option<Secret>> {
    let Some(first) = ask(&format!("New password for {what}: "), control).await? else {
        return Ok(None);
    };
    let second = ask("Again: ", control).await?;
    if second.as_ref() != Some(&first) {
        return Err(Error::new(Kind::Usage, "the two passwords differ"));
    }
    if first.expose().is_empty() {
        return Err(Error::new(Kind::Usage, "the password is empty")
            .hint("use --no-key for a repository without a key"));
    }
    Ok(Some(first))
}

/// Puts the terminal's modes back when it goes.
struct Silence<'a> {
    terminal: &'a File,
    before: Termios,
}

impl<'a> Silence<'a> {
    fn new(terminal: &'a File) -> std::io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut modes = before.clone();
        modes.local_modes.remove(LocalModes::ECHO);
        modes.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(terminal, OptionalActions::Flush, &modes)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(self.terminal, OptionalActions::Flush, &self.before);
    }
}

fn read_silently(terminal: &File, question: &str, control: &Control) -> Result<Secret> {
    let fail = |e: std::io::Error| Error::io("cannot ask on the terminal", e);
    // Silent first: that drops what was typed before, and must not drop the answer.
    let silence = Silence::new(terminal).map_err(fail)?;
    (&*terminal).write_all(question.as_bytes()).map_err(fail)?;
    let wait = Timespec::try_from(POLL).expect("100 ms fit a timespec");
    loop {
        control.check()?;
        let mut set = [PollFd::new(terminal, PollFlags::IN)];
        match poll(&mut set, Some(&wait)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => break,
            Err(error) => return Err(fail(error.into())),
        }
    }
    // A terminal in canonical mode yields one whole line (at most 4096 bytes, N_TTY_BUF_SIZE).
    let mut line = Zeroizing::new(vec![0; 4096]);
    let len = (&*terminal).read(&mut line).map_err(fail)?;
    drop(silence);
    line.truncate(len);
    while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        line.pop();
    }
    Ok(sealed(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_file_loses_one_line_end_only() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (content, password) in
            [("pw", "pw"), ("pw\n", "pw"), ("pw\r\n", "pw"), ("p w \n\n", "p w \n")]
        {
            std::fs::write(file.path(), content).unwrap();
            let read = password_file(file.path(), &Control::new()).await;
            assert_eq!(read.unwrap().expose(), password.as_bytes());
        }
        for content in ["", "\n"] {
            std::fs::write(file.path(), content).unwrap();
            let read = password_file(file.path(), &Control::new()).await;
            assert_eq!(read.unwrap_err().kind(), Kind::Usage);
        }
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_a_secret_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1; 70_000]).unwrap();
        let control = Control::new();
        let kind = async |path: &Path| key_file(path, &control).await.unwrap_err().kind();
        assert_eq!(kind(file.path()).await, Kind::Usage);
        assert_eq!(kind(Path::new("/nonexistent")).await, Kind::NotFound);
    }

    #[test]
    fn a_fifo_that_nobody_writes_to_is_waited_for_until_the_end_only() {
        let base = tempfile::tempdir().unwrap();
        let fifo = base.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let control = Control::new();
        let stopped = runtime.block_on(async {
            let stop = async {
                tokio::task::yield_now().await;
                control.cancel();
            };
            tokio::join!(password_file(&fifo, &control), stop).0
        });
        assert_eq!(stopped.unwrap_err().kind(), Kind::Cancelled);
        // The thread is let go, so that it does not outlive the test.
        drop(File::options().write(true).open(&fifo).unwrap());
    }
}
