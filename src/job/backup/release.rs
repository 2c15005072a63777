//! Giving up what is stored: the guest then pays no more for it to be kept.
//!
//! ```text
//!  copy ─► Releasing ─► DiskWriter
//!             │ zero, kept, in a pack that was there ──────────► ready ─► task: Release::release
//!             └ in a pack that is being filled ─► waiting ─► pack is durable ─┘    (merged ranges)
//! ```
//!
//! Only for a source that wants it (`BlockSource::release`: `--guest-first` on a plain QEMU). What is
//! given up can be read no second time, so whatever may want to read again comes first or rules it out:
//! - a bitmap is audited *before* the copy (`Backup::copy_onto`): a disk whose bitmap lied is read in
//!   full then, and what the bitmap calls clean is needed no more when the audit has passed;
//! - with `--verify-source` nothing is given up;
//! - the nodes that the copy will need of its base are read before it: of a base that is damaged there the
//!   disk is read in full. What is damaged only afterwards fails the backup, unless nothing was given up
//!   yet.
//!
//! A chunk is ready when its *content* is durable: its pack is finished and synced. Its tree node, the
//! index and the manifest follow later; what fails in between fails the backup as a whole.
//!
//! Bounded: ranges are merged, and [`RANGES_MAX`] of them wait at most. One that finds no place is not
//! given up, nor is what is the same as a chunk that is being stored at this very moment: it costs
//! scratch, as without all this. An error ends the giving up and nothing else: if the snapshot broke,
//! `still_valid` says so.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::block::{BlockSink, Buffer, ByteRange, Geometry, Release, ZeroMode};
use crate::control::{Control, NoticeLevel};
use crate::error::Result;
use crate::repo::{DiskWriter, Durability};
use crate::units::MIB;

/// Ranges that wait, at most: a few MiB of memory.
const RANGES_MAX: usize = 1 << 16;

/// As much is given up in one go, as long as there is more to come.
const BATCH_BYTES: u64 = 16 * MIB;

/// Disjoint ranges that do not touch, by where they begin.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn insert(&mut self, range: ByteRange) {
        let (mut start, mut end) = (range.offset(), range.end());
        while let Some((at, until)) = self.0.range(..=end).next_back() {
            let (at, until) = (*at, *until);
            if until < start {
                break;
            }
            self.0.remove(&at);
            (start, end) = (start.min(at), end.max(until));
        }
        self.0.insert(start, end);
    }

    fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.0.iter().map(|(start, end)| ByteRange::between(*start, *end))
    }

    fn bytes(&self) -> u64 {
        self.iter().map(ByteRange::len).sum()
    }
}

/// What of a disk is to be given up.
#[derive(Debug, Default)]
struct Queue {
    ready: Ranges,
    ready_bytes: u64,
    /// By how many packs have to be durable.
    waiting: BTreeMap<u64, Ranges>,
    /// Whether nothing is added any more.
    is_last: bool,
}

impl Queue {
    fn add(&mut self, range: ByteRange, durability: Durability) {
        let held = self.waiting.values().map(|ranges| ranges.0.len()).sum::<usize>();
        if range.is_empty() || held + self.ready.0.len() >= RANGES_MAX {
            return;
        }
        match durability {
            Durability::Now => {
                self.ready.insert(range);
                self.ready_bytes += range.len();
            }
            Durability::Packs(count) => self.waiting.entry(count).or_default().insert(range),
            Durability::Commit => {}
        }
    }

    /// Whether it is worth a look.
    fn is_due(&self) -> bool {
        self.is_last || self.ready_bytes >= BATCH_BYTES || self.ready.0.len() >= RANGES_MAX / 2
    }

    /// What can be given up now that so many packs are durable.
    fn take(&mut self, durable: u64) -> Ranges {
        let later = self.waiting.split_off(&(durable + 1));
        for ranges in std::mem::replace(&mut self.waiting, later).into_values() {
            for range in ranges.iter() {
                self.ready.insert(range);
                self.ready_bytes += range.len();
            }
        }
        if !self.is_due() {
            return Ranges::default();
        }
        self.ready_bytes = 0;
        std::mem::take(&mut self.ready)
    }
}

