//! Index segments: immutable sorted runs of entries, sealed block by block.
//!
//! ```text
//!  header[40] ‖ block 1 ‖ block 2 ‖ … ‖ directory ‖ footer[16]
//!
//!  block i    sealed with counter i; plaintext is up to 256 entries of 53 bytes, sorted by id:
//!             id[32] ‖ pack u32 ‖ counter u32 ‖ offset u32 ‖ stored u32 ‖ plain u32 ‖ encoding u8
//!             (all blocks but the last are full, so a block's place follows from its number)
//!  directory  sealed with counter 0; plaintext is
//!             entries u64 ‖ n packs u32 ‖ n × (id[16] ‖ object header[40]) ‖
//!             m superseded u32 ‖ m × segment id[16] ‖
//!             first id of each block[32] ‖ filter
//!  footer     length of the sealed directory u64 ‖ "VMBINDX1"
//! ```
//!
//! Integers are little-endian. `pack` numbers the directory's packs. A segment that lists others as
//! superseded holds all that they held.

use std::ops::Range;
use std::sync::Arc;

use super::filter::Filter;
use super::filter_space::{FilterSpace, PlacedFilter};
use crate::error::{Error, Kind, Result};
use crate::repo::pack::Encoding;
use crate::repo::seal::{
    BlobId, HEADER_BYTES, Keys, ObjectType, Opener, SealError, Sealer, TAG_BYTES,
};
use crate::repo::store::{Folder, ObjectName, ObjectStore, ObjectWriter, ReadRange, hex};

/// Entries per block.
pub const BLOCK_ENTRIES: usize = 256;

const ENTRY_BYTES: usize = 53;
const SEALED_BLOCK_LEN: usize = BLOCK_ENTRIES * ENTRY_BYTES + TAG_BYTES;
const SEALED_BLOCK_BYTES: u64 = SEALED_BLOCK_LEN as u64;
const FOOTER_BYTES: usize = 16;
const MAGIC: [u8; 8] = *b"VMBINDX1";

/// Largest directory that is read: a segment of 40 million entries.
const DIRECTORY_BYTES_MAX: u64 = 128 << 20;

/// A pack as a segment knows it: enough to open its blobs with one read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PackRef {
    /// The pack's id.
    pub id: [u8; 16],
    /// The pack's object header.
    pub header: [u8; HEADER_BYTES],
}

impl PackRef {
    /// The object.
    pub fn name(&self) -> ObjectName {
        ObjectName::pack(&self.id)
    }

    /// Whether it holds chunks or tree nodes.
    pub fn object_type(&self) -> ObjectType {
        if self.header[6] == ObjectType::DataPack as u8 {
            ObjectType::DataPack
        } else {
            ObjectType::TreePack
        }
    }
}

/// Where a blob lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// In which pack.
    pub pack: Arc<PackRef>,
    /// The counter of its seal.
    pub counter: u32,
    /// Where its sealed form begins.
    pub offset: u32,
    /// Length of its sealed form.
    pub stored_bytes: u32,
    /// Length of its plaintext.
    pub plain_bytes: u32,
    /// How it is encoded.
    pub encoding: Encoding,
}

/// A blob and where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Which blob.
    pub id: BlobId,
    /// Where.
    pub location: Location,
}

/// The name of a segment.
pub fn segment_name(id: &[u8; 16]) -> ObjectName {
    ObjectName::new(Folder::Index, &hex(id))
}

/// Writes a segment; entries come sorted by id, without duplicates.
pub struct SegmentWriter {
    writer: Box<dyn ObjectWriter>,
    sealer: Sealer,
    packs: std::collections::HashMap<Arc<PackRef>, u32>,
    pack_list: Vec<Arc<PackRef>>,
    block: Vec<u8>,
    firsts: Vec<BlobId>,
    filter: Filter,
    entries: u64,
}

impl SegmentWriter {
    /// Begins segment `id`; `expected` entries size its filter.
    pub async fn create(
        store: &dyn ObjectStore,
        keys: &Keys,
        id: &[u8; 16],
        expected: u64,
    ) -> Result<Self> {
        let name = segment_name(id);
        let sealer = keys.sealer(ObjectType::Index, &name);
        let mut writer = store.create(&name).await?;
        writer.write(sealer.header()).await?;
        Ok(Self {
            writer,
            sealer,
            packs: std::collections::HashMap::new(),
            pack_list: Vec::new(),
            block: Vec::new(),
            firsts: Vec::new(),
            filter: Filter::for_count(expected),
            entries: 0,
        })
    }

