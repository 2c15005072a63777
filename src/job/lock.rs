//! One run per VM on this host: a locked file in the state directory.
//!
//! The lock is the kernel's (`flock`): a killed run leaves none behind. The file says who holds
//! it, for the message the second run gets; it is removed with the lock. The race of "removed
//! between open and lock" is closed by comparing the locked file with the one under the name.
//!
//! Who waits asks again and again, so that it can be stopped; among several who wait there is no order.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::time::Instant;

use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::vm::{Uuid, VmIdentity};

/// How often a run that waits looks whether the other has ended.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What to do while another run works on the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Fail.
    No,
    /// Wait for its end, and fail if that takes longer.
    AtMost(Duration),
}

/// A wait that several things may take their share of: a QEMU's monitor first, then the VM.
#[derive(Debug)]
pub(super) struct Patience {
    wait: Wait,
    began: Instant,
}

impl Patience {
    /// Begins now.
    pub(super) fn new(wait: Wait) -> Self {
        Self { wait, began: Instant::now() }
    }

    /// What is left of it.
    pub(super) fn left(&self) -> Wait {
        match self.wait {
            Wait::No => Wait::No,
            Wait::AtMost(bound) => Wait::AtMost(bound.saturating_sub(self.began.elapsed())),
        }
    }

    /// Attempts until that fails for another reason than [`Kind::Busy`], or too much time has passed
    /// for a further attempt; who is in the way is said once. Stopped by `control`, which drops an
    /// attempt: it must be cancel-safe.
    pub(super) async fn until_free<T, Attempt>(
        &self,
        control: &Control,
        mut attempt: impl FnMut() -> Attempt,
    ) -> Result<T>
    where
        Attempt: Future<Output = Result<T>>,
    {
        let mut is_told = false;
        loop {
            let error = match control.run(attempt()).await {
                Err(error) if error.kind() == Kind::Busy => error,
                done => return done,
            };
            let Wait::AtMost(bound) = self.wait else { return Err(error) };
            let waited = self.began.elapsed();
            let Some(left) = bound.checked_sub(waited).filter(|left| !left.is_zero()) else {
                let seconds = waited.as_secs();
                return Err(error.context(format!("waited {seconds} s for the end of another run")));
            };
            if !is_told {
                is_told = true;
                control.set_phase("waiting for another run to end");
                let seconds = (left + Duration::from_millis(500)).as_secs();
                let text = format!("{error}: waiting up to {seconds} s for another run to end");
                control.notice(NoticeLevel::Info, text);
            }
            let pause = async {
                tokio::time::sleep(left.min(LOOK_EVERY)).await;
                Ok(())
            };
            control.run(pause).await?;
        }
    }
}

/// A VM held for one run. Released when dropped, or by the kernel when the process ends.
#[derive(Debug)]
pub struct VmLock {
    file: File,
    path: PathBuf,
}

impl VmLock {
    /// The same as [`VmLock::acquire`], after the run that holds the VM has ended if there is to be a
    /// wait. Cancel-safe, and stopped by `control`.
    pub async fn acquire_after(
        wait: Wait,
        state_dir: &Path,
        vm: &VmIdentity,
        what: &str,
        control: &Control,
    ) -> Result<Self> {
        let attempt = || std::future::ready(Self::acquire(state_dir, vm, what));
        Patience::new(wait).until_free(control, attempt).await
    }

    /// Holds `vm` for `what` ("backup into /srv/repo"); [`Kind::Busy`] when another run does.
    pub fn acquire(state_dir: &Path, vm: &VmIdentity, what: &str) -> Result<Self> {
        let path = path_of(state_dir, vm.uuid);
        let directory = path.parent().expect("joined");
        std::fs::create_dir_all(directory)
            .map_err(|e| Error::io(format!("cannot make {}", directory.display()), e))?;
        let fail = |e| Error::io(format!("cannot lock {}", path.display()), e);
        loop {
            let mut file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(fail)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(held(file, &vm.name)),
                Err(error) => return Err(fail(error.into())),
            }
            if !is_at(&file, &path).map_err(fail)? {
                continue;
            }
            file.set_len(0).map_err(fail)?;
            write!(file, "process {}, {what}", std::process::id()).map_err(fail)?;
            return Ok(Self { file, path });
        }
    }
}

