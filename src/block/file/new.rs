//! A file that appears under its name only when it is complete and durable.
//!
//! ```text
//!  create ──► .NAME.XXXXXX.part (mode 0600, all hole) ──► sink ──► commit: sync, rename, sync dir
//!                        │                                  └────► abort: removed
//!                        └── dropped: removed as well
//! ```
//!
//! One that replaces another has its owner and rights, unless others may have made that one
//! ([`take_over`]), and where that is reached by a link takes the place of what it leads to.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempPath;

use super::{FileSink, Placed, blocking, followed, parent, sync_directory_of, take_over};
use crate::block::BlockSink;
use crate::error::{Error, Kind, Result};

/// Most copies kept under one name: somebody should have looked by then.
const BESIDE_MAX: u32 = 99;

/// What to do with a file that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Fail, both when the new file is begun and, race-free, when it is committed.
    Refuse,
    /// Replace it, at the moment the new one is complete. Links are followed; owner and rights stay,
    /// unless others may have made it ([`take_over`]).
    Replace,
}

/// Whether a file survives a power cut once it has its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Yes: nothing existing is lost for something that is not there yet.
    Synced,
    /// When the system gets round to it.
    Cached,
}

/// A raw image in the making.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    temporary: TempPath,
    existing: Existing,
    sink: Arc<FileSink>,
}

impl NewFile {
    /// Begins a sparse file of `size_bytes` that will be `path`. Its directory must exist.
    pub fn create(path: &Path, size_bytes: u64, existing: Existing) -> Result<Self> {
        Self::begin(path, Some(size_bytes), existing, None)
    }

    /// The same with a temporary name that is known before: in the same directory (of what `path`
    /// leads to: [`followed`]), and of nothing else; one that is free if not given.
    pub fn create_as(
        path: &Path,
        size_bytes: u64,
        existing: Existing,
        temporary: Option<&Path>,
    ) -> Result<Self> {
        Self::begin(path, Some(size_bytes), existing, temporary)
    }

    /// The same as [`NewFile::create`] for content whose size is not known yet:
    /// [`NewFile::set_len`] tells it.
    pub fn create_unsized(path: &Path, existing: Existing) -> Result<Self> {
        Self::begin(path, None, existing, None)
    }

    fn begin(
        path: &Path,
        size_bytes: Option<u64>,
        existing: Existing,
        given: Option<&Path>,
    ) -> Result<Self> {
        refuse_special(path)?;
        let path = &match existing {
            Existing::Refuse if path.symlink_metadata().is_ok() => return Err(exists(path)),
            Existing::Refuse => path.to_owned(),
            Existing::Replace => followed(path)?,
        };
        let Some(name) = path.file_name() else {
            let message = format!("'{}' does not name a file", path.display());
            return Err(Error::new(Kind::Usage, message));
        };
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        match given.and_then(Path::file_name) {
            Some(name) => builder.prefix(name).rand_bytes(0),
            None => builder.prefix(&prefix).suffix(".part"),
        };
        // tempfile makes it with mode 0600: a disk is full of other people's secrets.
        let (file, temporary) = builder
            .tempfile_in(parent(path))
            .map_err(|e| Error::io(format!("cannot create {}", path.display()), e))?
            .into_parts();
        if existing == Existing::Replace {
            take_over(path, &file)?;
        }
        let sink = Arc::new(FileSink::on_new(file, path, size_bytes)?);
        Ok(Self { path: path.clone(), temporary, existing, sink })
    }

    /// Where the bytes go.
    pub fn sink(&self) -> Arc<FileSink> {
        Arc::clone(&self.sink)
    }

    /// Gives the file its final length, which a source without a known size tells only at its end:
    /// what was written lies below it.
    pub fn set_len(&self, size_bytes: u64) -> Result<()> {
        self.sink.set_len(size_bytes)
    }

    /// The name it is to get.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another handle of the file, for tools that write to it: in a directory of somebody else its
    /// name may lead elsewhere.
    pub fn descriptor(&self) -> std::io::Result<OwnedFd> {
        self.sink.handle().map(OwnedFd::from)
    }

    /// The name of the temporary file.
    pub fn temporary_path(&self) -> &Path {
        &self.temporary
    }

    /// Makes the file durable and gives it its name. On an error nothing new is under the name.
    /// Not cancel-safe: dropped midway, the file may or may not have its name.
    pub async fn commit(self) -> Result<()> {
        self.publish(Durability::Synced).await
    }

