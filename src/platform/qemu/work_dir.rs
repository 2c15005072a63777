//! The directory of one run: scratch files, and the socket that QEMU makes in it.
//!
//! Readable by nobody but QEMU's user and us: it holds what the guest's disks held. The owner is
//! taken from the monitor socket, which QEMU made. That user owns the directory once it has it, and
//! may be hostile: what is in it is made and given away by descriptor, never by name. Removal is by
//! name and takes the directory with all that is in it; it follows no link.
//!
//! Its file system may hang: nothing here waits for it without an end ([`aside`]).

use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};

use super::names;
use crate::error::{Error, Result};
use crate::journal::Recovery;
use crate::platform::space::{BEFORE, REMOVE, aside};
pub(super) use crate::platform::space::{Question, answers, check_writes, space_of};
use crate::vm::{PointId, Uuid};

/// A run's directory.
#[derive(Clone, Debug)]
pub(super) struct WorkDir {
    path: PathBuf,
    /// The directory that was made, whatever has its name now.
    dir: Arc<File>,
    /// User and group of QEMU.
    owner: (u32, u32),
}

impl WorkDir {
    /// Makes the directory below `base`, for the QEMU behind `monitor`. After a
    /// [`Kind::Timeout`](crate::error::Kind::Timeout) it may come yet.
    pub(super) async fn create(
        base: &Path,
        monitor: &Path,
        vm: Uuid,
        point: PointId,
    ) -> Result<Self> {
        let (at, monitor) = (base.to_owned(), monitor.to_owned());
        aside(base, BEFORE, move || Self::make(&at, &monitor, vm, point)).await?
    }

    fn make(base: &Path, monitor: &Path, vm: Uuid, point: PointId) -> Result<Self> {
        let socket = fs::metadata(monitor)
            .map_err(|error| Error::io(format!("cannot look at {}", monitor.display()), error))?;
        let owner = (socket.uid(), socket.gid());
        let path = names::work_dir(base, vm, point);
        let dir = make_directory(&path).and_then(|dir| hand_over(&dir, owner).map(|()| dir));
        let dir = dir.map_err(|error| {
            Error::io(format!("cannot make the scratch directory {}", path.display()), error)
                .hint("give a local directory that QEMU may write to (--scratch-dir)")
        })?;
        Ok(Self { path, dir: Arc::new(dir), owner })
    }

    /// Where the socket of the exports goes.
    pub(super) fn socket(&self) -> Result<PathBuf> {
        names::socket_path(&self.path)
    }

    /// Where it will be.
    pub(super) fn path(base: &Path, vm: Uuid, point: PointId) -> PathBuf {
        names::work_dir(base, vm, point)
    }

    /// The directory itself.
    pub(super) fn scratch_dir(&self) -> &Path {
        &self.path
    }

    /// Makes a disk's scratch file: a hole of exactly the disk's size, as the job demands.
    pub(super) async fn create_scratch(&self, disk: usize, size_bytes: u64) -> Result<PathBuf> {
        let own = self.clone();
        aside(&self.path, BEFORE, move || own.make_scratch(disk, size_bytes)).await?
    }

    fn make_scratch(&self, disk: usize, size_bytes: u64) -> Result<PathBuf> {
        let path = scratch_file(&self.path, disk);
        let create = || {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            let mode = Mode::RUSR | Mode::WUSR;
            let file: File =
                openat(&*self.dir, scratch_name(disk), flags | OFlags::CLOEXEC, mode)?.into();
            file.set_len(size_bytes)?;
            hand_over(&file, self.owner)
        };
        let what = || format!("cannot make the scratch file {}", path.display());
        create().map_err(|error: io::Error| Error::io(what(), error))?;
        Ok(path)
    }

    /// Removes the directory and what is in it. What is gone already is no error.
    pub(super) async fn remove(&self) -> Result<()> {
        remove_aside(self.path.clone()).await
    }
}

/// Where a disk's scratch file is in the directory of a run.
pub(super) fn scratch_file(directory: &Path, disk: usize) -> PathBuf {
    directory.join(scratch_name(disk))
}

/// Removes the directories that dead runs on `vm` left below `base`.
pub(super) async fn sweep(base: &Path, vm: Uuid, recovery: &mut Recovery) -> Result<()> {
    let at = base.to_owned();
    for path in aside(base, BEFORE, move || left(&at, vm)).await?? {
        if recovery.undo(format!("scratch directory {}", path.display())) {
            remove_aside(path).await?;
        }
    }
    Ok(())
}

fn left(base: &Path, vm: Uuid) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::io(format!("cannot look into {}", base.display()), error);
    let mut left = Vec::new();
    for entry in fs::read_dir(base).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_dir = entry.file_type().map_err(failed)?.is_dir();
        let ours = entry.file_name().to_str().is_some_and(|name| names::is_work_dir(name, vm));
        if is_dir && ours {
            left.push(entry.path());
        }
    }
    Ok(left)
}

