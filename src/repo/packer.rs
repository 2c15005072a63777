//! Fills packs with sealed blobs, in order, while earlier packs become durable.
//!
//! ```text
//!  worker:  encode ─► slot (counter + offset, under a short lock) ─► seal ─┐
//!  worker:  encode ─► slot ─────────────────────────────────────────► seal ─┤  bounded channel
//!                                                                           ▼
//!  pack task (one per open pack):  put in order ─► ObjectWriter ─► trailer ─► finish (durable)
//!                                                                           └─► entries to the sink
//! ```
//!
//! A pack's task ends when all its blobs arrived and the object is durable; only then are its
//! entries handed to the [`DurableSink`], which makes them part of the index, and the pack counts as
//! durable ([`Packer::durable_packs`]). A failure of any task is kept and returned by whatever comes
//! next.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::durable::DurablePacks;
use super::failure::Failure;
use super::index::{IndexEntry, Location, PackRef};
use super::pack::{
    Encoding, PACK_BLOBS_MAX, PACK_BYTES, PackedBlob, encode_footer, encode_trailer,
};
use super::seal::{BlobId, BlobKind, HEADER_BYTES, Keys, ObjectType, Sealer, TAG_BYTES, random};
use super::store::{ObjectName, ObjectStore, ObjectWriter};
use crate::block::{Buffer, Share};
use crate::error::{Error, Kind, Result};

/// Sealed blobs waiting for a pack's task, in bytes of plain chunks.
const QUEUE_BYTES: usize = 8 << 20;

/// Packs of one packer that are open or becoming durable at once.
const OPEN_PACKS_MAX: usize = 3;

/// How long packs that are given up may take to end by themselves: it takes moments.
const ABORT: Duration = Duration::from_secs(5);

/// Takes in the entries of a pack that is durable.
#[async_trait]
pub trait DurableSink: Send + Sync {
    /// Called once per pack.
    async fn durable(&self, entries: Vec<IndexEntry>) -> Result<()>;
}

/// A blob ready to be sealed.
#[derive(Debug)]
pub struct EncodedBlob {
    /// Its id.
    pub id: BlobId,
    /// What it is.
    pub kind: BlobKind,
    /// How `bytes` is encoded.
    pub encoding: Encoding,
    /// Length of the plaintext.
    pub plain_bytes: u32,
    /// The encoded plaintext.
    pub bytes: BlobBytes,
}

/// The bytes of a blob.
#[derive(Debug)]
pub enum BlobBytes {
    /// In memory of their own; with a share of the budget for as many bytes, if they come from there.
    Owned(Vec<u8>, Option<Share>),
    /// Where they were read to, as a chunk that does not compress is: its share of the budget is
    /// held until it is written.
    AsRead(Buffer),
}

impl From<Vec<u8>> for BlobBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Owned(bytes, None)
    }
}

impl Deref for BlobBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Owned(bytes, _) => bytes,
            Self::AsRead(buffer) => buffer,
        }
    }
}

impl DerefMut for BlobBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Owned(bytes, _) => bytes,
            Self::AsRead(buffer) => buffer,
        }
    }
}

/// Where packs go, and who is told.
#[derive(Clone)]
pub struct Target {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// What seals them.
    pub keys: Arc<Keys>,
    /// Who takes in their entries.
    pub sink: Arc<dyn DurableSink>,
    /// The first failure of the run.
    pub failure: Failure,
}

/// Fills packs of one type.
pub struct Packer {
    target: Target,
    object_type: ObjectType,
    queue_blobs: usize,
    pack_bytes: u64,
    runtime: tokio::runtime::Handle,
    // Locked to assign a slot, never across an await.
    state: Mutex<State>,
    open_packs: Arc<Semaphore>,
    durable: Arc<DurablePacks>,
}

#[derive(Default)]
struct State {
    open: Option<OpenPack>,
    /// Packs begun so far.
    begun: u64,
    tasks: JoinSet<()>,
}

struct OpenPack {
    number: u64,
    sealer: Arc<Sealer>,
    blobs: Vec<PackedBlob>,
    next_offset: u64,
    queue: mpsc::Sender<Piece>,
}

/// What a pack's task is sent.
enum Piece {
    Blob { counter: u32, sealed: SealedBytes },
    End { blobs: Vec<PackedBlob>, tail: Vec<u8> },
}

/// The ciphertext of a blob and its tag.
type SealedBytes = (BlobBytes, [u8; TAG_BYTES]);