    /// The same, durable only if asked for.
    pub async fn publish(self, durability: Durability) -> Result<()> {
        if durability == Durability::Synced {
            self.sink.flush().await?;
        }
        let Self { path, temporary, existing, sink } = self;
        blocking(move || {
            check_unmoved(&sink, &temporary)?;
            let renamed = match existing {
                Existing::Refuse => temporary.persist_noclobber(&path),
                Existing::Replace => temporary.persist(&path),
            };
            renamed.map_err(|e| match e.error.kind() {
                std::io::ErrorKind::AlreadyExists => exists(&path),
                _ => Error::io(format!("cannot rename to {}", path.display()), e.error),
            })?;
            if durability == Durability::Cached {
                return Ok(());
            }
            sync_directory_of(&path)
        })
        .await
    }

    /// Makes the file durable under its temporary name.
    pub async fn sync(&self) -> Result<()> {
        self.sink.flush().await
    }

    /// Gives a file that was synced its name, and keeps what had it until that is decided on; the
    /// name is not synced yet. On an error everything is as it was, but for the new file, which is
    /// removed. Not cancel-safe.
    pub async fn place(self) -> Result<Placed> {
        let Self { path, temporary, existing, sink } = self;
        blocking(move || {
            check_unmoved(&sink, &temporary)?;
            let placed = Placed::place(&temporary, &path, existing)?;
            // Under the temporary name is nothing now, or what must not be lost.
            let _ = temporary.keep();
            Ok(placed)
        })
        .await
    }

    /// Gives a file that was synced a name beside the one it was made for: that name with `suffix`,
    /// and a number where that is taken. When it cannot have one, it stays under its temporary name,
    /// which the error tells. Not cancel-safe.
    pub async fn keep_beside(self, suffix: &str) -> Result<PathBuf> {
        let Self { path, mut temporary, sink, .. } = self;
        let suffix = suffix.to_owned();
        blocking(move || {
            check_unmoved(&sink, &temporary)?;
            for number in 1..=BESIDE_MAX {
                let mut name = path.clone().into_os_string();
                name.push(&suffix);
                if number > 1 {
                    name.push(format!("-{number}"));
                }
                let beside = PathBuf::from(name);
                match temporary.persist_noclobber(&beside) {
                    Ok(()) => {
                        sync_directory_of(&beside)?;
                        return Ok(beside);
                    }
                    Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
                        temporary = error.path;
                    }
                    Err(error) => {
                        let message = format!(
                            "cannot rename {} to {}",
                            error.path.display(),
                            beside.display()
                        );
                        // Complete, and perhaps hours of copying.
                        let _ = error.path.keep();
                        return Err(Error::io(message, error.error));
                    }
                }
            }
            let left = temporary.display().to_string();
            let _ = temporary.keep();
            Err(exists(&path).context(format!("the copy stays as {left}")))
        })
        .await
    }

    /// Removes what was written.
    pub fn abort(self) -> Result<()> {
        let path = self.temporary.to_path_buf();
        self.temporary
            .close()
            .map_err(|e| Error::io(format!("cannot remove {}", path.display()), e))
    }
}

/// Fails when `path` is, or leads to, something that a file never takes the place of: a device, a
/// FIFO, a socket, a directory.
pub fn refuse_special(path: &Path) -> Result<()> {
    match path.metadata() {
        Ok(there) if !there.is_file() => {
            let message = format!("{} is no file, and is not replaced by one", path.display());
            Err(Error::new(Kind::AlreadyExists, message).hint("choose another name"))
        }
        _ => Ok(()),
    }
}

/// Fails when the temporary name is no longer that of the file that was written.
fn check_unmoved(sink: &FileSink, temporary: &Path) -> Result<()> {
    let failed = |e| Error::io(format!("cannot find {}", temporary.display()), e);
    let written = sink.handle().and_then(|file| file.metadata()).map_err(failed)?;
    let named = temporary.symlink_metadata().map_err(failed)?;
    if (written.dev(), written.ino()) == (named.dev(), named.ino()) {
        return Ok(());
    }
    let message = format!("{} was replaced while it was written", temporary.display());
    Err(Error::new(Kind::Io, message)
        .hint("somebody else changes names in this directory: choose one that is only yours"))
}

fn exists(path: &Path) -> Error {
    Error::new(Kind::AlreadyExists, format!("{} exists", path.display()))
        .hint("choose another name, or --force to replace it")
}
