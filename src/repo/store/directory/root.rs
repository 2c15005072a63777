//! The root directory of a directory store: the one descriptor everything is relative to.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, Dir, FileType, OFlags, Stat};
use rustix::io::Errno;

use super::super::{Folder, ObjectName, StoreError, StoreResult, hex};
use super::patience::Patience;
use super::{DIRECTORY_FLAGS, DIRECTORY_MODE, FILE_MODE, Parents};
use crate::block::file::sync_directory;
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use crate::repo::seal::random;

/// Where objects are written before they have a name. Not a folder of objects.
pub(super) const TEMPORARY: &str = "tmp";

/// An opened root.
pub(super) struct Root {
    /// As given, for messages.
    pub(super) path: PathBuf,
    /// What every call is relative to.
    pub(super) dir: OwnedFd,
    /// Directories (with their slash) known to be durable themselves: made or synced by us.
    durable: Mutex<HashSet<String>>,
    /// The way of renaming without replacing that worked last: a `writer::Way`.
    pub(super) way: AtomicU8,
    /// Waits for the calls.
    pub(super) patience: Arc<Patience>,
}

impl Root {
    pub(super) fn open(path: &Path, patience: Arc<Patience>) -> Result<Self> {
        let dir = rustix::fs::openat(CWD, path, DIRECTORY_FLAGS, DIRECTORY_MODE).map_err(|e| {
            if e == Errno::NOTDIR {
                let message = format!("{} is not a directory", path.display());
                return Error::new(Kind::Usage, message).hint("name a new or empty directory");
            }
            let error = Error::io(format!("cannot open directory {}", path.display()), e.into());
            match error.kind() {
                Kind::NotFound => error.hint("check the path and that its disk is mounted"),
                _ => error,
            }
        })?;
        let path = path.to_owned();
        Ok(Self { path, dir, durable: Mutex::default(), way: AtomicU8::new(0), patience })
    }

    pub(super) fn init(path: &Path, parents: Parents, patience: Arc<Patience>) -> Result<Self> {
        let what = || format!("cannot create directory {}", path.display());
        if parents == Parents::Create
            && let Some(parent) = path.parent()
        {
            std::fs::create_dir_all(parent).map_err(|e| Error::io(what(), e))?;
        }
        match rustix::fs::mkdirat(CWD, path, DIRECTORY_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(Errno::NOENT) => {
                return Err(Error::new(Kind::NotFound, what())
                    .hint("make the directory above it first, or mount the disk it is on")
                    .source(io::Error::from(Errno::NOENT)));
            }
            Err(error) => return Err(Error::io(what(), error.into())),
        }
        let root = Self::open(path, patience)?;
        let names = root.names_in("").map_err(Error::from)?;
        if names.iter().any(|name| name == "config") {
            let message = format!("a repository exists in {}", path.display());
            return Err(Error::new(Kind::AlreadyExists, message)
                .hint("use it, it needs no init, or name another place"));
        }
        let foreign = names.into_iter().find(|name| {
            // What mkfs leaves, and what a failed attempt of ours left.
            ![TEMPORARY, "lost+found", "keys", "points"].contains(&name.as_str())
        });
        let points = Folder::Points.prefix();
        let foreign = match foreign {
            None => root.names_in(points).map_err(Error::from)?.into_iter().next(),
            found => found,
        };
        if let Some(name) = foreign {
            let message = format!("directory {} is not empty ('{name}')", path.display());
            return Err(
                Error::new(Kind::AlreadyExists, message).hint("name a new or empty directory")
            );
        }
        let parent = path.canonicalize().ok().and_then(|p| p.parent().map(Path::to_owned));
        if let Some(parent) = parent {
            let parent = File::open(&parent).and_then(|dir| sync_directory(&dir));
            parent.map_err(|e| Error::io(what(), e))?;
        }
        // From now on its absence is a loss: see `visit`. Durable before there is a configuration.
        root.make_directory(points.trim_end_matches('/')).map_err(Error::from)?;
        root.sync("").map_err(Error::from)?;
        Ok(root)
    }

