//! Catalog segments: immutable sorted runs of summaries, sealed block by block.
//!
//! ```text
//!  header[40] ‖ block 1 ‖ block 2 ‖ … ‖ directory ‖ footer[16]
//!
//!  block i    sealed with counter i: packed JSON of up to 256 summaries, in order
//!  directory  sealed with counter 0: packed JSON, see `Directory`
//!  footer     length of the sealed directory u64 ‖ "VMBCATL1"
//!  packed     length of the JSON u32 ‖ one zstd frame
//! ```
//!
//! Whoever reads summaries reads blocks in groups, a megabyte or so at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{SegmentId, Summary};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use crate::repo::points::PointName;
use crate::repo::seal::{HEADER_BYTES, Keys, ObjectType, Opener, SealError, Sealer};
use crate::repo::store::{Folder, ObjectName, ObjectStore, ObjectWriter, ReadRange, hex};
use crate::vm::{FullReason, PointId, Quiescence, Uuid, VmIdentity};

/// Summaries per block.
const BLOCK_POINTS: usize = 256;

/// Largest JSON of a block: 256 summaries take 100 KiB, unless somebody's reasons are very long.
const BLOCK_BYTES_MAX: usize = 8 << 20;

/// Largest JSON of a directory: 40 million points, or a million VMs.
const DIRECTORY_BYTES_MAX: usize = 256 << 20;

/// What is read of a segment at first: all of a small one, the directory of most.
const TAIL_BYTES: u64 = 64 << 10;

/// Sealed bytes of blocks that are read at once.
const GROUP_BYTES: u64 = 1 << 20;

const FOOTER_BYTES: usize = 16;
const MAGIC: [u8; 8] = *b"VMBCATL1";
const ZSTD_LEVEL: i32 = 3;

/// The name of a segment.
pub(in crate::repo) fn segment_name(id: &SegmentId) -> ObjectName {
    ObjectName::new(Folder::Catalog, &hex(id))
}

/// The stored form of a block.
#[derive(Serialize, Deserialize)]
struct Block {
    /// The VMs its points are of; most blocks have one.
    vms: Vec<VmIdentity>,
    points: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    /// Number of its VM.
    vm: usize,
    point: PointId,
    sequence: u64,
    taken: Timestamp,
    quiescence: Quiescence,
    disks: usize,
    incremental: usize,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    reasons: Vec<FullReason>,
    size_bytes: u64,
    read_bytes: u64,
    stored_bytes: u64,
}

/// The stored form of a directory.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Directory {
    points: u64,
    blocks: Vec<BlockRef>,
    /// Every name a VM had at one of the points.
    names: BTreeMap<Uuid, BTreeSet<String>>,
    /// Segments all of whose points are in this one.
    supersedes: Vec<PointId>,
}

#[derive(Debug, Serialize, Deserialize)]
struct BlockRef {
    first: PointName,
    /// Length of its sealed form.
    bytes: u64,
}

fn pack<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let internal = |what| move |e| Error::new(Kind::Internal, what).source(e);
    let json = serde_json::to_vec(value)
        .map_err(|e| internal("a part of the catalog cannot be written")(e.into()))?;
    let len = u32::try_from(json.len()).expect("blocks and directories are far below 4 GiB");
    let mut packed = len.to_le_bytes().to_vec();
    let frame = zstd::bulk::compress(&json, ZSTD_LEVEL);
    packed.extend(frame.map_err(internal("zstd cannot compress"))?);
    Ok(packed)
}

fn unpack<T: DeserializeOwned>(packed: &[u8], bytes_max: usize) -> Option<T> {
    let (len, frame) = packed.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok().filter(|len| *len <= bytes_max)?;
    let json = zstd::bulk::decompress(frame, len).ok()?;
    serde_json::from_slice(&json).ok()
}

/// Writes a segment; summaries come in the order of their names.
pub(super) struct SegmentWriter {
    writer: Box<dyn ObjectWriter>,
    sealer: Sealer,
    block: Vec<Summary>,
    directory: Directory,
}

impl SegmentWriter {
    /// Begins segment `id`.
    pub(super) async fn create(
        store: &dyn ObjectStore,
        keys: &Keys,
        id: &SegmentId,
    ) -> Result<Self> {
        let name = segment_name(id);
        let sealer = keys.sealer(ObjectType::Catalog, &name);
        let mut writer = store.create(&name).await?;
        writer.write(sealer.header()).await?;
        Ok(Self { writer, sealer, block: Vec::new(), directory: Directory::default() })
    }