fn scratch_name(disk: usize) -> String {
    format!("{disk}.raw")
}

/// Makes a directory and opens it: what is open is what was made, empty and nobody else's.
fn make_directory(path: &Path) -> io::Result<File> {
    mkdirat(CWD, path, Mode::RWXU)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir: File = openat(CWD, path, flags, Mode::empty())?.into();
    let there = dir.metadata()?;
    let is_ours = there.uid() == rustix::process::geteuid().as_raw();
    // In a directory of somebody else the name may have changed hands.
    if !is_ours || there.mode() & 0o077 != 0 {
        return Err(io::Error::other("somebody else has replaced it"));
    }
    Ok(dir)
}

/// Gives QEMU's user what is open. By descriptor, because that user may put a link to a file of
/// ours under any name in its directory.
fn hand_over(file: &File, owner: (u32, u32)) -> io::Result<()> {
    let ours: Metadata = file.metadata()?;
    if (ours.uid(), ours.gid()) == owner {
        return Ok(());
    }
    match fchown(file, Some(owner.0), Some(owner.1)) {
        // Not root, and QEMU is somebody else: the group is all we can share with.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let mode = if ours.is_dir() { 0o770 } else { 0o660 };
            file.set_permissions(Permissions::from_mode(mode))
        }
        result => result,
    }
}

async fn remove_aside(path: PathBuf) -> Result<()> {
    let own = path.clone();
    aside(&path, REMOVE, move || remove(&own)).await?
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
    use crate::journal::Mode;

    #[tokio::test]
    async fn a_run_leaves_nothing_and_the_sweep_takes_only_its_own() {
        let base = tempfile::tempdir().unwrap();
        let monitor = base.path().join("m.sock");
        fs::write(&monitor, "").unwrap();
        let (vm, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let make = |vm, n| WorkDir::make(base.path(), &monitor, vm, PointId([n; 16])).unwrap();
        let (run, dead, foreign) = (make(vm, 1), make(vm, 2), make(other, 3));
        let scratch = run.make_scratch(0, 12345).unwrap();
        let meta = fs::metadata(&scratch).unwrap();
        assert_eq!((meta.len(), meta.blocks(), meta.mode() & 0o7777), (12345, 0, 0o600));
        assert_eq!(fs::metadata(&run.path).unwrap().mode() & 0o7777, 0o700);
        run.remove().await.unwrap();
        run.remove().await.unwrap();
        assert!(!run.path.exists());
        dead.make_scratch(0, 1).unwrap();
        let mut recovery = Recovery::new(Mode::Look);
        sweep(base.path(), vm, &mut recovery).await.unwrap();
        assert_eq!(recovery.into_items().len(), 1);
        assert!(dead.path.exists());
        sweep(base.path(), vm, &mut Recovery::new(Mode::Undo)).await.unwrap();
        assert!(!dead.path.exists() && foreign.path.exists());
    }

    #[test]
    fn what_the_owner_of_the_directory_puts_there_is_not_touched() {
        let base = tempfile::tempdir().unwrap();
        let monitor = base.path().join("m.sock");
        fs::write(&monitor, "").unwrap();
        let run =
            WorkDir::make(base.path(), &monitor, Uuid::from_u128(1), PointId([1; 16])).unwrap();
        let secret = base.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        std::os::unix::fs::symlink(&secret, scratch_file(run.scratch_dir(), 0)).unwrap();
        assert!(run.make_scratch(0, 1).is_err());
        // The whole directory changes hands after it was made.
        fs::rename(&run.path, base.path().join("moved")).unwrap();
        fs::create_dir(base.path().join("trap")).unwrap();
        std::os::unix::fs::symlink(base.path().join("trap"), &run.path).unwrap();
        run.make_scratch(1, 1).unwrap();
        assert_eq!(fs::read_dir(base.path().join("trap")).unwrap().count(), 0);
        assert!(base.path().join("moved").join("1.raw").exists());
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
    }

    #[test]
    fn a_file_is_given_away_by_its_descriptor() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let (name, secret) = (base.path().join("0.raw"), base.path().join("secret"));
        let file = File::create_new(&name).unwrap();
        fs::write(&secret, "").unwrap();
        fs::remove_file(&name).unwrap();
        std::os::unix::fs::symlink(&secret, &name).unwrap();
        hand_over(&file, (12345, 12345)).unwrap();
        assert_eq!(fs::metadata(&secret).unwrap().uid(), 0);
        assert_eq!(file.metadata().unwrap().uid(), 12345);
    }
}
