//! A place for immutable objects: all that a repository needs.
//!
//! What a store promises, and every caller relies on:
//! - **Create-only.** An object is made once, whole, and never rewritten. Of several creators of one
//!   name exactly one wins; the others see [`StoreError::AlreadyExists`].
//! - **Atomic.** Before [`ObjectWriter::finish`] succeeds nobody sees any of it, afterwards all of it.
//! - **Durable.** When `finish` returns `Ok`, the object survives a power cut. An error means that
//!   the object must be taken as lost; it may nevertheless appear (an answer that got lost), which
//!   is harmless because its name is never used again.
//! - **Time.** [`ObjectInfo::stored`] and [`ObjectStore::now`] come from one clock, the store's own;
//!   leases are judged by it alone, never by the clocks of hosts.
//!
//! What it does not promise: cheap listing, renaming, locks, conditional overwrites.
//!
//! Methods are cancel-safe unless said: dropping a future abandons the request, and an object being
//! created by it is either there whole or not at all. Implementations: [`directory`], [`memory`];
//! another one is a new file here and a run of [`conformance`].

pub mod conformance;
pub mod directory;
mod error;
pub mod memory;
mod name;

use std::sync::Arc;

use async_trait::async_trait;

use crate::block::Waited;
use crate::clock::Timestamp;

pub use error::{StoreError, StoreResult};
pub use name::{Folder, NAME_BYTES_MAX, ObjectName, from_hex, hex};

/// Most entries one page of a listing holds, whatever was asked for.
pub const PAGE_MAX: usize = 10_000;

/// Most entries one page of names holds: they are asked for where there may be a million.
pub const NAMES_MAX: usize = 100_000;

/// A place for immutable objects.
#[async_trait]
pub trait ObjectStore: Send + Sync + std::fmt::Debug {
    /// Where this is, for messages (`directory /srv/backup`); without secrets.
    fn describe(&self) -> String;

    /// Begins an object. Nothing is visible until [`ObjectWriter::finish`]. May fail early with
    /// `AlreadyExists`, but only `finish` decides.
    async fn create(&self, name: &ObjectName) -> StoreResult<Box<dyn ObjectWriter>>;

    /// Reads from an object; never more than `range` bounds.
    async fn read(&self, name: &ObjectName, range: ReadRange) -> StoreResult<Vec<u8>>;

    /// Size and time stamp of an object.
    async fn stat(&self, name: &ObjectName) -> StoreResult<ObjectInfo>;

    /// Objects whose names begin with `prefix` (a folder's prefix or a longer one that ends in
    /// `/`), after the name `after`, in the order of their names' bytes. At most `max` (and at most
    /// [`PAGE_MAX`]); only a page that is empty ends the listing. An object created or deleted
    /// meanwhile may be in it or not; what is there throughout is in it.
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectName>,
        max: usize,
    ) -> StoreResult<Vec<ObjectInfo>>;

    /// Like [`ObjectStore::list`], the names alone: at most [`NAMES_MAX`]. Stores that must ask for
    /// size and time of each object one by one do better than this.
    async fn names(
        &self,
        prefix: &str,
        after: Option<&ObjectName>,
        max: usize,
    ) -> StoreResult<Vec<ObjectName>> {
        let page = self.list(prefix, after, max).await?;
        Ok(page.into_iter().map(|object| object.name).collect())
    }

    /// The parts that follow `folder` in the names of its objects, each once, in order: the domains
    /// of `points/`. One that is empty may be among them. Stores that can tell without listing all
    /// objects do better than this.
    async fn parts(&self, folder: Folder) -> StoreResult<Vec<String>> {
        let mut parts: Vec<String> = Vec::new();
        let mut after = None;
        loop {
            let page = self.names(folder.prefix(), after.as_ref(), NAMES_MAX).await?;
            for name in &page {
                let rest = name.as_str().strip_prefix(folder.prefix()).unwrap_or_default();
                let part = rest.split('/').next().unwrap_or_default();
                if parts.last().is_none_or(|last| last != part) {
                    parts.push(part.to_owned());
                }
            }
            let Some(last) = page.into_iter().last() else { return Ok(parts) };
            after = Some(last);
        }
    }

    /// Deletes an object; one that is not there is [`StoreError::NotFound`].
    async fn delete(&self, name: &ObjectName) -> StoreResult<()>;

    /// Makes the deletions so far durable, where they are not when they return.
    async fn settle_deletions(&self) -> StoreResult<()> {
        Ok(())
    }

    /// The store's own clock: comparable with the time stamps of its objects.
    async fn now(&self) -> StoreResult<Timestamp>;

    /// Removes what creators that never finished left behind before the time `before`, if such
    /// leftovers exist here. Returns how many were removed.
    async fn sweep(&self, _before: Timestamp) -> StoreResult<u64> {
        Ok(0)
    }

    /// Takes room for `bytes`, which nobody else gets until it is given back; at the latest when the
    /// process ends, however it ends. A store that cannot does nothing.
    async fn reserve(&self, _bytes: u64) -> StoreResult<Box<dyn Reservation>> {
        Ok(Box::new(Nothing))
    }

    /// How many bytes more fit in, if there is a bound and the store can tell it without taking
    /// anything. An estimate: others take room meanwhile, and quotas need not be in it.
    async fn room_bytes(&self) -> StoreResult<Option<u64>> {
        Ok(None)
    }

    /// The same objects for threads that may wait, if it needs no reactor.
    fn blocking(&self) -> Option<Arc<dyn BlockingObjects>> {
        None
    }

    /// Creates a small object whole.
    async fn put(&self, name: &ObjectName, bytes: Vec<u8>) -> StoreResult<ObjectInfo> {
        let mut writer = self.create(name).await?;
        match writer.write(&bytes).await {
            Ok(()) => writer.finish().await,
            Err(error) => {
                writer.abort().await?;
                Err(error)
            }
        }
    }
}