    /// Appends a summary.
    pub(super) async fn push(&mut self, summary: Summary) -> Result<()> {
        let names = self.directory.names.entry(summary.vm.uuid).or_default();
        if !names.contains(&summary.vm.name) {
            names.insert(summary.vm.name.clone());
        }
        self.directory.points += 1;
        self.block.push(summary);
        if self.block.len() == BLOCK_POINTS { self.end_block().await } else { Ok(()) }
    }

    async fn end_block(&mut self) -> Result<()> {
        let summaries = std::mem::take(&mut self.block);
        let first = summaries[0].name();
        let mut block = Block { vms: Vec::new(), points: Vec::new() };
        for summary in summaries {
            if block.vms.last() != Some(&*summary.vm) {
                block.vms.push((*summary.vm).clone());
            }
            block.points.push(Entry::of(summary, block.vms.len() - 1));
        }
        let mut bytes = pack(&block)?;
        self.sealer.seal(self.directory.blocks.len() as u64 + 1, &mut bytes);
        self.directory.blocks.push(BlockRef { first, bytes: bytes.len() as u64 });
        Ok(self.writer.write(&bytes).await?)
    }

    /// Ends the segment: durable when it returns.
    pub(super) async fn finish(mut self, supersedes: &[SegmentId]) -> Result<()> {
        if !self.block.is_empty() {
            self.end_block().await?;
        }
        self.directory.supersedes = supersedes.iter().copied().map(PointId).collect();
        let mut directory = pack(&self.directory)?;
        self.sealer.seal(0, &mut directory);
        let mut footer = (directory.len() as u64).to_le_bytes().to_vec();
        footer.extend_from_slice(&MAGIC);
        self.writer.write(&directory).await?;
        self.writer.write(&footer).await?;
        self.writer.finish().await?;
        Ok(())
    }
}

impl Entry {
    fn of(summary: Summary, vm: usize) -> Self {
        let Summary { vm: _, point, sequence, taken, quiescence, reasons, .. } = summary;
        let Summary { disks, incremental, size_bytes, read_bytes, stored_bytes, .. } = summary;
        Self {
            vm,
            point,
            sequence,
            taken,
            quiescence,
            disks,
            incremental,
            reasons,
            size_bytes,
            read_bytes,
            stored_bytes,
        }
    }

    fn summary(self, vms: &[Arc<VmIdentity>]) -> Option<Summary> {
        Some(Summary {
            vm: Arc::clone(vms.get(self.vm)?),
            point: self.point,
            sequence: self.sequence,
            taken: self.taken,
            quiescence: self.quiescence,
            disks: self.disks,
            incremental: self.incremental,
            reasons: self.reasons,
            size_bytes: self.size_bytes,
            read_bytes: self.read_bytes,
            stored_bytes: self.stored_bytes,
        })
    }
}

/// An opened segment: its directory is in memory.
#[derive(Debug)]
pub(super) struct Segment {
    /// Its id.
    pub(super) id: SegmentId,
    /// When it was stored, by the store's clock.
    pub(super) stored: Timestamp,
    name: ObjectName,
    opener: Opener,
    directory: Directory,
    /// The whole object, if it is small.
    whole: Option<Vec<u8>>,
}

impl Segment {
    /// Reads the directory of segment `id`.
    pub(super) async fn open(
        store: &dyn ObjectStore,
        keys: &Keys,
        (id, stored): (SegmentId, Timestamp),
    ) -> Result<Self> {
        let name = segment_name(&id);
        let corrupt = |what| SealError::Corrupt { name: name.clone(), what };
        let tail = store.read(&name, ReadRange::Suffix { len: TAIL_BYTES }).await?;
        let whole = ((tail.len() as u64) < TAIL_BYTES).then(|| tail.clone());
        let header = match &whole {
            Some(whole) => whole.get(..HEADER_BYTES).unwrap_or_default().to_vec(),
            None => {
                store.read(&name, ReadRange::Exact { offset: 0, len: HEADER_BYTES as u64 }).await?
            }
        };
        let opener = keys.opener(ObjectType::Catalog, &name, &header)?;
        let (rest, footer) = tail
            .split_last_chunk::<FOOTER_BYTES>()
            .filter(|(_, footer)| footer[8..] == MAGIC)
            .ok_or_else(|| corrupt("it has no footer"))?;
        let len = u64::from_le_bytes(footer[..8].try_into().expect("8 bytes"));
        if len > DIRECTORY_BYTES_MAX as u64 {
            return Err(corrupt("its directory is too large").into());
        }
        let have = usize::try_from(len).ok().and_then(|len| rest.len().checked_sub(len));
        let mut sealed = if let Some(at) = have {
            rest[at..].to_vec()
        } else {
            let suffix = ReadRange::Suffix { len: len + FOOTER_BYTES as u64 };
            let mut bytes = store.read(&name, suffix).await?;
            bytes.truncate(bytes.len().saturating_sub(FOOTER_BYTES));
            bytes
        };
        opener.open(0, &mut sealed)?;
        let directory = unpack(&sealed, DIRECTORY_BYTES_MAX);
        let directory = directory.ok_or_else(|| corrupt("its directory is malformed"))?;
        Ok(Self { id, stored, name, opener, directory, whole })
    }

