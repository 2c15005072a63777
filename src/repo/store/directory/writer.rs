//! Creating an object in a directory: a temporary file, made durable, then given its name.
//!
//! The name is given without replacing anything, in the first of these ways that the file system
//! has, tried in this order and remembered:
//!
//! 1. `renameat2(RENAME_NOREPLACE)`: local file systems, SMB.
//! 2. `link` then `unlink`: NFS (nfs_rename refuses flags), which has hard links.
//! 3. A claim: `tmp/claim-<name>` made with `O_EXCL`; whoever made it and then finds no object of
//!    the name may rename. A claim that a crash leaves is removed by the sweep; until then creators
//!    of that very name are told that it exists, and names are not used twice.
//!
//! A failed fsync loses the object: the kernel may have dropped the dirty pages, so a second one
//! that succeeds proves nothing. Large objects go past the page cache where that is worth it: what
//! was backed up is not read soon, and the cache belongs to the host's guests. Elsewhere write-back
//! starts while the object streams in, so that the final fsync waits for the last megabytes only.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use rustix::fs::{Advice, AtFlags, OFlags, RenameFlags, Stat};
use rustix::io::Errno;

use super::super::{ObjectInfo, ObjectName, ObjectWriter, StoreError, StoreResult};
use super::patience::Aside;
use super::root::{Root, TEMPORARY};
use super::{FILE_MODE, info};
use crate::block::file::{Bypass, Gather};

/// Bytes gathered for one write.
const WRITE_BYTES: usize = 1 << 20;

/// Write-back is started whenever this much has been written since the last time.
const WRITE_BACK_BYTES: u64 = 8 << 20;

/// How a name is given without replacing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Way {
    Rename = 0,
    Link = 1,
    Claim = 2,
}

impl Way {
    const ALL: [Self; 3] = [Self::Rename, Self::Link, Self::Claim];
}

/// An object being written. The file moves into each blocking call and back; a caller who drops
/// a future meanwhile leaves nobody to hand it back to, and it is removed.
pub(super) struct Writer {
    temporary: Option<Aside<Temporary>>,
}

/// A temporary file, removed when dropped.
struct Temporary {
    root: Arc<Root>,
    name: ObjectName,
    file: File,
    path: String,
    /// Opened with the first full write: small objects have no use for it.
    bypass: Option<Bypass>,
    gathered: Gather,
    written_bytes: u64,
    flushing_bytes: u64,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    /// The path is there and ours to remove.
    Present,
    /// The path is gone: renamed or removed.
    Gone,
}

impl Writer {
    pub(super) fn create(root: &Arc<Root>, name: ObjectName) -> StoreResult<Self> {
        let (file, path) = root.create_temporary("new")?;
        let temporary = Temporary {
            root: Arc::clone(root),
            name,
            file,
            path,
            bypass: None,
            gathered: Gather::new(WRITE_BYTES),
            written_bytes: 0,
            flushing_bytes: 0,
            state: State::Present,
        };
        Ok(Self { temporary: Some(Aside::new(temporary)) })
    }

    fn take(&mut self) -> StoreResult<Aside<Temporary>> {
        self.temporary.take().ok_or_else(used_up)
    }
}

fn used_up() -> StoreError {
    StoreError::io(
        "writing an object after an error",
        std::io::Error::other("the writer was used after an error"),
    )
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: &[u8]) -> StoreResult<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let gathered = &mut self.temporary.as_mut().ok_or_else(used_up)?.gathered;
            rest = gathered.fill(rest);
            if gathered.is_full() {
                let temporary = self.take()?;
                let (temporary, ()) = apart(temporary, Temporary::write_gathered).await?;
                self.temporary = Some(temporary);
            }
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> StoreResult<ObjectInfo> {
        let (temporary, stat) = apart(self.take()?, Temporary::make_durable).await?;
        // A call of its own: what is given up, or dropped, until here never gets its name.
        let root = Arc::clone(&temporary.root);
        root.patience.run(move || temporary.into_inner().give_name(&stat)).await
    }

    async fn abort(mut self: Box<Self>) -> StoreResult<()> {
        // After a failed write the file is removed already.
        let Some(temporary) = self.temporary.take() else { return Ok(()) };
        let root = Arc::clone(&temporary.root);
        root.patience.run(move || temporary.into_inner().remove()).await
    }
}

/// Works on the file on a blocking thread, which also removes it if that fails.
async fn apart<T: Send + 'static>(
    temporary: Aside<Temporary>,
    work: impl FnOnce(&mut Temporary) -> StoreResult<T> + Send + 'static,
) -> StoreResult<(Aside<Temporary>, T)> {
    let root = Arc::clone(&temporary.root);
    let work = move || {
        let mut temporary = temporary.into_inner();
        let done = work(&mut temporary)?;
        Ok((Aside::new(temporary), done))
    };
    root.patience.run(work).await
}

