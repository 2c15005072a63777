//! Rounds: the collector starts over while that makes room for more.
//!
//! ```text
//!  repacking from the largest batch ─► enough room ─► done
//!      │ no room for something          │ short, nothing freed ─► done, and says what to do
//!      ▼                                ▼ short, something freed
//!  a round without repacking ──────► repacking again, from a batch as large as what was freed
//! ```
//!
//! It ends: a round that is followed by another knows of one more pack that is damaged, or deleted a
//! pack, or is followed by one that does not repack. What others take the room for again and again is
//! moved anew only after something was deleted, and is taken back unless it may be indexed
//! ([`super::repack`]).

use super::room::Batch;
use super::{CollectReport, Collector};
use crate::control::NoticeLevel;
use crate::error::{Kind, Result};
use crate::units::ByteSize;

/// Whether there was room for all that was to be repacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Enough,
    Short,
    /// What there is was left to the runs that are at work.
    LeftToOthers,
}

impl Room {
    /// What two types of pack found, together.
    pub(super) fn and(self, other: Self) -> Self {
        if self == Self::Enough { other } else { self }
    }
}

/// Whether anything is repacked, and how much is tried first.
#[derive(Clone, Copy)]
pub(super) enum Repacking {
    From(Batch),
    No,
}

impl Collector<'_> {
    /// Starts over while damage comes to light, and while there is more room than before for what is
    /// to be repacked.
    pub(super) async fn run_until_settled(&self) -> Result<CollectReport> {
        let damaged = &self.blobs.damaged;
        damaged.load().await?;
        let mut report = CollectReport::default();
        let mut repacking = Repacking::From(Batch::ALL);
        loop {
            let known = damaged.count();
            let (deleted, freed) = (report.packs_deleted, report.bytes_freed);
            match self.run(repacking, &mut report).await {
                Err(error) if error.kind() == Kind::Corrupt && damaged.count() > known => {}
                // Others took the room that was held: what can go without more still does.
                Err(error)
                    if error.kind() == Kind::NoSpace && matches!(repacking, Repacking::From(_)) =>
                {
                    tracing::debug!(%error, "starting over without repacking");
                    repacking = Repacking::No;
                }
                Err(error) => return Err(error),
                Ok(Room::Enough) => return Ok(report),
                Ok(Room::Short | Room::LeftToOthers) if report.packs_deleted > deleted => {
                    self.say_how_far(&report);
                    // There is so much room for certain, unless others take it.
                    repacking = Repacking::From(Batch::of(report.bytes_freed - freed));
                }
                Ok(room) => {
                    self.control.notice(NoticeLevel::Warning, self.lacks_room(room, &report));
                    return Ok(report);
                }
            }
        }
    }

    fn say_how_far(&self, report: &CollectReport) {
        let (freed, moved) = (ByteSize(report.bytes_freed), ByteSize(report.bytes_repacked));
        let text = format!(
            "there was no room to repack everything at once: {freed} are free by now, {moved} \
             were moved for it, and the collection goes on"
        );
        self.control.notice(NoticeLevel::Info, text);
    }

    /// What to do where there was no room to repack.
    fn lacks_room(&self, room: Room, report: &CollectReport) -> String {
        let todo = if room == Room::LeftToOthers || !report.waiting_for.is_empty() {
            "run gc again once the runs that are at work are over"
        } else {
            "make a little room there and run gc again"
        };
        let store = self.blobs.store.describe();
        format!("there is no room in {store} to repack all that is mostly garbage: {todo}")
    }
}
