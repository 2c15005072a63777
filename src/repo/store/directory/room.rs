//! Room in a directory: taken by a file that loses its name before it takes any, so that the kernel
//! gives the room back when the process ends, killed or not.
//!
//! Clients of NFS, and file systems in user space, rename what is removed while it is open
//! (`.nfs…`, `.fuse_hidden…`) and remove that when it is closed, also for a process that was killed. It
//! stays only if the whole host goes down, and where a share does not remove what is open, the first
//! name stays until then: [`Root::sweep`] knows all of them.

use std::fs::File;
use std::sync::Arc;

use async_trait::async_trait;
use rustix::fs::{AtFlags, FallocateFlags};
use rustix::io::Errno;

use super::super::{Reservation, StoreResult};
use super::patience::Aside;
use super::root::Root;

/// Room that is taken.
pub(super) struct Room(Aside<Held>);

/// The file that takes it.
struct Held {
    root: Arc<Root>,
    /// None once the room was given back.
    file: Option<File>,
    path: String,
    /// The name could not be removed while the file was open.
    is_named: bool,
}

impl Room {
    pub(super) fn take(root: &Arc<Root>, bytes: u64) -> StoreResult<Self> {
        let (file, path) = root.create_temporary("room")?;
        let removed = rustix::fs::unlinkat(&root.dir, path.as_str(), AtFlags::empty());
        let is_named = removed.is_err();
        let held = Held { root: Arc::clone(root), file: Some(file), path, is_named };
        held.allocate(bytes)?;
        Ok(Self(Aside::new(held)))
    }
}

impl Held {
    /// File systems that cannot allocate what lies behind the end of a file may allocate it by making
    /// the file longer (NFS 4.2); others have no way at all (NFS before that, many of FUSE).
    fn allocate(&self, bytes: u64) -> StoreResult<()> {
        let Some(file) = self.file.as_ref().filter(|_| bytes > 0) else { return Ok(()) };
        for way in [FallocateFlags::KEEP_SIZE, FallocateFlags::empty()] {
            match rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, way, 0, bytes)) {
                Ok(()) => return Ok(()),
                Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => {
                    return Err(self.root.error("taking room at", &self.path, error.into()));
                }
                Err(error) => tracing::debug!(%error, "no room is held"),
            }
        }
        Ok(())
    }

    fn give_back(&mut self) -> StoreResult<()> {
        drop(self.file.take());
        if !std::mem::take(&mut self.is_named) {
            return Ok(());
        }
        match rustix::fs::unlinkat(&self.root.dir, self.path.as_str(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.root.error("removing", &self.path, error.into())),
        }
    }
}

#[async_trait]
impl Reservation for Room {
    async fn release(self: Box<Self>) -> StoreResult<()> {
        // What was large takes a while to close.
        let root = Arc::clone(&self.0.root);
        root.patience.run(move || self.0.into_inner().give_back()).await
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Nobody is left to tell; the sweep removes what stays.
        let _ = self.give_back();
    }
}

/// What the file system has for users who are not root. Some cannot tell, and say that they are of no
/// size at all (ramfs, some in user space).
pub(super) fn free_bytes(root: &Root) -> StoreResult<Option<u64>> {
    let space = rustix::fs::fstatvfs(&root.dir);
    let space = space.map_err(|e| root.error("asking", "how much room is", e.into()))?;
    Ok((space.f_blocks > 0).then(|| space.f_bavail.saturating_mul(space.f_frsize)))
}
