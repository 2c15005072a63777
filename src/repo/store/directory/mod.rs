//! A store in a directory of a local file system, NFS or SMB.
//!
//! ```text
//!  create   tmp/<random>          written, write-back started as it streams
//!  finish   fsync(file) → rename without replacing → fsync(directory)       (writer.rs)
//!  list     readdir by the known depth of each folder, sorted
//! ```
//!
//! Everything happens relative to a descriptor of the root that is opened once: should the disk be
//! unplugged or the path be mounted over, calls fail, and nothing is ever created at the path anew.
//! Nothing relies on hard links, O_TMPFILE or d_type. Files are 0600, directories 0700. A time stamp
//! is the modification time, which the file system (of the server, on NFS and SMB) sets; the store's
//! clock is the time stamp of a file made for the purpose.
//!
//! Blocking calls run on the runtime's blocking threads, and none is waited for without end
//! (patience.rs): those that may take long as long as the store answers others. Only the reads of
//! [`BlockingObjects`] are their caller's, who waits for them or leaves them to their thread.
//!
//! What a killed process leaves in `tmp/` is never seen as an object and removed by
//! [`ObjectStore::sweep`]; room that it held has no name (room.rs), and is free as soon as it is gone.

mod patience;
mod room;
mod root;
mod writer;

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{
    BlockingObjects, Folder, NAMES_MAX, ObjectInfo, ObjectName, ObjectStore, ObjectWriter,
    PAGE_MAX, ReadRange, Reservation, StoreResult,
};
use crate::block::Waited;
use crate::block::file::read_cached;
use crate::clock::Timestamp;
use crate::error::Result;
use patience::Patience;
use root::Root;

pub use patience::ANSWER;

/// Whether the directories above a new repository are made, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parents {
    /// They must exist: a typo or an unmounted path is an error.
    MustExist,
    /// They are made: for the default place only.
    Create,
}

/// A store in a directory.
pub struct DirectoryStore {
    root: Arc<Root>,
}

impl fmt::Debug for DirectoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirectoryStore({})", self.root.path.display())
    }
}

impl DirectoryStore {
    /// Opens the directory, which must exist. Whether a repository is in it is not asked here. Each call
    /// is waited for as long as [`ANSWER`].
    pub async fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, ANSWER).await
    }

    /// The same with another longest wait for a call; then it is [`Kind::Timeout`].
    ///
    /// [`Kind::Timeout`]: crate::error::Kind::Timeout
    pub async fn open_with(path: &Path, answer: Duration) -> Result<Self> {
        let path = path.to_owned();
        let patience = patience(&path, answer);
        let calls = Arc::clone(&patience);
        calls.run(move || Root::open(&path, patience)).await.map(Self::of)
    }

    /// Makes the directory, or takes one that is empty, for a new repository. Each call is waited for
    /// as long as [`ANSWER`].
    pub async fn init(path: &Path, parents: Parents) -> Result<Self> {
        Self::init_with(path, parents, ANSWER).await
    }

    /// The same with another longest wait for a call, as in [`DirectoryStore::open_with`].
    pub async fn init_with(path: &Path, parents: Parents, answer: Duration) -> Result<Self> {
        let path = path.to_owned();
        let patience = patience(&path, answer);
        let calls = Arc::clone(&patience);
        calls.run(move || Root::init(&path, parents, patience)).await.map(Self::of)
    }

    fn of(root: Root) -> Self {
        Self { root: Arc::new(root) }
    }

    /// Runs `work` on a blocking thread.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Root>) -> StoreResult<T> + Send + 'static,
    ) -> StoreResult<T> {
        let root = Arc::clone(&self.root);
        self.root.patience.run(move || work(&root)).await
    }

    /// The same for work that takes long where there is much to do.
    async fn run_long<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Root) -> StoreResult<T> + Send + 'static,
    ) -> StoreResult<T> {
        let (root, asked) = (Arc::clone(&self.root), Arc::clone(&self.root));
        let sign = move || {
            let root = Arc::clone(&asked);
            move || root.now().map(drop)
        };
        self.root.patience.run_long(move || work(&root), sign).await
    }
}

fn patience(path: &Path, answer: Duration) -> Arc<Patience> {
    Arc::new(Patience::new(describe(path), answer))
}

fn describe(path: &Path) -> String {
    format!("directory {}", path.display())
}

#[async_trait]
impl ObjectStore for DirectoryStore {
    fn describe(&self) -> String {
        describe(&self.root.path)
    }