    /// An operating system error while `doing` something to `object`.
    pub(super) fn error(&self, doing: &str, object: &str, error: io::Error) -> StoreError {
        // ESTALE: the export is gone; ENODEV and ENXIO: the device is.
        let gone = [Errno::STALE, Errno::NODEV, Errno::NXIO].map(Errno::raw_os_error);
        if error.raw_os_error().is_some_and(|code| gone.contains(&code)) || self.is_deleted() {
            return self.unavailable();
        }
        StoreError::io(format!("{doing} {object} in directory {}", self.path.display()), error)
    }

    /// The object is not there; or the store is not.
    pub(super) fn missing(&self, name: &ObjectName) -> StoreError {
        if self.is_deleted() {
            return self.unavailable();
        }
        StoreError::NotFound { name: name.clone() }
    }

    fn unavailable(&self) -> StoreError {
        StoreError::Unavailable { store: format!("directory {}", self.path.display()) }
    }

    /// Whether the directory behind our descriptor was removed.
    fn is_deleted(&self) -> bool {
        rustix::fs::fstat(&self.dir).map_or(true, |stat| stat.st_nlink == 0)
    }

    pub(super) fn open_object(&self, name: &ObjectName) -> StoreResult<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::openat(&self.dir, name.as_str(), flags, FILE_MODE) {
            Ok(fd) => Ok(File::from(fd)),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(self.missing(name)),
            Err(error) => Err(self.error("opening", name.as_str(), error.into())),
        }
    }

    /// What is in `directory` (with its slash; empty for the root), dot files left out. None when
    /// it does not exist: folders are made as they are needed.
    pub(super) fn names_in(&self, directory: &str) -> StoreResult<Vec<String>> {
        let mut names = Vec::new();
        self.visit(directory, |name| names.push(name.to_owned()))?;
        Ok(names)
    }

    /// The same one by one: there may be a million.
    pub(super) fn visit(&self, directory: &str, mut take: impl FnMut(&str)) -> StoreResult<()> {
        self.visit_all(directory, |name| {
            if !name.starts_with('.') {
                take(name);
            }
        })
    }

    /// The same with dot files, but without `.` and `..`.
    fn visit_all(&self, directory: &str, mut take: impl FnMut(&str)) -> StoreResult<()> {
        let error = |e: Errno| self.error("listing", directory, e.into());
        let path = if directory.is_empty() { "." } else { directory };
        let fd = match rustix::fs::openat(&self.dir, path, DIRECTORY_FLAGS, DIRECTORY_MODE) {
            Ok(fd) => fd,
            Err(Errno::NOENT) if self.has_lost_points(directory) => {
                let store = format!("directory {}", self.path.display());
                return Err(StoreError::FolderGone { folder: Folder::Points.prefix(), store });
            }
            Err(Errno::NOENT) if !self.is_deleted() => return Ok(()),
            // A stray file among directories: not ours.
            Err(Errno::NOTDIR) => return Ok(()),
            Err(e) => return Err(error(e)),
        };
        for entry in Dir::new(fd).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if let Some(name) = name.to_str().filter(|name| !matches!(*name, "." | "..")) {
                take(name);
            }
        }
        Ok(())
    }

    /// Whether the folder of the points, which `directory` is or lies in, is gone from a repository
    /// that data was stored in. It is made with the repository; were its absence an empty list,
    /// the collector would free everything because something is not mounted. A repository of no
    /// points may lose it: some programs that copy trees leave empty directories out.
    fn has_lost_points(&self, directory: &str) -> bool {
        let stat = |name: &str| rustix::fs::statat(&self.dir, name, AtFlags::empty());
        directory.starts_with(Folder::Points.prefix())
            && matches!(stat("points"), Err(Errno::NOENT))
            && ["config", "packs"].iter().all(|name| stat(name).is_ok())
    }

    /// A new file in the place for unfinished objects, and its path.
    pub(super) fn create_temporary(&self, label: &str) -> StoreResult<(File, String)> {
        let path = format!("{TEMPORARY}/{label}-{}", hex(&random::<16>()));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(&self.dir, path.as_str(), flags, FILE_MODE);
        let opened = match open() {
            Err(Errno::NOENT) => {
                self.make_directory(TEMPORARY)?;
                open()
            }
            opened => opened,
        };
        let fd = opened.map_err(|e| self.error("creating", &path, e.into()))?;
        Ok((File::from(fd), path))
    }

    /// Makes a directory unless it is there.
    pub(super) fn make_directory(&self, path: &str) -> StoreResult<()> {
        match rustix::fs::mkdirat(&self.dir, path, DIRECTORY_MODE) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(self.error("making", path, error.into())),
        }
    }

    /// Makes the directories above `name`, and makes sure that they survive a power cut, whoever
    /// made them.
    pub(super) fn make_parents(&self, name: &ObjectName) -> StoreResult<()> {
        let mut above = String::new();
        for part in name.as_str().split_inclusive('/').filter(|part| part.ends_with('/')) {
            let directory = format!("{above}{part}");
            if !self.durable().contains(&directory) {
                self.make_directory(&directory)?;
                self.sync(&above)?;
                self.durable().insert(directory.clone());
            }
            above = directory;
        }
        Ok(())
    }

    /// Forgets which directories were durable: one of them vanished.
    pub(super) fn forget_directories(&self) {
        self.durable().clear();
    }

    fn durable(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the entries of `directory` (with its slash; empty for the root) durable.
    pub(super) fn sync(&self, directory: &str) -> StoreResult<()> {
        let path = if directory.is_empty() { "." } else { directory };
        rustix::fs::openat(&self.dir, path, DIRECTORY_FLAGS, DIRECTORY_MODE)
            .map_err(io::Error::from)
            .and_then(|fd| sync_directory(&File::from(fd)))
            .map_err(|e| self.error("syncing", path, e))
    }

    pub(super) fn now(&self) -> StoreResult<Timestamp> {
        let (file, path) = self.create_temporary("clock")?;
        let stat = rustix::fs::fstat(&file);
        let removed = rustix::fs::unlinkat(&self.dir, path.as_str(), AtFlags::empty());
        removed
            .and(stat)
            .map(|s| stored(&s))
            .map_err(|e| self.error("asking", "the clock", e.into()))
    }

    /// Removes unfinished objects older than `before`, also those that somebody else removed while
    /// they were open: NFS and file systems in user space give them names with a dot. One that cannot
    /// be removed keeps none of the others, and is the error in the end.
    pub(super) fn sweep(&self, before: Timestamp) -> StoreResult<u64> {
        let mut names = Vec::new();
        self.visit_all("tmp/", |name| names.push(name.to_owned()))?;
        let mut swept = 0;
        let mut failed = None;
        for name in names {
            let path = format!("{TEMPORARY}/{name}");
            let result = rustix::fs::statat(&self.dir, path.as_str(), AtFlags::SYMLINK_NOFOLLOW)
                .and_then(|stat| {
                    // Nothing of ours is a directory.
                    let is_directory = FileType::from_raw_mode(stat.st_mode).is_dir();
                    if is_directory || stored(&stat) >= before {
                        return Ok(0);
                    }
                    rustix::fs::unlinkat(&self.dir, path.as_str(), AtFlags::empty()).map(|()| 1)
                });
            match result {
                Ok(one) => swept += one,
                // Its writer finished, or another sweep was faster. Or a process of this host has it
                // open, and it goes with that (EBUSY of nfs_sillyrename).
                Err(Errno::NOENT | Errno::BUSY) => {}
                Err(error) => {
                    failed.get_or_insert_with(|| self.error("removing", &path, error.into()));
                }
            }
        }
        failed.map_or(Ok(swept), Err)
    }
}

/// The modification time.
pub(super) fn stored(stat: &Stat) -> Timestamp {
    let nanoseconds = i32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Timestamp::new(stat.st_mtime, nanoseconds).unwrap_or(Timestamp::UNIX_EPOCH)
}
