//! Reading blobs: from a content hash to bytes that are proven to have it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::damaged::Damaged;
use super::index::{Index, Location, PackRef, missing};
use super::pack::Encoding;
use super::salvage::may_have_another;
use super::seal::{BlobId, BlobKind, Keys, Opener};
use super::store::{BlockingObjects, ObjectStore, ReadRange, StoreResult};
use super::tree::{FANOUT, Node};
use crate::block::Waited;
use crate::content::ContentHash;
use crate::error::{Error, Kind, Result};
use crate::workers::Workers;

/// Tree nodes kept in memory: about 8 MiB.
const CACHED_NODES_MAX: usize = 1000;

/// Opened packs kept: each is a key schedule and a name.
const CACHED_OPENERS_MAX: usize = 1000;

/// Largest plaintext of a blob: a chunk of 4 MiB.
pub const BLOB_BYTES_MAX: u32 = 4 << 20;

/// Everything it takes to read blobs; shared by readers and writers.
#[derive(Debug)]
pub struct Blobs {
    /// Where they are.
    pub store: Arc<dyn ObjectStore>,
    /// What opens them.
    pub keys: Arc<Keys>,
    /// Where each lies.
    pub index: Arc<Index>,
    /// Who decodes them.
    pub workers: Workers,
    /// Packs in which damage was found.
    pub damaged: Damaged,
    // Both locked for map operations only, never across an await.
    nodes: Mutex<HashMap<ContentHash, Arc<Node>>>,
    openers: Mutex<HashMap<[u8; 16], Arc<Opener>>>,
    /// Packs that were not there when they were read: collected, if what they held is elsewhere.
    gone: Mutex<HashSet<[u8; 16]>>,
}

impl Blobs {
    /// Reads through `index`.
    pub fn new(
        store: Arc<dyn ObjectStore>,
        keys: Arc<Keys>,
        index: Arc<Index>,
        workers: Workers,
    ) -> Self {
        let damaged = Damaged::new(Arc::clone(&store), Arc::clone(&keys));
        Self {
            store,
            keys,
            index,
            workers,
            damaged,
            nodes: Mutex::default(),
            openers: Mutex::default(),
            gone: Mutex::default(),
        }
    }

    /// The tree node `hash` of `height`, verified. Cancel-safe.
    pub async fn node(&self, height: u8, hash: &ContentHash) -> Result<Arc<Node>> {
        if hash.is_zero() {
            return Ok(Arc::new(Node::new(Vec::new())));
        }
        if let Some(node) = lock(&self.nodes).get(hash) {
            return Ok(Arc::clone(node));
        }
        let id = self.keys.blob_id(BlobKind::Node { height }, hash);
        let hash = *hash;
        let node = match self.usual_node(&id, hash).await {
            Err(error) if may_have_another(&error) => {
                self.salvage(&id, move |copy, plain| decode_node(copy, &plain, &hash)).await?
            }
            node => node?,
        };
        let node = Arc::new(node);
        let mut nodes = lock(&self.nodes);
        if nodes.len() >= CACHED_NODES_MAX {
            nodes.clear();
        }
        nodes.insert(hash, Arc::clone(&node));
        Ok(node)
    }

    async fn usual_node(&self, id: &BlobId, hash: ContentHash) -> Result<Node> {
        let location = self.locate(id).await?;
        let sealed = self.read_run(&location.pack, location.offset, location.stored_bytes.into());
        let mut sealed = sealed.await?.ok_or_else(|| pack_missing(&location.pack))?;
        let opener = self.opener(&location.pack)?;
        let work = move || {
            let plain = open(&opener, &location, &mut sealed)?;
            decode_node(&location, &plain, &hash)
        };
        self.workers.run(work).await?
    }

    /// The children of node `index` of `height` below the top node `top` of height `top_height`.
    pub async fn node_at(
        &self,
        top_height: u8,
        top: &ContentHash,
        height: u8,
        index: u64,
    ) -> Result<Arc<Node>> {
        let mut node = self.node(top_height, top).await?;
        for above in (height + 1..=top_height).rev() {
            let shift = 8 * u32::from(above - 1 - height);
            let slot = usize::try_from((index >> shift) % FANOUT as u64).expect("below 256");
            node = self.node(above - 1, &node.child(slot)).await?;
        }
        Ok(node)
    }

    /// Where a blob lies, in a pack that is there and sound as far as we know; in a damaged one,
    /// where it may yet open, if there is no other. A stale index is refreshed once before a blob
    /// counts as missing.
    pub async fn locate(&self, id: &BlobId) -> Result<Location> {
        let there = |location: &Location| !lock(&self.gone).contains(&location.pack.id);
        let sound =
            |location: &Location| there(location) && !self.damaged.contains(&location.pack.id);
        if let Some(location) = self.index.lookup(id, &sound).await? {
            return Ok(location);
        }
        if self.damaged.count() > 0
            && let Some(location) = self.index.lookup(id, &there).await?
        {
            return Ok(location);
        }
        self.index.refresh().await?;
        if let Some(location) = self.index.lookup(id, &there).await? {
            return Ok(location);
        }
        let gone = self.index.lookup(id, &|_| true).await?;
        Err(gone.map_or_else(|| missing(id), |location| pack_missing(&location.pack)))
    }