    async fn create(&self, name: &ObjectName) -> StoreResult<Box<dyn ObjectWriter>> {
        let name = name.clone();
        let writer = self.run(move |root| writer::Writer::create(root, name)).await?;
        Ok(Box::new(writer))
    }

    async fn read(&self, name: &ObjectName, range: ReadRange) -> StoreResult<Vec<u8>> {
        let name = name.clone();
        self.run(move |root| {
            let error = |e: std::io::Error| root.error("reading", name.as_str(), e);
            let (file, offset, len) = open(root, &name, range)?;
            read_exact_at(&file, offset, len).map_err(error)
        })
        .await
    }

    async fn stat(&self, name: &ObjectName) -> StoreResult<ObjectInfo> {
        let name = name.clone();
        self.run(move |root| stat(root, &name)).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectName>,
        max: usize,
    ) -> StoreResult<Vec<ObjectInfo>> {
        let (prefix, after) = (prefix.to_owned(), after.cloned());
        self.run(move |root| list(root, &prefix, after.as_ref(), max.min(PAGE_MAX))).await
    }

    async fn names(
        &self,
        prefix: &str,
        after: Option<&ObjectName>,
        max: usize,
    ) -> StoreResult<Vec<ObjectName>> {
        let (prefix, after) = (prefix.to_owned(), after.cloned());
        self.run(move |root| names(root, &prefix, after.as_ref(), max.min(NAMES_MAX))).await
    }

    async fn parts(&self, folder: Folder) -> StoreResult<Vec<String>> {
        let mut parts = self.run(move |root| root.names_in(folder.prefix())).await?;
        parts.sort_unstable();
        Ok(parts)
    }

    async fn delete(&self, name: &ObjectName) -> StoreResult<()> {
        let name = name.clone();
        self.run(move |root| {
            match rustix::fs::unlinkat(&root.dir, name.as_str(), AtFlags::empty()) {
                Ok(()) => Ok(()),
                Err(Errno::NOENT) => Err(root.missing(&name)),
                Err(error) => Err(root.error("deleting", name.as_str(), error.into())),
            }
        })
        .await
    }

    /// One call instead of an fsync of every directory that lost an entry: they may be thousands.
    /// Journals keep the order of deletions mostly, but not where an fsync of one directory
    /// overtakes the others (btrfs' log, ext4's fast commits).
    async fn settle_deletions(&self) -> StoreResult<()> {
        let sync = |root: &Root| {
            let synced = rustix::fs::syncfs(&root.dir);
            synced.map_err(|e| root.error("syncing", "deletions", e.into()))
        };
        // Whatever anybody wrote to the file system is part of it.
        self.run_long(sync).await
    }

    async fn now(&self) -> StoreResult<Timestamp> {
        self.run(|root| root.now()).await
    }

    async fn sweep(&self, before: Timestamp) -> StoreResult<u64> {
        self.run_long(move |root| root.sweep(before)).await
    }

    async fn reserve(&self, bytes: u64) -> StoreResult<Box<dyn Reservation>> {
        let room = self.run(move |root| room::Room::take(root, bytes)).await?;
        Ok(Box::new(room))
    }