    /// Appends an entry.
    pub async fn push(&mut self, entry: &IndexEntry) -> Result<()> {
        let location = &entry.location;
        let next = u32::try_from(self.pack_list.len()).expect("far fewer than 2^32 packs");
        let pack = *self.packs.entry(Arc::clone(&location.pack)).or_insert_with(|| {
            self.pack_list.push(Arc::clone(&location.pack));
            next
        });
        if self.block.is_empty() {
            self.firsts.push(entry.id);
        }
        self.block.extend_from_slice(&entry.id.0);
        for number in
            [pack, location.counter, location.offset, location.stored_bytes, location.plain_bytes]
        {
            self.block.extend_from_slice(&number.to_le_bytes());
        }
        self.block.push(location.encoding as u8);
        self.filter.insert(&entry.id);
        self.entries += 1;
        if self.block.len() == BLOCK_ENTRIES * ENTRY_BYTES {
            self.end_block().await?;
        }
        Ok(())
    }

    async fn end_block(&mut self) -> Result<()> {
        let mut block = std::mem::take(&mut self.block);
        self.sealer.seal(self.firsts.len() as u64, &mut block);
        Ok(self.writer.write(&block).await?)
    }

    /// Ends the segment: durable when it returns.
    pub async fn finish(mut self, supersedes: &[[u8; 16]]) -> Result<()> {
        if !self.block.is_empty() {
            self.end_block().await?;
        }
        let mut directory = self.entries.to_le_bytes().to_vec();
        let count = |n: usize| u32::try_from(n).expect("far fewer than 2^32").to_le_bytes();
        directory.extend_from_slice(&count(self.pack_list.len()));
        for pack in &self.pack_list {
            directory.extend_from_slice(&pack.id);
            directory.extend_from_slice(&pack.header);
        }
        directory.extend_from_slice(&count(supersedes.len()));
        directory.extend(supersedes.iter().flatten());
        directory.extend(self.firsts.iter().flat_map(|id| id.0));
        directory.extend_from_slice(&self.filter.encode());
        self.sealer.seal(0, &mut directory);
        let mut footer = (directory.len() as u64).to_le_bytes().to_vec();
        footer.extend_from_slice(&MAGIC);
        self.writer.write(&directory).await?;
        self.writer.write(&footer).await?;
        self.writer.finish().await?;
        Ok(())
    }
}

/// A segment opened for look-ups: its directory is in memory (its filter as far as there is room), its
/// blocks are read as needed.
#[derive(Debug)]
pub struct Segment {
    /// Its id.
    pub id: [u8; 16],
    /// The segments it replaces.
    pub supersedes: Vec<[u8; 16]>,
    name: ObjectName,
    entries: u64,
    packs: Vec<Arc<PackRef>>,
    firsts: Vec<BlobId>,
    filter: PlacedFilter,
    opener: Opener,
}

impl Segment {
    /// Reads the directory of segment `id`.
    pub async fn open(
        store: &dyn ObjectStore,
        keys: &Keys,
        space: &Arc<FilterSpace>,
        id: [u8; 16],
    ) -> Result<Self> {
        let name = segment_name(&id);
        let corrupt = |what| SealError::Corrupt { name: name.clone(), what };
        let header = store.read(&name, ReadRange::Exact { offset: 0, len: HEADER_BYTES as u64 });
        let opener = keys.opener(ObjectType::Index, &name, &header.await?)?;
        let footer = store.read(&name, ReadRange::Suffix { len: FOOTER_BYTES as u64 }).await?;
        if footer.len() != FOOTER_BYTES || footer[8..] != MAGIC {
            return Err(corrupt("it has no footer").into());
        }
        let len = u64::from_le_bytes(footer[..8].try_into().expect("8 bytes"));
        if len > DIRECTORY_BYTES_MAX {
            return Err(corrupt("its directory is too long").into());
        }
        let suffix = ReadRange::Suffix { len: len + FOOTER_BYTES as u64 };
        let mut directory = store.read(&name, suffix).await?;
        directory.truncate(directory.len().saturating_sub(FOOTER_BYTES));
        opener.open(0, &mut directory)?;
        let parsed = Directory::parse(&directory);
        let parsed = parsed.ok_or_else(|| corrupt("its directory is malformed"))?;
        let Directory { entries, packs, supersedes, firsts, filter } = parsed;
        drop(directory);
        let filter = place(space, filter).await?;
        Ok(Self { id, supersedes, name, entries, packs, firsts, filter, opener })
    }

    /// How many entries.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// How many blocks.
    pub fn blocks(&self) -> usize {
        self.firsts.len()
    }

    /// The packs it speaks of.
    pub fn packs(&self) -> &[Arc<PackRef>] {
        &self.packs
    }