/// Reading objects on the caller's own thread, for stores whose bytes are a system call away.
pub trait BlockingObjects: Send + Sync {
    /// Fills `bytes` from `offset` on of an object, and says whether that had to wait for a disk; an
    /// object that ends earlier is [`StoreError::Short`].
    fn read_at(&self, name: &ObjectName, offset: u64, bytes: &mut [u8]) -> StoreResult<Waited>;
}

/// An object being created. Dropping it is like [`ObjectWriter::abort`], without the report of
/// what could not be cleaned up.
#[async_trait]
pub trait ObjectWriter: Send {
    /// Appends `bytes`; a store gathers what is too little for a request of its own. After an error
    /// only `abort` makes sense.
    async fn write(&mut self, bytes: &[u8]) -> StoreResult<()>;

    /// Makes the object durable and visible, if nobody made one of this name.
    async fn finish(self: Box<Self>) -> StoreResult<ObjectInfo>;

    /// Throws away what was written.
    async fn abort(self: Box<Self>) -> StoreResult<()>;
}

/// Room that was taken. Dropping it gives it back, too, without the report of what went wrong.
#[async_trait]
pub trait Reservation: Send {
    /// Gives the room back.
    async fn release(self: Box<Self>) -> StoreResult<()>;
}

/// What a store gives that cannot take room.
struct Nothing;

#[async_trait]
impl Reservation for Nothing {
    async fn release(self: Box<Self>) -> StoreResult<()> {
        Ok(())
    }
}

/// What is known of an object without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name.
    pub name: ObjectName,
    /// Its size.
    pub size_bytes: u64,
    /// When it was stored, by the store's clock (to the second on some stores).
    pub stored: Timestamp,
}

/// Which bytes of an object to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadRange {
    /// All of it; an object larger than this is [`StoreError::TooLarge`].
    Whole {
        /// The bound.
        bytes_max: u64,
    },
    /// Exactly these; an object that ends earlier is [`StoreError::Short`].
    Exact {
        /// Where they begin.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The last `len` bytes, or all of a shorter object.
    Suffix {
        /// How many at most.
        len: u64,
    },
}

impl ReadRange {
    /// Offset and length within an object of `size_bytes`, or the rule it breaks.
    fn resolve(self, name: &ObjectName, size_bytes: u64) -> StoreResult<(u64, usize)> {
        let (offset, len) = match self {
            Self::Whole { bytes_max } if size_bytes > bytes_max => {
                return Err(StoreError::TooLarge { name: name.clone(), size_bytes, bytes_max });
            }
            Self::Whole { .. } => (0, size_bytes),
            Self::Exact { offset, len } => match offset.checked_add(len) {
                Some(end) if end <= size_bytes => (offset, len),
                end => {
                    let end = end.unwrap_or(u64::MAX);
                    return Err(StoreError::Short { name: name.clone(), size_bytes, end });
                }
            },
            Self::Suffix { len } => (size_bytes.saturating_sub(len), len.min(size_bytes)),
        };
        // Bounded by the caller's own numbers, which size buffers in memory.
        let len = usize::try_from(len).map_err(|_| StoreError::TooLarge {
            name: name.clone(),
            size_bytes,
            bytes_max: usize::MAX as u64,
        })?;
        Ok((offset, len))
    }
}

/// Every object under `prefix`, page by page, through `visit`.
pub async fn for_each(
    store: &dyn ObjectStore,
    prefix: &str,
    mut visit: impl FnMut(ObjectInfo) + Send,
) -> StoreResult<()> {
    let mut after = None;
    loop {
        let page = store.list(prefix, after.as_ref(), PAGE_MAX).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some(last.name.clone());
        page.into_iter().for_each(&mut visit);
    }
}

/// Every name under `prefix`, page by page, through `visit`: cheaper than [`for_each`].
pub async fn for_each_name(
    store: &dyn ObjectStore,
    prefix: &str,
    mut visit: impl FnMut(ObjectName) + Send,
) -> StoreResult<()> {
    let mut after = None;
    loop {
        let page = store.names(prefix, after.as_ref(), NAMES_MAX).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some(last.clone());
        page.into_iter().for_each(&mut visit);
    }
}
