//! The directory of one run: scratch files, and the socket that QEMU makes in it.
//!
//! Readable by nobody but QEMU's user and us: it holds what the guest's disks held. The owner is
//! taken from the monitor socket, which QEMU made. Removal follows no link: it removes the names
//! we gave and the directory, nothing else.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::names;
use crate::error::{Error, Result};
use crate::vm::{PointId, Uuid};

/// A run's directory.
#[derive(Debug)]
pub(super) struct WorkDir {
    path: PathBuf,
    /// User and group of QEMU.
    owner: (u32, u32),
}

impl WorkDir {
    /// Makes the directory below `base`, for the QEMU behind `monitor`.
    pub(super) fn create(base: &Path, monitor: &Path, vm: Uuid, point: PointId) -> Result<Self> {
        let socket = fs::metadata(monitor)
            .map_err(|error| Error::io(format!("cannot look at {}", monitor.display()), error))?;
        let path = names::work_dir(base, vm, point);
        let failed = |error| {
            Error::io(format!("cannot make the scratch directory {}", path.display()), error)
                .hint("give a local directory that QEMU may write to (--scratch-dir)")
        };
        DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        let dir = Self { path: path.clone(), owner: (socket.uid(), socket.gid()) };
        dir.hand_over(&dir.path).map_err(failed)?;
        Ok(dir)
    }

    /// Where the socket of the exports goes.
    pub(super) fn socket(&self) -> Result<PathBuf> {
        names::socket_path(&self.path)
    }

    /// Where a disk's scratch file is.
    pub(super) fn scratch(&self, disk: usize) -> PathBuf {
        self.path.join(format!("{disk}.raw"))
    }

    /// Makes a disk's scratch file: a hole of exactly the disk's size, as the job demands.
    pub(super) fn create_scratch(&self, disk: usize, size_bytes: u64) -> Result<PathBuf> {
        let path = self.scratch(disk);
        let create = || {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.set_len(size_bytes)?;
            self.hand_over(&path)
        };
        let what = || format!("cannot make the scratch file {}", path.display());
        create().map_err(|error| Error::io(what(), error))?;
        Ok(path)
    }

    fn hand_over(&self, path: &Path) -> std::io::Result<()> {
        let ours = fs::symlink_metadata(path)?;
        if (ours.uid(), ours.gid()) == self.owner {
            return Ok(());
        }
        match chown(path, Some(self.owner.0), Some(self.owner.1)) {
            // Not root, and QEMU is somebody else: the group is all we can share with.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let mode = if ours.is_dir() { 0o770 } else { 0o660 };
                fs::set_permissions(path, Permissions::from_mode(mode))
            }
            result => result,
        }
    }

    /// Removes the directory and what is in it. What is gone already is no error.
    pub(super) fn remove(&self) -> Result<()> {
        remove(&self.path)
    }
}

/// Removes the directories that dead runs on `vm` left below `base`; how many there were.
pub(super) fn sweep(base: &Path, vm: Uuid) -> Result<usize> {
    let failed = |error| Error::io(format!("cannot look into {}", base.display()), error);
    let mut count = 0;
    for entry in fs::read_dir(base).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_dir = entry.file_type().map_err(failed)?.is_dir();
        if is_dir && entry.file_name().to_str().is_some_and(|name| names::is_work_dir(name, vm)) {
            remove(&entry.path())?;
            count += 1;
        }
    }
    Ok(count)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove the scratch directory {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_leaves_nothing_and_the_sweep_takes_only_its_own() {
        let base = tempfile::tempdir().unwrap();
        let monitor = base.path().join("m.sock");
        fs::write(&monitor, "").unwrap();
        let (vm, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let make = |vm, n| WorkDir::create(base.path(), &monitor, vm, PointId([n; 16])).unwrap();
        let (run, dead, foreign) = (make(vm, 1), make(vm, 2), make(other, 3));
        let scratch = run.create_scratch(0, 12345).unwrap();
        let meta = fs::metadata(&scratch).unwrap();
        assert_eq!((meta.len(), meta.blocks(), meta.mode() & 0o7777), (12345, 0, 0o600));
        assert_eq!(fs::metadata(&run.path).unwrap().mode() & 0o7777, 0o700);
        run.remove().unwrap();
        run.remove().unwrap();
        assert!(!run.path.exists());
        dead.create_scratch(0, 1).unwrap();
        assert_eq!(sweep(base.path(), vm).unwrap(), 1);
        assert!(!dead.path.exists() && foreign.path.exists());
    }
}