/// [`Kind::Busy`] when a run holds the VM now. Makes nothing; a lock that is free is held for the
/// moment it takes to find out.
pub(super) fn probe(state_dir: &Path, (uuid, name): (Uuid, &str)) -> Result<()> {
    let path = path_of(state_dir, uuid);
    let fail = |e| Error::io(format!("cannot examine {}", path.display()), e);
    let file = match File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(fail)?,
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(held(file, name)),
        Err(error) => Err(fail(error.into())),
    }
}

fn path_of(state_dir: &Path, uuid: Uuid) -> PathBuf {
    state_dir.join("locks").join(format!("{uuid}.lock"))
}

impl Drop for VmLock {
    fn drop(&mut self) {
        // Removed while still locked, so that nobody else's file is removed. A file that stays is
        // harmless: it is not locked.
        if is_at(&self.file, &self.path).unwrap_or(false) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Whether `file` is the one that `path` names now.
fn is_at(file: &File, path: &Path) -> std::io::Result<bool> {
    let here = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((here.dev(), here.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn held(mut file: File, name: &str) -> Error {
    let mut holder = String::new();
    // Only decorates the message.
    let _ = file.rewind().and_then(|()| (&file).take(500).read_to_string(&mut holder));
    let mut message = format!("another run works on {name}");
    if !holder.is_empty() {
        let _ = write!(message, " ({holder})");
    }
    Error::new(Kind::Busy, message)
        .hint("wait until it has ended ('--wait' does), or stop it with SIGTERM")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(n: u128) -> VmIdentity {
        VmIdentity {
            uuid: Uuid::from_u128(n),
            name: format!("vm{n}"),
            host: "h".into(),
            platform: "image".into(),
        }
    }

    /// What is busy until it was asked this often, asking taking 5 s as with a QEMU's monitor.
    async fn free_after(asked: u32, patience: &Patience, control: &Control) -> Result<u32> {
        let mut count = 0;
        let attempt = || {
            count += 1;
            let busy = Error::new(Kind::Busy, "held");
            let answer = if count > asked { Ok(count) } else { Err(busy) };
            async move {
                tokio::time::sleep(Duration::from_secs(5)).await;
                answer
            }
        };
        patience.until_free(control, attempt).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_is_for_as_long_as_was_said_whatever_it_is_for() {
        let control = Control::new();
        let error = free_after(1, &Patience::new(Wait::No), &control).await.unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Busy, "held"));
        let patience = Patience::new(Wait::AtMost(Duration::from_secs(60)));
        assert_eq!(free_after(3, &patience, &control).await.unwrap(), 4);
        assert_eq!(control.notices_from(0).len(), 1, "said once");
        let Wait::AtMost(left) = patience.left() else { panic!() };
        assert!(left < Duration::from_secs(41), "{left:?}");
        let error = free_after(u32::MAX, &patience, &control).await.unwrap_err();
        assert!(error.to_string().starts_with("waited 6"), "{error}");
        assert_eq!(error.kind(), Kind::Busy);
        assert_eq!(patience.left(), Wait::AtMost(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_can_be_stopped_also_while_it_asks() {
        let control = Control::new();
        let stop = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            control.cancel();
        };
        let patience = Patience::new(Wait::AtMost(Duration::from_secs(3600)));
        let (waited, ()) = tokio::join!(free_after(u32::MAX, &patience, &control), stop);
        assert_eq!(waited.unwrap_err().kind(), Kind::Cancelled);
        assert_eq!(patience.began.elapsed(), Duration::from_secs(2));
    }

    #[test]
    fn the_same_vm_is_held_once_and_free_again_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let held = VmLock::acquire(dir.path(), &vm(1), "backup into /r").unwrap();
        let _other = VmLock::acquire(dir.path(), &vm(2), "backup into /r").unwrap();
        let error = VmLock::acquire(dir.path(), &vm(1), "backup into /r").unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("backup into /r"), "{error}");
        let error = probe(dir.path(), (vm(1).uuid, "vm1")).unwrap_err();
        assert!(error.to_string().contains("backup into /r"), "{error}");
        drop(held);
        probe(dir.path(), (vm(1).uuid, "vm1")).unwrap();
        drop(VmLock::acquire(dir.path(), &vm(1), "again").unwrap());
        assert!(!dir.path().join("locks").join(format!("{}.lock", vm(1).uuid)).exists());
    }
}
