//! From meta contexts to extents: what a range holds and whether it changed.
//!
//! Windows keep memory independent of the disk: one call asks for at most so many bytes and
//! answers with the prefix the server told. With a dirty bitmap the bitmap is asked first and the
//! allocation only around dirty ranges, because walking the allocation of a large fragmented image
//! can take minutes (the reason for virtnbdbackup's option to leave it out); ranges closer than
//! [`GAP_BYTES`] are asked for together, because a round trip costs more than a short walk.

use crate::block::{ByteRange, ExtentKind, ExtentMap};

use super::connection::{Connection, Query};
use super::error::NbdError;
use super::request::Extents;
use super::wire::{STATE_DIRTY, STATE_ZERO};

/// What one call asks for at most: 16384 extents of 64 KiB, and a request that every server takes
/// (32-bit lengths) and none is busy with for long.
pub(super) const WINDOW_BYTES: u64 = 1 << 30;
/// The same where it is only to be seen whether all is zero: one answer for a disk of any usual size,
/// or what 32-bit lengths allow, in whole blocks of any size.
pub(super) const OVERVIEW_BYTES: u64 = 1 << 40;
pub(super) const OVERVIEW_32_BYTES: u64 = 3 << 30;
/// Clean ranges shorter than this are walked over rather than left out of a query.
const GAP_BYTES: u64 = 4 << 20;

/// Where a client asks.
pub(super) struct Contexts<'a> {
    /// Connection and context id of `base:allocation`, if the server has it.
    pub(super) allocation: Option<(&'a Connection, u32)>,
    /// Connection and context id of the dirty bitmap, if one is used.
    pub(super) changes: Option<(&'a Connection, u32)>,
    /// What is asked about at a time.
    pub(super) window_bytes: u64,
}

impl Contexts<'_> {
    /// What a prefix of `range` holds. Cancel-safe.
    pub(super) async fn extents(&self, range: ByteRange) -> Result<ExtentMap, NbdError> {
        let window = ByteRange::new(range.offset(), range.len().min(self.window_bytes));
        let Some((connection, id)) = self.changes else {
            return self.content(window).await;
        };
        let runs = runs(connection, id, window).await?;
        let told = ByteRange::new(window.offset(), runs.iter().map(|run| run.0).sum());
        let dirty: Vec<_> =
            runs.into_iter().map(|(len, flags)| (len, flags & STATE_DIRTY != 0)).collect();
        let mut content = ExtentMap::starting_at(told.offset());
        for span in spans(told.offset(), &dirty) {
            // What lies between the spans is clean, so its kind is masked below.
            content.push(span.offset() - content.end(), ExtentKind::Data);
            while content.end() < span.end() {
                let rest = ByteRange::between(content.end(), span.end());
                for extent in self.content(rest).await?.iter() {
                    content.push(extent.range.len(), extent.kind);
                }
            }
        }
        content.push(told.end() - content.end(), ExtentKind::Data);
        Ok(content.masked(dirty))
    }

    /// What a prefix of `range` holds, whether it changed or not.
    async fn content(&self, range: ByteRange) -> Result<ExtentMap, NbdError> {
        let Some((connection, id)) = self.allocation else {
            return Ok(ExtentMap::uniform(range, ExtentKind::Data));
        };
        let mut map = ExtentMap::starting_at(range.offset());
        for (len, flags) in runs(connection, id, range).await? {
            // A hole that does not promise zeroes may hold anything.
            let zero = flags & STATE_ZERO != 0;
            map.push(len, if zero { ExtentKind::Zero } else { ExtentKind::Data });
        }
        Ok(map)
    }
}

/// The runs of one context over a prefix of `range`, not beyond its end; at least one.
async fn runs(
    connection: &Connection,
    id: u32,
    range: ByteRange,
) -> Result<Vec<(u64, u64)>, NbdError> {
    let query = Query { range, context: Some(id), extents: Extents::Any };
    let told = connection.status(query).await?;
    let mut runs = told
        .into_iter()
        .find(|context| context.id == id)
        .map(|context| context.runs)
        .expect("a successful reply tells of every context that was asked for");
    // Only the last run may overshoot: the request parser has seen to it.
    let sum: u64 = runs.iter().map(|run| run.0).sum();
    if let Some(last) = runs.last_mut() {
        last.0 -= sum.saturating_sub(range.len());
    }
    Ok(runs)
}

/// The ranges to ask the allocation for: all that is dirty, with short gaps bridged.
fn spans(start: u64, dirty: &[(u64, bool)]) -> Vec<ByteRange> {
    let mut spans: Vec<ByteRange> = Vec::new();
    let mut at = start;
    for (len, dirty) in dirty {
        let end = at + len;
        if *dirty {
            match spans.last_mut() {
                Some(last) if at - last.end() < GAP_BYTES => {
                    *last = ByteRange::between(last.offset(), end);
                }
                _ => spans.push(ByteRange::between(at, end)),
            }
        }
        at = end;
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_hold_every_dirty_byte_and_no_long_gap() {
        let dirty = [
            (100, false),
            (10, true),
            (GAP_BYTES - 1, false),
            (10, true),
            (GAP_BYTES, false),
            (1, true),
        ];
        let second = 100 + 10 + GAP_BYTES - 1 + 10 + GAP_BYTES;
        assert_eq!(
            spans(1000, &dirty),
            [ByteRange::new(1100, GAP_BYTES + 19), ByteRange::new(1000 + second, 1)]
        );
        assert!(spans(0, &[(5, false)]).is_empty());
    }
}