/// A sealed blob on its way to its pack.
pub struct Sealed {
    /// The number of its pack.
    pub(super) pack: u64,
    queue: mpsc::Sender<Piece>,
    piece: Piece,
    /// The end of the pack, when this blob filled it.
    end: Option<Piece>,
}

impl Packer {
    /// A packer for chunks of up to `blob_bytes` (which sizes its queue), on the current runtime.
    pub fn new(target: Target, object_type: ObjectType, blob_bytes: usize) -> Self {
        Self {
            target,
            object_type,
            queue_blobs: (QUEUE_BYTES / blob_bytes.max(1)).clamp(2, 256),
            pack_bytes: PACK_BYTES,
            runtime: tokio::runtime::Handle::current(),
            state: Mutex::default(),
            open_packs: Arc::new(Semaphore::new(OPEN_PACKS_MAX)),
            durable: Arc::default(),
        }
    }

    /// The same with packs that are full at other than [`PACK_BYTES`], which is the most.
    #[must_use]
    pub fn of_pack_bytes(self, bytes: u64) -> Self {
        Self { pack_bytes: bytes.clamp(1, PACK_BYTES), ..self }
    }

    /// Gives the blob its place in a pack and seals it: CPU work, for a worker thread.
    pub fn seal(&self, blob: EncodedBlob) -> Sealed {
        let mut bytes = blob.bytes;
        let stored_bytes = u32::try_from(bytes.len() + TAG_BYTES).expect("a blob is a few MiB");
        let (pack, counter, sealer, queue, end) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let state = &mut *state;
            let open = state.open.get_or_insert_with(|| {
                let number = state.begun;
                state.begun += 1;
                self.open_pack(number, &mut state.tasks)
            });
            let pack = open.number;
            let counter = u32::try_from(open.blobs.len()).expect("bounded by PACK_BLOBS_MAX");
            open.blobs.push(PackedBlob {
                id: blob.id,
                kind: blob.kind,
                encoding: blob.encoding,
                counter,
                offset: u32::try_from(open.next_offset).expect("a pack is far below 4 GiB"),
                stored_bytes,
                plain_bytes: blob.plain_bytes,
            });
            open.next_offset += u64::from(stored_bytes);
            let full = open.next_offset >= self.pack_bytes || counter + 1 == PACK_BLOBS_MAX;
            let (sealer, queue) = (Arc::clone(&open.sealer), open.queue.clone());
            let end = if full { state.open.take().map(OpenPack::end) } else { None };
            (pack, counter, sealer, queue, end)
        };
        let tag = sealer.seal_in_place(u64::from(counter), &mut bytes);
        let piece = Piece::Blob { counter, sealed: (bytes, tag) };
        let end = end.map(|(_, piece)| piece);
        Sealed { pack, queue, piece, end }
    }

    /// Hands a sealed blob to its pack; waits while the store is slower than we are.
    pub async fn send(&self, sealed: Sealed) -> Result<()> {
        for piece in [Some(sealed.piece), sealed.end].into_iter().flatten() {
            if sealed.queue.send(piece).await.is_err() {
                self.target.failure.check()?;
                return Err(Error::new(Kind::Cancelled, "the run was given up"));
            }
        }
        Ok(())
    }

    /// How many packs are durable, without a gap from the first, as that grows.
    pub fn durable_packs(&self) -> watch::Receiver<u64> {
        self.durable.watch()
    }

    /// Ends the pack being filled and waits until every pack is durable. Cancel-safe: what is still
    /// being written goes on, for [`Self::abort`] or another call to wait for. One caller at a time.
    pub async fn flush(&self) -> Result<()> {
        let state = || self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let open = state().open.take();
        if let Some((queue, end)) = open.map(OpenPack::end) {
            // A task that is gone left its failure, which is looked at below. Nobody sends it once we are
            // dropped: then this pack is garbage, as its task finds.
            let _ = queue.send(end).await;
        }
        // They stay where they are while they are waited for.
        while let Some(task) = poll_fn(|context| state().tasks.poll_join_next(context)).await {
            if let Err(error) = task {
                self.target.failure.set(died(error));
            }
        }
        self.target.failure.check()
    }

    /// Drops what is being written: unfinished objects vanish, finished packs are garbage. Waits for a
    /// store that is slow for [`ABORT`] at most.
    pub async fn abort(&self) {
        let mut tasks = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.open = None;
            std::mem::take(&mut state.tasks)
        };
        // Each finds its queue closed, and removes what it wrote.
        let ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(ABORT, ended).await.is_err() {
            tasks.shutdown().await;
        }
    }

    fn open_pack(&self, number: u64, tasks: &mut JoinSet<()>) -> OpenPack {
        let id = random::<16>();
        let name = ObjectName::pack(&id);
        let sealer = Arc::new(self.target.keys.sealer(self.object_type, &name));
        let (queue, mut pieces) = mpsc::channel(self.queue_blobs);
        let pack = Arc::new(PackRef { id, header: *sealer.header() });
        let (target, places) = (self.target.clone(), Arc::clone(&self.open_packs));
        let durable = Arc::clone(&self.durable);
        let work = async move {
            let _place = places.acquire_owned().await.expect("never closed");
            match write_pack(&target, &pack, &mut pieces).await {
                Ok(()) => durable.add(number),
                // Before the queue closes: who finds it closed asks why.
                Err(error) => target.failure.set(error),
            }
        };
        // Tasks that ended are let go of here, so that the set stays as small as the packs open.
        while let Some(ended) = tasks.try_join_next() {
            if let Err(error) = ended {
                self.target.failure.set(died(error));
            }
        }
        tasks.spawn_on(work, &self.runtime);
        let next_offset = HEADER_BYTES as u64;
        OpenPack { number, sealer, blobs: Vec::new(), next_offset, queue }
    }
}