impl Temporary {
    fn write_gathered(&mut self) -> StoreResult<()> {
        let error = |e| self.root.error("writing", self.name.as_str(), e);
        if self.gathered.is_full() && self.written_bytes == 0 {
            self.bypass = Bypass::of(&self.file);
        }
        let bytes = self.gathered.bytes();
        let past_cache = match &self.bypass {
            Some(bypass) => bypass.write_at(bytes, self.written_bytes).map_err(error)?,
            None => 0,
        };
        let rest_at = self.written_bytes + past_cache as u64;
        self.file.write_all_at(&bytes[past_cache..], rest_at).map_err(error)?;
        self.written_bytes += bytes.len() as u64;
        let fresh_bytes = self.written_bytes - self.flushing_bytes;
        if fresh_bytes >= WRITE_BACK_BYTES {
            // Linux starts asynchronous write-back of dirty pages that are advised away
            // (mm/fadvise.c, WB_SYNC_NONE). A hint: where it does nothing, fsync waits longer.
            let len = NonZeroU64::new(fresh_bytes);
            let _ = rustix::fs::fadvise(&self.file, self.flushing_bytes, len, Advice::DontNeed);
            self.flushing_bytes = self.written_bytes;
        }
        self.gathered.clear();
        Ok(())
    }

    fn make_durable(&mut self) -> StoreResult<Stat> {
        self.write_gathered()?;
        self.file.sync_all().map_err(|e| self.root.error("syncing", self.name.as_str(), e))?;
        let stat = rustix::fs::fstat(&self.file)
            .map_err(|e| self.root.error("looking at", self.name.as_str(), e.into()))?;
        self.root.make_parents(&self.name)?;
        Ok(stat)
    }

    fn give_name(mut self, stat: &Stat) -> StoreResult<ObjectInfo> {
        if let Err(error) = self.publish() {
            // Most likely the directory vanished: what is known of directories is stale.
            self.root.forget_directories();
            return Err(error);
        }
        let text = self.name.as_str();
        let directory = &text[..text.rfind('/').map_or(0, |at| at + 1)];
        self.root.sync(directory)?;
        Ok(info(&self.name, stat))
    }

    /// Gives the file its name in the first way that works here.
    fn publish(&mut self) -> StoreResult<()> {
        let first = self.root.way.load(Ordering::Relaxed);
        for way in Way::ALL.into_iter().filter(|way| *way as u8 >= first) {
            let result = match way {
                Way::Rename => self.rename(RenameFlags::NOREPLACE),
                Way::Link => self.link(),
                Way::Claim => return self.claim(),
            };
            match result {
                Ok(()) => {
                    self.root.way.store(way as u8, Ordering::Relaxed);
                    return Ok(());
                }
                Err(Errno::EXIST) => return Err(self.exists()),
                // EPERM: file systems without hard links (FAT).
                Err(
                    Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM | Errno::MLINK,
                ) => {}
                Err(error) => {
                    return Err(self.root.error("naming", self.name.as_str(), error.into()));
                }
            }
        }
        unreachable!("the last way returns")
    }

    fn exists(&self) -> StoreError {
        StoreError::AlreadyExists { name: self.name.clone() }
    }

    fn rename(&mut self, flags: RenameFlags) -> Result<(), Errno> {
        let (dir, path, name) = (&self.root.dir, self.path.as_str(), self.name.as_str());
        if flags.is_empty() {
            rustix::fs::renameat(dir, path, dir, name)?;
        } else {
            rustix::fs::renameat_with(dir, path, dir, name, flags)?;
        }
        self.state = State::Gone;
        Ok(())
    }

    fn link(&mut self) -> Result<(), Errno> {
        let (dir, name) = (&self.root.dir, self.name.as_str());
        match rustix::fs::linkat(dir, self.path.as_str(), dir, name, AtFlags::empty()) {
            // Over NFS the answer to a link that worked can get lost and the retry says EEXIST:
            // the name is ours if it is our file.
            Err(Errno::EXIST) => {
                let ours = rustix::fs::fstat(&self.file)?;
                let there = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino) {
                    return Err(Errno::EXIST);
                }
            }
            result => result?,
        }
        // The object is there; a temporary name that stays is removed by the sweep.
        let _ = rustix::fs::unlinkat(dir, self.path.as_str(), AtFlags::empty());
        self.state = State::Gone;
        Ok(())
    }

    fn claim(&mut self) -> StoreResult<()> {
        let error = |e: Errno| self.root.error("naming", self.name.as_str(), e.into());
        let dir = &self.root.dir;
        let claim = format!("{TEMPORARY}/claim-{}", self.name.as_str().replace('/', "+"));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        match rustix::fs::openat(dir, claim.as_str(), flags, FILE_MODE) {
            Ok(_) => {}
            Err(Errno::EXIST) => return Err(self.exists()),
            Err(e) => return Err(error(e)),
        }
        let result = match rustix::fs::statat(dir, self.name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(self.exists()),
            Err(Errno::NOENT) => self
                .rename(RenameFlags::empty())
                .map_err(|e| self.root.error("naming", self.name.as_str(), e.into())),
            Err(e) => Err(error(e)),
        };
        // A claim that stays is removed by the sweep.
        let _ = rustix::fs::unlinkat(&self.root.dir, claim.as_str(), AtFlags::empty());
        result
    }

    fn remove(&mut self) -> StoreResult<()> {
        if self.state == State::Gone {
            return Ok(());
        }
        self.state = State::Gone;
        rustix::fs::unlinkat(&self.root.dir, self.path.as_str(), AtFlags::empty())
            .map_err(|e| self.root.error("removing", &self.path, e.into()))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nobody is left to tell; the sweep removes what stays.
        let _ = self.remove();
    }
}