/// Gives up parts of one disk, beside the copy, until it is dropped or [ended](Releaser::end).
pub(super) struct Releaser {
    shared: Arc<Shared>,
    /// Taken to be ended.
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    /// Locked to add or take, never across an await.
    queue: Mutex<Queue>,
    wake: Notify,
    /// Whether something was given up, or may have been.
    has_begun: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn work(&self, disk: &dyn Release, durable: &mut watch::Receiver<u64>) -> Result<()> {
        loop {
            let count = *durable.borrow_and_update();
            let ready = self.lock().take(count);
            for range in ready.iter() {
                self.has_begun.store(true, Ordering::Relaxed);
                disk.release(range).await?;
            }
            tracing::trace!(bytes = ready.bytes(), "given up");
            // In this order: simulations are to be played again.
            tokio::select! {
                biased;
                changed = durable.changed() => if changed.is_err() { return Ok(()) },
                () = self.wake.notified() => {}
            }
        }
    }
}

impl Drop for Releaser {
    fn drop(&mut self) {
        if let Some(task) = self.take_task() {
            task.abort();
        }
    }
}

impl Releaser {
    /// Begins to give up parts of `disk`, which is called `name`; `durable` counts packs.
    pub(super) fn start(
        disk: Arc<dyn Release>,
        (name, control): (String, Control),
        mut durable: watch::Receiver<u64>,
    ) -> Arc<Self> {
        let shared = Arc::new(Shared::default());
        let working = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            if let Err(error) = working.work(&*disk, &mut durable).await {
                let error = error.in_one_line();
                let text = format!("no more scratch is given back for {name}: {error}");
                control.notice(NoticeLevel::Info, text);
            }
        });
        Arc::new(Self { shared, task: Mutex::new(Some(task)) })
    }

    fn take_task(&self) -> Option<JoinHandle<()>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn add(&self, range: ByteRange, durability: Durability) {
        let due = {
            let mut queue = self.shared.lock();
            queue.add(range, durability);
            queue.is_due()
        };
        if due {
            self.shared.wake.notify_one();
        }
    }

    /// Says that nothing more is added: what is left is given up as it becomes durable.
    pub(super) fn no_more(&self) {
        self.shared.lock().is_last = true;
        self.shared.wake.notify_one();
    }

    /// Whether anything can have been given up.
    pub(super) fn has_begun(&self) -> bool {
        self.shared.has_begun.load(Ordering::Relaxed)
    }

    /// Ends it; nothing is given up any more when this returns.
    pub(super) async fn end(&self) {
        if let Some(task) = self.take_task() {
            task.abort();
            // It was aborted, or it told why it ended.
            let _ = task.await;
        }
    }
}

/// The writer of a disk that gives up what it was given.
pub(super) struct Releasing {
    writer: Arc<DiskWriter>,
    releaser: Arc<Releaser>,
}

impl Releasing {
    pub(super) fn new(writer: Arc<DiskWriter>, releaser: Arc<Releaser>) -> Self {
        Self { writer, releaser }
    }
}