impl OpenPack {
    fn end(self) -> (mpsc::Sender<Piece>, Piece) {
        let count = u32::try_from(self.blobs.len()).expect("bounded by PACK_BLOBS_MAX");
        let mut tail = encode_trailer(&self.blobs);
        self.sealer.seal(u64::from(count), &mut tail);
        let trailer_bytes = u32::try_from(tail.len()).expect("a trailer is under 3 MiB");
        tail.extend_from_slice(&encode_footer(trailer_bytes, count));
        (self.queue, Piece::End { blobs: self.blobs, tail })
    }
}

fn died(error: tokio::task::JoinError) -> Error {
    Error::new(Kind::Internal, "a pack's task died").source(error)
}

/// The life of one pack, from its first byte to its place in the index.
async fn write_pack(
    target: &Target,
    pack: &Arc<PackRef>,
    pieces: &mut mpsc::Receiver<Piece>,
) -> Result<()> {
    let mut writer = target.store.create(&pack.name()).await?;
    let blobs = match write_pieces(&mut *writer, pack, pieces).await {
        Ok(blobs) => blobs,
        Err(error) => {
            // The first error is the one that explains; what abort cannot clean, gc will.
            if let Err(abort) = writer.abort().await {
                tracing::warn!(pack = %pack.name(), error = %abort, "cannot remove a partial pack");
            }
            return Err(error);
        }
    };
    writer.finish().await?;
    let entry = |blob: &PackedBlob| IndexEntry {
        id: blob.id,
        location: Location {
            pack: Arc::clone(pack),
            counter: blob.counter,
            offset: blob.offset,
            stored_bytes: blob.stored_bytes,
            plain_bytes: blob.plain_bytes,
            encoding: blob.encoding,
        },
    };
    target.sink.durable(blobs.iter().map(entry).collect()).await
}

async fn write_pieces(
    writer: &mut dyn ObjectWriter,
    pack: &PackRef,
    pieces: &mut mpsc::Receiver<Piece>,
) -> Result<Vec<PackedBlob>> {
    writer.write(&pack.header).await?;
    let mut early: BTreeMap<u32, SealedBytes> = BTreeMap::new();
    let mut next = 0;
    let mut end: Option<(Vec<PackedBlob>, Vec<u8>)> = None;
    loop {
        while let Some((bytes, tag)) = early.remove(&next) {
            next += 1;
            writer.write(&bytes).await?;
            writer.write(&tag).await?;
        }
        if let Some((blobs, tail)) = end.take_if(|(blobs, _)| blobs.len() == next as usize) {
            writer.write(&tail).await?;
            return Ok(blobs);
        }
        match pieces.recv().await {
            Some(Piece::Blob { counter, sealed }) => {
                early.insert(counter, sealed);
            }
            Some(Piece::End { blobs, tail }) => end = Some((blobs, tail)),
            None => return Err(Error::new(Kind::Cancelled, "the run was given up")),
        }
    }
}
