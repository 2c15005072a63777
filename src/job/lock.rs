//! One run per VM on this host: a locked file in the state directory.
//!
//! The lock is the kernel's (`flock`): a killed run leaves none behind. The file says who holds
//! it, for the message the second run gets; it is removed with the lock. The race of "removed
//! between open and lock" is closed by comparing the locked file with the one under the name.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::vm::VmIdentity;

/// A VM held for one run. Released when dropped, or by the kernel when the process ends.
#[derive(Debug)]
pub struct VmLock {
    file: File,
    path: PathBuf,
}

impl VmLock {
    /// Holds `vm` for `what` ("backup into /srv/repo"); [`Kind::Busy`] when another run does.
    pub fn acquire(state_dir: &Path, vm: &VmIdentity, what: &str) -> Result<Self> {
        let path = path_of(state_dir, vm);
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
                Err(Errno::WOULDBLOCK) => return Err(held(file, vm)),
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

/// [`Kind::Busy`] when a run holds `vm` now. Makes nothing; a lock that is free is held for the
/// moment it takes to find out.
pub(super) fn probe(state_dir: &Path, vm: &VmIdentity) -> Result<()> {
    let path = path_of(state_dir, vm);
    let fail = |e| Error::io(format!("cannot examine {}", path.display()), e);
    let file = match File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(fail)?,
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(held(file, vm)),
        Err(error) => Err(fail(error.into())),
    }
}

fn path_of(state_dir: &Path, vm: &VmIdentity) -> PathBuf {
    state_dir.join("locks").join(format!("{}.lock", vm.uuid))
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

fn held(mut file: File, vm: &VmIdentity) -> Error {
    let mut holder = String::new();
    // Only decorates the message.
    let _ = file.rewind().and_then(|()| (&file).take(500).read_to_string(&mut holder));
    let mut message = format!("another run works on {}", vm.name);
    if !holder.is_empty() {
        let _ = write!(message, " ({holder})");
    }
    Error::new(Kind::Busy, message).hint("wait until it has ended, or stop it with SIGTERM")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Uuid;

    fn vm(n: u128) -> VmIdentity {
        VmIdentity {
            uuid: Uuid::from_u128(n),
            name: format!("vm{n}"),
            host: "h".into(),
            platform: "image".into(),
        }
    }

    #[test]
    fn the_same_vm_is_held_once_and_free_again_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let held = VmLock::acquire(dir.path(), &vm(1), "backup into /r").unwrap();
        let _other = VmLock::acquire(dir.path(), &vm(2), "backup into /r").unwrap();
        let error = VmLock::acquire(dir.path(), &vm(1), "backup into /r").unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("backup into /r"), "{error}");
        let error = probe(dir.path(), &vm(1)).unwrap_err();
        assert!(error.to_string().contains("backup into /r"), "{error}");
        drop(held);
        probe(dir.path(), &vm(1)).unwrap();
        drop(VmLock::acquire(dir.path(), &vm(1), "again").unwrap());
        assert!(!dir.path().join("locks").join(format!("{}.lock", vm(1).uuid)).exists());
    }
}
