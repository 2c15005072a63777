//! Room: how much is moved at a time where there is little, and what is kept free meanwhile.
//!
//! What collects garbage holds as much as the index needs to be written anew, because without that
//! no pack can go: all that was moved would only have made the store fuller. Apart from that it
//! takes what there is, and finds the end by running into it.
//!
//! Not so while other runs are at work: whoever finds no room loses a backup, and what the collector
//! empties meanwhile goes only after them, so that it gains nothing by hurry. Then it moves
//! something only if a store that tells its room has [`room_beside_others`], and asks again before
//! each batch. It asks, and does not try to take so much: an attempt that fails takes the last byte
//! for a moment (ext4 allocates until there is no more, and gives it back when the file is closed),
//! and that may be the moment in which the backup writes.
//!
//! Who is at work is seen at the beginning of each round ([`super::rounds`]), and again and again while
//! something moves: a batch may take hours, and whoever began meanwhile found little room otherwise.

use crate::error::{Error, Kind, Result};
use crate::repo::pack::PACK_BYTES;
use crate::repo::store::{ObjectStore, Reservation};

/// What an entry of the index takes, its part of the filter and the directory included (53 bytes
/// sealed, ten bits, an eighth of an id).
const ENTRY_BYTES: u64 = 64;

/// For what is small: lists, leases, the ends of segments, blocks that are not full.
const SMALL_BYTES: u64 = 128 << 10;

/// Least that is worth an attempt.
const BATCH_BYTES_MIN: u64 = 64 << 10;

/// What a segment of so many entries takes.
pub(super) fn segment_bytes(entries: u64) -> u64 {
    entries * ENTRY_BYTES
}

/// The room that is needed to free packs that `entries` of the index speak of, or lie beside in a
/// segment: those that move become a segment first, and then all become one.
pub(super) fn room_to_free(entries: u64) -> u64 {
    SMALL_BYTES + 2 * segment_bytes(entries)
}

/// Of what is free, those who are at work keep at least so many times what the collector takes: of
/// a backup that fails for want of room, it is then rarely the cause.
const SHARES_OF_OTHERS: u64 = 3;

/// What they keep at least: a run has up to three packs of each of two types open or becoming
/// durable, and writes segments of the index and its manifest in the end.
const OTHERS_BYTES_MIN: u64 = 8 * PACK_BYTES;

/// What has to be free before so many bytes are moved beside other runs.
pub(super) fn room_beside_others(bytes: u64) -> u64 {
    bytes.saturating_add(bytes.saturating_mul(SHARES_OF_OTHERS).max(OTHERS_BYTES_MIN))
}

/// Room that nobody else gets.
pub(super) struct Held(Box<dyn Reservation>);

impl Held {
    /// Holds so many bytes; nothing if they are not there.
    pub(super) async fn take(store: &dyn ObjectStore, bytes: u64) -> Result<Option<Self>> {
        match store.reserve(bytes).await {
            Ok(room) => Ok(Some(Self(room))),
            Err(error) => match Error::from(error) {
                error if error.kind() == Kind::NoSpace => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Gives it back.
    pub(super) async fn release(self) -> Result<()> {
        Ok(self.0.release().await?)
    }
}

/// How much is moved before it is indexed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    pub(super) bytes_max: u64,
}

impl Batch {
    /// As much as there is.
    pub(super) const ALL: Self = Self { bytes_max: u64::MAX };

    /// What is moved at a time beside other runs: little enough that they are asked for again soon.
    pub(super) const BESIDE_OTHERS: Self = Self { bytes_max: 16 * PACK_BYTES };

    /// So much, if that is worth an attempt.
    pub(super) fn of(bytes: u64) -> Self {
        Self { bytes_max: bytes.max(BATCH_BYTES_MIN) }
    }

    /// The smaller of the two.
    pub(super) fn min(self, other: Self) -> Self {
        Self { bytes_max: self.bytes_max.min(other.bytes_max) }
    }

    /// What to try after this fitted, and nothing larger was refused.
    pub(super) fn more(self) -> Self {
        Self { bytes_max: self.bytes_max.saturating_mul(2) }
    }

    /// What to try after there was no room for more than `fit_bytes`, of packs of `pack_bytes`: a
    /// pack that is not finished does not count as fitting, and may have been nearly so. Nothing
    /// once it is too little.
    pub(super) fn less(self, fit_bytes: u64, pack_bytes: u64) -> Option<Self> {
        let fits = fit_bytes.max(pack_bytes);
        let bytes_max = if self.bytes_max > fits { fits } else { self.bytes_max / 2 };
        (bytes_max >= BATCH_BYTES_MIN).then_some(Self { bytes_max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_shrink_until_they_are_not_worth_it() {
        let mut batch = Batch::ALL;
        let mut tried = Vec::new();
        while let Some(less) = batch.less(0, 1 << 20) {
            tried.push(less.bytes_max >> 10);
            batch = less;
        }
        assert_eq!(tried, [1024, 512, 256, 128, 64]);
        let fits = Batch::ALL.less(2 << 30, 64 << 20).unwrap();
        assert_eq!(fits.bytes_max, 2 << 30);
        assert_eq!(fits.less(0, 64 << 20).unwrap().bytes_max, 64 << 20);
    }
}
