//! A disk of a simulated snapshot, read through its export, and given up for a guest that comes first.

use std::sync::Arc;

use async_trait::async_trait;

use super::Line;
use super::guest::{Guest, JobState};
use super::image::{BLOCK_BYTES, Content};
use crate::block::{BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry, Release};
use crate::error::{Error, Kind, Result};
use crate::vm::PointId;

/// Longest map given at once, in blocks.
const MAP_BLOCKS: u64 = 9;

pub(super) struct Export {
    pub(super) line: Line,
    pub(super) point: PointId,
    pub(super) index: usize,
    pub(super) size_bytes: u64,
}

impl Export {
    /// What the export shows now, and what changed since the base; `range` must not be given up.
    fn look(&self, guest: &Guest, range: ByteRange) -> Result<(Content, Option<Vec<bool>>)> {
        let gone = || Error::new(Kind::Connection, "the export is gone");
        let job = guest.open.jobs.get(&self.point).ok_or_else(gone)?;
        let mut given_up = job.given_up.iter().filter(|(index, _)| *index == self.index);
        if given_up.any(|(_, block)| !block_range(*block).intersect(range).is_empty()) {
            let message = format!("parts of {range} were given up (EINVAL)");
            return Err(Error::new(Kind::Io, message));
        }
        let (name, instant, changed) = &job.disks[self.index];
        let content = match job.state {
            JobState::Holds => instant.clone(),
            JobState::Gone => return Err(gone()),
            JobState::Live => {
                let disk = guest.disks.iter().find(|disk| disk.name == *name).ok_or_else(gone)?;
                disk.image.content.clone()
            }
        };
        Ok((content, changed.clone()))
    }
}

#[async_trait]
impl BlockSource for Export {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            align_bytes: 512,
            preferred_bytes: BLOCK_BYTES,
            request_bytes_max: 32 << 20,
            in_flight: 4,
        }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let end = range.end().min((range.offset() / BLOCK_BYTES + MAP_BLOCKS) * BLOCK_BYTES);
        let range = ByteRange::between(range.offset(), end);
        let look = |guest: &mut Guest| self.look(guest, range);
        let (content, changed) = self.line.ask("guest: extents", look).await?;
        let mut map = ExtentMap::starting_at(range.offset());
        let mut runs = Vec::new();
        while map.end() < range.end() {
            let block = map.end() / BLOCK_BYTES;
            let len = range.end().min((block + 1) * BLOCK_BYTES) - map.end();
            let block = usize::try_from(block).expect("a small disk");
            let zero = content.blocks()[block] == 0;
            runs.push((len, changed.as_ref().is_none_or(|changed| changed[block])));
            map.push(len, if zero { ExtentKind::Zero } else { ExtentKind::Data });
        }
        Ok(map.masked(runs))
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let look = |guest: &mut Guest| self.look(guest, range);
        let (content, _) = self.line.ask("guest: read", look).await?;
        content.read(offset, &mut buffer);
        Ok(buffer)
    }
}

fn block_range(block: u64) -> ByteRange {
    ByteRange::new(block * BLOCK_BYTES, BLOCK_BYTES)
}

/// The same, of which parts can be given up.
pub(super) struct Releasing(pub(super) Arc<Export>);

#[async_trait]
impl BlockSource for Releasing {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.0.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.0.read(offset, buffer).await
    }

    fn release(&self) -> Option<Arc<dyn Release>> {
        Some(Arc::clone(&self.0) as Arc<dyn Release>)
    }
}

#[async_trait]
impl Release for Export {
    async fn release(&self, range: ByteRange) -> Result<()> {
        let released = self.line.ask("guest: release", |guest| {
            let gone = || Error::new(Kind::Connection, "the export is gone");
            let job = guest.open.jobs.get_mut(&self.point).ok_or_else(gone)?;
            let blocks = range.offset().div_ceil(BLOCK_BYTES)..range.end() / BLOCK_BYTES;
            job.given_up.extend(blocks.map(|block| (self.index, block)));
            Ok(())
        });
        released.await
    }
}