    /// Whether `id` may be in it: no read.
    pub fn may_contain(&self, id: &BlobId) -> bool {
        self.filter.may_contain(id)
    }

    /// The block `id` would be in.
    pub fn block_of(&self, id: &BlobId) -> Option<usize> {
        self.firsts.partition_point(|first| first <= id).checked_sub(1)
    }

    /// Reads block `index`.
    pub async fn read_block(
        &self,
        store: &dyn ObjectStore,
        index: usize,
    ) -> Result<Vec<IndexEntry>> {
        self.read_blocks(store, index..index + 1).await
    }

    /// Reads the entries of blocks that lie side by side, with one read.
    pub async fn read_blocks(
        &self,
        store: &dyn ObjectStore,
        blocks: Range<usize>,
    ) -> Result<Vec<IndexEntry>> {
        let corrupt = |what| SealError::Corrupt { name: self.name.clone(), what };
        let count = |blocks: usize| self.entries.min((blocks * BLOCK_ENTRIES) as u64);
        let entries = count(blocks.end) - count(blocks.start);
        let range = ReadRange::Exact {
            offset: HEADER_BYTES as u64 + blocks.start as u64 * SEALED_BLOCK_BYTES,
            len: entries * ENTRY_BYTES as u64 + (blocks.len() * TAG_BYTES) as u64,
        };
        let mut sealed = store.read(&self.name, range).await?;
        let mut out = Vec::with_capacity(blocks.len() * BLOCK_ENTRIES);
        let counters = blocks.start as u64 + 1..;
        for (part, counter) in sealed.chunks_mut(SEALED_BLOCK_LEN).zip(counters) {
            let plain = self.opener.open_in_place(counter, part)?;
            for entry in plain.as_chunks::<ENTRY_BYTES>().0 {
                out.push(self.parse(entry).ok_or_else(|| corrupt("an entry is malformed"))?);
            }
        }
        Ok(out)
    }

    fn parse(&self, entry: &[u8; ENTRY_BYTES]) -> Option<IndexEntry> {
        let number = |n: usize| {
            let at = 32 + 4 * n;
            u32::from_le_bytes(entry[at..at + 4].try_into().expect("4 bytes"))
        };
        Some(IndexEntry {
            id: BlobId(entry[..32].try_into().expect("32 bytes")),
            location: Location {
                pack: Arc::clone(self.packs.get(number(0) as usize)?),
                counter: number(1),
                offset: number(2),
                stored_bytes: number(3),
                plain_bytes: number(4),
                encoding: Encoding::from_byte(entry[52])?,
            },
        })
    }
}

/// A filter past the bound goes to a file.
async fn place(space: &Arc<FilterSpace>, filter: Filter) -> Result<PlacedFilter> {
    #[cfg(test)]
    if crate::dice::is_simulated() {
        return Ok(space.place(filter));
    }
    let space = Arc::clone(space);
    let filter = tokio::task::spawn_blocking(move || space.place(filter)).await;
    filter.map_err(|e| Error::new(Kind::Internal, "placing a filter died").source(e))
}

struct Directory {
    entries: u64,
    packs: Vec<Arc<PackRef>>,
    supersedes: Vec<[u8; 16]>,
    firsts: Vec<BlobId>,
    filter: Filter,
}

impl Directory {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let mut take = |len: usize| {
            let (head, tail) = rest.split_at_checked(len)?;
            rest = tail;
            Some(head)
        };
        let entries = u64::from_le_bytes(take(8)?.try_into().ok()?);
        let packs = u32::from_le_bytes(take(4)?.try_into().ok()?) as usize;
        let packs = take(packs.checked_mul(16 + HEADER_BYTES)?)?
            .as_chunks::<{ 16 + HEADER_BYTES }>()
            .0
            .iter()
            .map(|pack| {
                let (id, header) = pack.split_at(16);
                let id = id.try_into().expect("16 bytes");
                Arc::new(PackRef { id, header: header.try_into().expect("a header") })
            })
            .collect();
        let supersedes = u32::from_le_bytes(take(4)?.try_into().ok()?) as usize;
        let supersedes = take(supersedes.checked_mul(16)?)?.as_chunks::<16>().0.to_vec();
        let blocks = usize::try_from(entries.div_ceil(BLOCK_ENTRIES as u64)).ok()?;
        let firsts = take(blocks.checked_mul(32)?)?;
        let firsts = firsts.as_chunks::<32>().0.iter().map(|id| BlobId(*id)).collect();
        Some(Self { entries, packs, supersedes, firsts, filter: Filter::decode(rest)? })
    }
}
