//! Something new under a name, with what had the name before kept until it is known to be good.
//!
//! ```text
//!  place: NAME ◄─ exchange ─► temporary ──► discard: the old one is removed
//!                                    └────► put_back: exchanged again, the new one is removed
//! ```
//!
//! With `RENAME_EXCHANGE` one of the two is whole under the name at every moment, also for
//! directories. Dropped, nothing is removed: both stay where they are. After a power cut the old
//! one may be left under the temporary name.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::Existing;
use crate::error::{Error, Kind, Result};

/// A file or directory that took its name, and the one that had it.
#[derive(Debug)]
#[must_use = "the old one is neither kept nor removed"]
pub struct Placed {
    path: PathBuf,
    old: Option<PathBuf>,
}

impl Placed {
    /// Gives `temporary`, which is complete and durable, the name `path`. On an error both are as
    /// they were. The name is durable after [`Placed::sync`] only: were it synced here, an error
    /// would lose track of what took its name. Blocks.
    pub fn place(temporary: &Path, path: &Path, existing: Existing) -> Result<Self> {
        let failed = |e| Error::io(format!("cannot rename to {}", path.display()), e);
        let placed = |old| Self { path: path.to_owned(), old };
        match renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(placed(None)),
            Err(Errno::EXIST) if existing == Existing::Refuse => return Err(exists(path)),
            Err(Errno::EXIST) => {}
            // Not every file system has the flags (NFS has not).
            Err(Errno::INVAL | Errno::NOSYS) => {
                return Self::without_exchange(temporary, path, existing);
            }
            Err(error) => return Err(failed(error.into())),
        }
        let is_directory = |path: &Path| path.symlink_metadata().map(|data| data.is_dir());
        let is_directory_now = is_directory(path).map_err(failed)?;
        if !is_directory_now {
            super::refuse_special(path)?;
        }
        if is_directory(temporary).map_err(failed)? != is_directory_now {
            let message =
                format!("{} is in the way and not of the kind it should be", path.display());
            return Err(Error::new(Kind::AlreadyExists, message).hint("move it away"));
        }
        match renameat_with(CWD, temporary, CWD, path, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(placed(Some(temporary.to_owned()))),
            Err(Errno::INVAL | Errno::NOSYS) => Self::without_exchange(temporary, path, existing),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The old one gets a second name, then the new one takes the first. Files only: directories
    /// have no second names.
    fn without_exchange(temporary: &Path, path: &Path, existing: Existing) -> Result<Self> {
        let failed = |e| Error::io(format!("cannot rename to {}", path.display()), e);
        if existing == Existing::Refuse {
            return match fs::hard_link(temporary, path) {
                Ok(()) => match fs::remove_file(temporary) {
                    Ok(()) => Ok(Self { path: path.to_owned(), old: None }),
                    Err(error) => {
                        // Only its second name goes.
                        let _ = fs::remove_file(path);
                        Err(failed(error))
                    }
                },
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(exists(path)),
                Err(error) => Err(failed(error)),
            };
        }
        let aside = Self::aside(temporary);
        let old = match fs::hard_link(path, &aside) {
            Ok(()) => Some(aside),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        if let Err(error) = fs::rename(temporary, path) {
            if let Some(old) = old {
                // Only its second name goes.
                let _ = fs::remove_file(old);
            }
            return Err(failed(error));
        }
        Ok(Self { path: path.to_owned(), old })
    }

    /// What a process that is gone has placed: the one that has the name now, and the one that had it,
    /// which is `old` now.
    pub fn found(path: PathBuf, old: PathBuf) -> Self {
        Self { path, old: Some(old) }
    }

    /// The name that the old one gets where it cannot change places with the new one.
    pub fn aside(temporary: &Path) -> PathBuf {
        let mut aside = temporary.as_os_str().to_owned();
        aside.push(".old");
        PathBuf::from(aside)
    }

    /// Makes the name durable: it is when its directory is. Blocks.
    pub fn sync(&self) -> Result<()> {
        super::sync_directory_of(&self.path)
    }

    /// The name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether something had the name before.
    pub fn replaces(&self) -> bool {
        self.old.is_some()
    }

    /// The old one gets its name back and the new one is removed. What replaced nothing stays.
    /// Blocks.
    pub fn put_back(self) -> Result<()> {
        let Self { path, old: Some(old) } = self else { return Ok(()) };
        let failed = |e| {
            let message = format!("cannot put the old {} back", path.display());
            Error::io(message, e).hint(format!("it is whole, as {}", old.display()))
        };
        match renameat_with(CWD, &old, CWD, &path, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOSYS) => {
                fs::rename(&old, &path).map_err(failed)?;
                return super::sync_directory_of(&path);
            }
            Err(error) => return Err(failed(error.into())),
        }
        // Only when the old one has its name for good does the new one go.
        super::sync_directory_of(&path)?;
        remove(&old).map_err(|e| {
            Error::io(format!("cannot remove {}, the new {}", old.display(), path.display()), e)
                .hint("the old one is back; remove the other by hand")
        })
    }

    /// Removes the old one: the new one is good. Blocks.
    pub fn discard(self) -> Result<()> {
        let Some(old) = self.old else { return Ok(()) };
        remove(&old).map_err(|e| {
            Error::io(format!("cannot remove {}, which was replaced", old.display()), e)
                .hint("remove it by hand")
        })
    }
}

fn remove(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

fn exists(path: &Path) -> Error {
    Error::new(Kind::AlreadyExists, format!("{} exists", path.display()))
        .hint("choose another name, or --force to replace it")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two(directory: &Path) -> (PathBuf, PathBuf) {
        let (new, name) = (directory.join(".new"), directory.join("name"));
        fs::write(&new, "new").unwrap();
        fs::write(&name, "old").unwrap();
        (new, name)
    }

    #[test]
    fn the_old_one_stays_until_it_is_discarded() {
        let base = tempfile::tempdir().unwrap();
        let (new, name) = two(base.path());
        let placed = Placed::place(&new, &name, Existing::Replace).unwrap();
        assert!(placed.replaces());
        assert_eq!(fs::read(&name).unwrap(), b"new");
        assert_eq!(fs::read(&new).unwrap(), b"old");
        placed.discard().unwrap();
        assert!(!new.exists());
    }

    #[test]
    fn what_was_replaced_is_put_back_on_any_file_system() {
        for place in [Placed::place, Placed::without_exchange] {
            let base = tempfile::tempdir().unwrap();
            let (new, name) = two(base.path());
            place(&new, &name, Existing::Replace).unwrap().put_back().unwrap();
            assert_eq!(fs::read(&name).unwrap(), b"old");
            assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
            fs::write(&new, "new").unwrap();
            let error = place(&new, &name, Existing::Refuse).unwrap_err();
            assert_eq!(error.kind(), Kind::AlreadyExists);
            assert_eq!(fs::read(&name).unwrap(), b"old");
            fs::remove_file(&name).unwrap();
            place(&new, &name, Existing::Refuse).unwrap().put_back().unwrap();
            assert_eq!(fs::read(&name).unwrap(), b"new", "it replaced nothing");
        }
    }

    #[test]
    fn a_directory_takes_the_place_of_a_directory_only() {
        let base = tempfile::tempdir().unwrap();
        let (new, name) = (base.path().join("new"), base.path().join("name"));
        for directory in [&new, &name] {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join(directory.file_name().unwrap()), "").unwrap();
        }
        Placed::place(&new, &name, Existing::Replace).unwrap().put_back().unwrap();
        assert!(name.join("name").exists() && !new.exists());
        fs::write(&new, "").unwrap();
        assert!(Placed::place(&new, &name, Existing::Replace).is_err());
        assert!(name.join("name").exists() && new.exists());
    }
}
