//! A disk of a simulated snapshot, read through its export.

use async_trait::async_trait;

use super::Line;
use super::guest::{Guest, JobState};
use super::image::{BLOCK_BYTES, Content};
use crate::block::{BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry};
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
    /// What the export shows now, and what changed since the base.
    fn look(&self, guest: &Guest) -> Result<(Content, Option<Vec<bool>>)> {
        let gone = || Error::new(Kind::Connection, "the export is gone");
        let job = guest.open.jobs.get(&self.point).ok_or_else(gone)?;
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
        let (content, changed) = self.line.ask("guest: extents", |guest| self.look(guest)).await?;
        let end = range.end().min((range.offset() / BLOCK_BYTES + MAP_BLOCKS) * BLOCK_BYTES);
        let range = ByteRange::between(range.offset(), end);
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
        let (content, _) = self.line.ask("guest: read", |guest| self.look(guest)).await?;
        content.read(offset, &mut buffer);
        Ok(buffer)
    }
}