    async fn room_bytes(&self) -> StoreResult<Option<u64>> {
        self.run(|root| room::free_bytes(root)).await
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingObjects>> {
        Some(self.root.clone())
    }
}

impl BlockingObjects for Root {
    fn read_at(&self, name: &ObjectName, offset: u64, bytes: &mut [u8]) -> StoreResult<Waited> {
        let (file, ..) = open(self, name, ReadRange::Exact { offset, len: bytes.len() as u64 })?;
        let (done, _) = read_cached(&file, offset, bytes);
        if done == bytes.len() {
            return Ok(Waited::No);
        }
        let rest = file.read_exact_at(&mut bytes[done..], offset + done as u64);
        rest.map(|()| Waited::ForDisk).map_err(|e| self.error("reading", name.as_str(), e))
    }
}

/// An object, and where `range` begins in it and how long it is.
fn open(root: &Root, name: &ObjectName, range: ReadRange) -> StoreResult<(File, u64, usize)> {
    let file = root.open_object(name)?;
    let data = file.metadata().map_err(|e| root.error("reading", name.as_str(), e))?;
    let (offset, len) = range.resolve(name, data.len())?;
    Ok((file, offset, len))
}

/// Exactly `len` bytes, into memory that is not zeroed before.
fn read_exact_at(file: &File, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = offset + bytes.len() as u64;
        match rustix::io::pread(file, spare_capacity(&mut bytes), at) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

fn stat(root: &Root, name: &ObjectName) -> StoreResult<ObjectInfo> {
    match rustix::fs::statat(&root.dir, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(info(name, &stat)),
        Err(Errno::NOENT | Errno::NOTDIR) => Err(root.missing(name)),
        Err(error) => Err(root.error("looking at", name.as_str(), error.into())),
    }
}

fn info(name: &ObjectName, stat: &rustix::fs::Stat) -> ObjectInfo {
    let size_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    ObjectInfo { name: name.clone(), size_bytes, stored: root::stored(stat) }
}

/// One page, by descending only into directories that can hold names after `after`.
fn list(
    root: &Root,
    prefix: &str,
    after: Option<&ObjectName>,
    max: usize,
) -> StoreResult<Vec<ObjectInfo>> {
    let mut page = Vec::new();
    for directory in directories(root, prefix, after)? {
        let mut names = names_in(root, &directory, prefix, after)?;
        names.sort_unstable();
        for name in names {
            if page.len() == max {
                return Ok(page);
            }
            match stat(root, &name) {
                Ok(info) => page.push(info),
                // Deleted since the directory was read.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(page)
}

/// The same without looking at the files, of which there may be a million.
fn names(
    root: &Root,
    prefix: &str,
    after: Option<&ObjectName>,
    max: usize,
) -> StoreResult<Vec<ObjectName>> {
    let mut page = Vec::new();
    for directory in directories(root, prefix, after)? {
        let left = max - page.len();
        if left == 0 {
            break;
        }
        let mut names = Vec::new();
        let first = |names: &mut Vec<ObjectName>| {
            // What the next pages are read for again need not be sorted, nor held.
            if names.len() > left {
                names.select_nth_unstable(left);
                names.truncate(left);
            }
        };
        visit(root, &directory, (prefix, after), |name| {
            names.push(name);
            if names.len() >= left.saturating_mul(2) {
                first(&mut names);
            }
        })?;
        first(&mut names);
        names.sort_unstable();
        page.append(&mut names);
    }
    Ok(page)
}

/// The directories that can hold names under `prefix` after `after`, in order.
fn directories(root: &Root, prefix: &str, after: Option<&ObjectName>) -> StoreResult<Vec<String>> {
    let Some(folder) = Folder::ALL.into_iter().find(|f| prefix.starts_with(f.prefix())) else {
        return Ok(Vec::new());
    };
    // Those of the folder itself, or the one the prefix names.
    let nested = matches!(folder, Folder::Packs | Folder::Points | Folder::Runs);
    if !nested {
        return Ok(vec![folder.prefix().to_owned()]);
    }
    let named = prefix.strip_prefix(folder.prefix()).and_then(|rest| rest.split_once('/'));
    if let Some((name, _)) = named {
        return Ok(vec![format!("{}{name}/", folder.prefix())]);
    }
    let after = after.map(ObjectName::as_str);
    let mut directories: Vec<String> = root
        .names_in(folder.prefix())?
        .into_iter()
        .map(|name| format!("{}{name}/", folder.prefix()))
        .filter(|dir| dir.starts_with(prefix))
        // All names of a directory share its prefix: one before `after`'s own can hold none.
        .filter(|dir| after.is_none_or(|after| after.starts_with(dir) || dir.as_str() > after))
        .collect();
    directories.sort_unstable();
    Ok(directories)
}

/// The names in `directory`, in no order.
fn names_in(
    root: &Root,
    directory: &str,
    prefix: &str,
    after: Option<&ObjectName>,
) -> StoreResult<Vec<ObjectName>> {
    let mut names = Vec::new();
    visit(root, directory, (prefix, after), |name| names.push(name))?;
    Ok(names)
}

/// The same one by one.
fn visit(
    root: &Root,
    directory: &str,
    (prefix, after): (&str, Option<&ObjectName>),
    mut take: impl FnMut(ObjectName),
) -> StoreResult<()> {
    root.visit(directory, |name| {
        let name = ObjectName::parse(&format!("{directory}{name}"));
        let name = name.filter(|name| name.as_str().starts_with(prefix));
        if let Some(name) = name.filter(|name| after.is_none_or(|after| name > after)) {
            take(name);
        }
    })
}

/// Permissions of objects: the owner's alone, they hold what the guests hold.
const FILE_MODE: Mode = Mode::from_raw_mode(0o600);

/// Permissions of directories.
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o700);

/// How directories are opened.
const DIRECTORY_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

#[cfg(test)]
mod tests;