    /// How many points.
    pub(super) fn points(&self) -> u64 {
        self.directory.points
    }

    /// The segments it replaces.
    pub(super) fn supersedes(&self) -> impl Iterator<Item = SegmentId> {
        self.directory.supersedes.iter().map(|id| id.0)
    }

    /// The VMs it knows, with every name they had.
    pub(super) fn vms(&self) -> &BTreeMap<Uuid, BTreeSet<String>> {
        &self.directory.names
    }

    /// The blocks that can hold one of `names` (sorted), in groups to be read at once.
    pub(super) fn groups(&self, names: &[PointName]) -> Vec<Range<usize>> {
        let blocks = &self.directory.blocks;
        let mut groups: Vec<Range<usize>> = Vec::new();
        let mut bytes = 0;
        for (number, block) in blocks.iter().enumerate() {
            let from = names.partition_point(|name| *name < block.first);
            let before = |name: &PointName| blocks.get(number + 1).is_none_or(|b| *name < b.first);
            if !names.get(from).is_some_and(before) {
                continue;
            }
            let adjoining = |last: &&mut Range<usize>| last.end == number && bytes < GROUP_BYTES;
            if let Some(last) = groups.last_mut().filter(adjoining) {
                last.end += 1;
            } else {
                groups.push(number..number + 1);
                bytes = 0;
            }
            bytes += block.bytes;
        }
        groups
    }

    /// All blocks, in groups to be read at once.
    pub(super) fn all_groups(&self) -> Vec<Range<usize>> {
        let blocks = self.directory.blocks.len();
        (0..blocks).step_by(8).map(|first| first..(first + 8).min(blocks)).collect()
    }

    /// Reads blocks that lie side by side, as they are stored.
    pub(super) async fn read(
        &self,
        store: &dyn ObjectStore,
        blocks: Range<usize>,
    ) -> Result<Vec<u8>> {
        let sum = |blocks: &[BlockRef]| blocks.iter().map(|block| block.bytes).sum::<u64>();
        let offset = HEADER_BYTES as u64 + sum(&self.directory.blocks[..blocks.start]);
        let len = sum(&self.directory.blocks[blocks]);
        if let Some(whole) = &self.whole {
            let at = usize::try_from(offset).ok().zip(usize::try_from(offset + len).ok());
            let bytes = at.and_then(|(from, to)| whole.get(from..to));
            return bytes.map(<[u8]>::to_vec).ok_or_else(|| self.malformed());
        }
        Ok(store.read(&self.name, ReadRange::Exact { offset, len }).await?)
    }

    /// What blocks hold, given what [`Segment::read`] read of them. CPU work.
    pub(super) fn decode(&self, blocks: Range<usize>, mut bytes: Vec<u8>) -> Result<Vec<Summary>> {
        let mut summaries = Vec::with_capacity(blocks.len() * BLOCK_POINTS);
        let mut rest = &mut bytes[..];
        for number in blocks {
            let len = usize::try_from(self.directory.blocks[number].bytes);
            let len = len.map_err(|_| self.malformed())?;
            let (sealed, tail) = rest.split_at_mut_checked(len).ok_or_else(|| self.malformed())?;
            rest = tail;
            let plain = self.opener.open_in_place(number as u64 + 1, sealed)?;
            let block: Block = unpack(plain, BLOCK_BYTES_MAX).ok_or_else(|| self.malformed())?;
            let vms: Vec<_> = block.vms.into_iter().map(Arc::new).collect();
            for entry in block.points {
                summaries.push(entry.summary(&vms).ok_or_else(|| self.malformed())?);
            }
        }
        Ok(summaries)
    }

    fn malformed(&self) -> Error {
        SealError::Corrupt { name: self.name.clone(), what: "a block is malformed" }.into()
    }
}