    /// `len` bytes of a pack: the sealed form of one blob or of several that lie side by side. None
    /// when the pack is gone: [`Blobs::locate`] then finds what it held elsewhere, if it is.
    pub async fn read_run(&self, pack: &PackRef, offset: u32, len: u64) -> Result<Option<Vec<u8>>> {
        let range = ReadRange::Exact { offset: u64::from(offset), len };
        self.if_there(pack, self.store.read(&pack.name(), range).await)
    }

    /// The same on the caller's thread, for as many bytes as `bytes` has.
    pub fn read_run_at(
        &self,
        objects: &dyn BlockingObjects,
        (pack, offset): (&PackRef, u32),
        bytes: &mut [u8],
    ) -> Result<Option<Waited>> {
        self.if_there(pack, objects.read_at(&pack.name(), u64::from(offset), bytes))
    }

    fn if_there<T>(&self, pack: &PackRef, read: StoreResult<T>) -> Result<Option<T>> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(error) if error.is_not_found() => {
                lock(&self.gone).insert(pack.id);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What opens the blobs of `pack`.
    pub fn opener(&self, pack: &PackRef) -> Result<Arc<Opener>> {
        if let Some(opener) = lock(&self.openers).get(&pack.id) {
            return Ok(Arc::clone(opener));
        }
        let opener = self.keys.opener(pack.object_type(), &pack.name(), &pack.header)?;
        let opener = Arc::new(opener);
        let mut openers = lock(&self.openers);
        if openers.len() >= CACHED_OPENERS_MAX {
            openers.clear();
        }
        openers.insert(pack.id, Arc::clone(&opener));
        Ok(opener)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The plaintext of a sealed blob. CPU work.
pub fn open(opener: &Opener, location: &Location, sealed: &mut [u8]) -> Result<Vec<u8>> {
    let mut plain = vec![0; plain_len(location)?];
    open_into(opener, location, sealed, &mut plain)?;
    Ok(plain)
}

/// Length of a blob's plaintext, checked against what a blob may have.
pub fn plain_len(location: &Location) -> Result<usize> {
    if location.plain_bytes > BLOB_BYTES_MAX {
        return Err(damaged(location, "its length is not one a blob can have"));
    }
    Ok(location.plain_bytes as usize)
}

/// Opens and decodes a sealed blob into `plain`, which has exactly the blob's plain length. CPU work.
pub fn open_into(
    opener: &Opener,
    location: &Location,
    sealed: &mut [u8],
    plain: &mut [u8],
) -> Result<()> {
    let counter = u64::from(location.counter);
    let encoded = opener
        .open_in_place(counter, sealed)
        .map_err(|error| damaged(location, "its seal is broken").source(error))?;
    let wrong_length = || damaged(location, "it is shorter or longer than recorded");
    match location.encoding {
        Encoding::Raw => {
            if encoded.len() != plain.len() {
                return Err(wrong_length());
            }
            plain.copy_from_slice(encoded);
        }
        Encoding::Zstd => {
            let len = zstd_decompress(encoded, plain)
                .map_err(|error| damaged(location, "it does not decompress").source(error))?;
            if len != plain.len() {
                return Err(wrong_length());
            }
        }
    }
    Ok(())
}

/// The tree node that a blob holds, if it is the one it should be. CPU work.
fn decode_node(location: &Location, plain: &[u8], hash: &ContentHash) -> Result<Node> {
    let node = Node::decode(plain).filter(|node| node.hash() == *hash);
    node.ok_or_else(|| damaged(location, "it is not the tree node it should be"))
}

/// The error for a pack that is not there.
pub(super) fn pack_missing(pack: &PackRef) -> Error {
    Error::new(Kind::Corrupt, format!("pack {} is missing", pack.name()))
        .hint("run 'check' to see which points are affected")
}

/// The error for a blob that is not what it should be.
pub fn damaged(location: &Location, what: &str) -> Error {
    let pack = location.pack.name();
    Error::new(
        Kind::Corrupt,
        format!("blob {} of pack {pack} is damaged: {what}", location.counter),
    )
    .hint("see which points 'check --read-data' names; 'full' stores again what the VM still has")
}

thread_local! {
    /// Made once per worker thread.
    static DECOMPRESSOR: std::cell::RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { std::cell::RefCell::new(None) };
}

fn zstd_decompress(encoded: &[u8], plain: &mut [u8]) -> std::io::Result<usize> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(zstd::bulk::Decompressor::new()?),
        };
        decompressor.decompress_to_buffer(encoded, plain)
    })
}