#[async_trait]
impl BlockSink for Releasing {
    fn geometry(&self) -> Geometry {
        self.writer.geometry()
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let stored = self.writer.store(offset, buffer).await?;
        self.releaser.add(range, stored.durability);
        Ok(())
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.writer.zero(range, mode).await?;
        self.releaser.add(range, Durability::Now);
        Ok(())
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.writer.keep(range).await?;
        self.releaser.add(range, Durability::Now);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.writer.flush().await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::error::{Error, Kind};

    proptest! {
        #[test]
        fn ranges_equal_a_set_of_bytes(
            inserted in prop::collection::vec((0_u64..60, 1_u64..12), 0..30),
        ) {
            let (mut ranges, mut bytes) = (Ranges::default(), [false; 80]);
            for (offset, len) in inserted {
                ranges.insert(ByteRange::new(offset, len));
                (offset..offset + len).for_each(|at| bytes[usize::try_from(at).unwrap()] = true);
            }
            let mut held = [false; 80];
            let mut last_end = None;
            for range in ranges.iter() {
                prop_assert!(last_end.is_none_or(|end| end < range.offset()), "two that touch");
                last_end = Some(range.end());
                (range.offset()..range.end()).for_each(|at| held[usize::try_from(at).unwrap()] = true);
            }
            prop_assert_eq!(held, bytes);
        }
    }

    fn range(mib: u64) -> ByteRange {
        ByteRange::new(mib * MIB, MIB)
    }

    #[test]
    fn nothing_is_taken_before_its_pack_is_durable() {
        let mut queue = Queue { is_last: true, ..Queue::default() };
        queue.add(range(0), Durability::Packs(2));
        queue.add(range(1), Durability::Packs(1));
        queue.add(range(2), Durability::Packs(1));
        queue.add(range(3), Durability::Commit);
        let mut taken = |durable| queue.take(durable).iter().collect::<Vec<_>>();
        assert!(taken(0).is_empty());
        assert_eq!(taken(1), [ByteRange::new(MIB, 2 * MIB)]);
        assert!(taken(1).is_empty());
        assert_eq!(taken(7), [range(0)]);
    }

    #[test]
    fn the_ranges_that_wait_are_bounded() {
        let mut queue = Queue::default();
        for at in 0..3 * RANGES_MAX as u64 {
            queue.add(range(2 * at), Durability::Packs(at % 3));
        }
        let held: usize = queue.waiting.values().map(|ranges| ranges.0.len()).sum();
        assert_eq!(held, RANGES_MAX);
    }

    /// Notes what it gives up.
    struct Noting(Mutex<Vec<ByteRange>>);

    #[async_trait]
    impl Release for Noting {
        async fn release(&self, range: ByteRange) -> Result<()> {
            self.0.lock().unwrap().push(range);
            Ok(())
        }
    }

    /// Gives nothing up.
    struct Refusing;

    #[async_trait]
    impl Release for Refusing {
        async fn release(&self, _range: ByteRange) -> Result<()> {
            Err(Error::new(Kind::Io, "no room for a hole"))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_told_once_that_nothing_more_is_given_up() {
        let (_packs, durable) = watch::channel(0);
        let control = Control::new();
        let named = ("vda".to_owned(), control.clone());
        let releaser = Releaser::start(Arc::new(Refusing), named, durable);
        releaser.no_more();
        for at in 0..3 {
            releaser.add(range(2 * at), Durability::Now);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let told: Vec<_> = control.notices_from(0).into_iter().map(|notice| notice.text).collect();
        assert_eq!(told, ["no more scratch is given back for vda: no room for a hole"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_small_waits_for_more_and_all_goes_in_the_end() {
        let (packs, durable) = watch::channel(0);
        let disk = Arc::new(Noting(Mutex::default()));
        let (target, settle) = (Arc::clone(&disk) as Arc<dyn Release>, Duration::from_secs(1));
        let releaser = Releaser::start(target, ("vda".into(), Control::new()), durable);
        let given_up = || std::mem::take(&mut *disk.0.lock().unwrap());
        releaser.add(range(0), Durability::Now);
        releaser.add(range(5), Durability::Packs(1));
        tokio::time::sleep(settle).await;
        assert!(given_up().is_empty() && !releaser.has_begun());
        releaser.add(ByteRange::new(MIB, BATCH_BYTES), Durability::Now);
        tokio::time::sleep(settle).await;
        assert_eq!(given_up(), [ByteRange::new(0, MIB + BATCH_BYTES)]);
        releaser.no_more();
        packs.send_replace(1);
        tokio::time::sleep(settle).await;
        assert_eq!(given_up(), [range(5)]);
        releaser.end().await;
        releaser.add(range(9), Durability::Now);
        tokio::time::sleep(settle).await;
        assert!(given_up().is_empty());
    }
}
