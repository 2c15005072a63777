//! A source that is read by as many requests at a time as pay, because others read and write beside.
//!
//! The exports of a running VM are served by the thread of QEMU that does the guest's own requests,
//! too (the main loop, where the disk has no iothread): what we have in flight there a write of the
//! guest waits behind. One request at a time is as fast as 32 where that thread is what takes the time
//! (measured with QEMU 10.0: a full backup took as long, and one write of the guest in a hundred took
//! 6 ms instead of 25), and far too slow where each request waits for a network or many disks.
//!
//! Which of both it is shows: twice as many requests either bring nearly twice the bytes, or wait for
//! each other. So the number begins at one, is doubled or halved for a moment, and stays so if that
//! paid:
//!
//! ```text
//!  measure at n ─► at 2 n ─► at n again: GAIN times the bytes of both?   ─ yes ─► n = 2 n
//!      ▲         ─► at n/2 ─► at n again: less than LOSS times fewer?    ─ yes ─► n = n/2
//!      └───────────────────────── no: try ever more seldom (PATIENCE)
//! ```
//!
//! More is tried only if somebody waited for a place all the time: where the sink is slower than the
//! source nothing is to be gained.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry, Release};
use crate::error::Result;

/// Twice the requests must bring so many times the bytes. A device that does them at once brings 1.9
/// and more; two requests that hide each other's way to a thread that is busy bring 1.5 at most.
const GAIN: f64 = 1.6;

/// Half the requests may bring so many times fewer bytes. Less than [`GAIN`], or both would pay.
const LOSS: f64 = 1.4;

/// A measurement takes at least so long and so many requests, of 1 MiB at most.
const WINDOW: Duration = Duration::from_millis(20);
const WINDOW_READS: usize = 8;

/// Measurements between two tries, at first and at most: a try is felt by the guest, and a disk seldom
/// becomes another.
const PATIENCE: u32 = 8;
const PATIENCE_MAX: u32 = 64;

/// A source whose reads take turns.
pub struct PacedSource {
    inner: Arc<dyn BlockSource>,
    places: Semaphore,
    pace: Mutex<Pace>,
}

impl PacedSource {
    /// Paces the reads of `inner`; at most as many at a time as it finds useful
    /// ([`Geometry::in_flight`]).
    pub fn new(inner: Arc<dyn BlockSource>) -> Self {
        let most = inner.geometry().in_flight.max(1);
        Self { inner, places: Semaphore::new(1), pace: Mutex::new(Pace::new(most)) }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        // Held for sums, never across an await.
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl BlockSource for PacedSource {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.inner.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        let permit = self.places.acquire().await.expect("the places are never closed");
        let mut place = Place { source: self, permit: Some(permit), read_bytes: None };
        let buffer = self.inner.read(offset, buffer).await?;
        place.read_bytes = Some(buffer.len());
        Ok(buffer)
    }

    fn release(&self) -> Option<Arc<dyn Release>> {
        self.inner.release()
    }
}

/// A request in flight; given back however it ends.
struct Place<'a> {
    source: &'a PacedSource,
    permit: Option<SemaphorePermit<'a>>,
    /// Bytes, once it succeeded.
    read_bytes: Option<usize>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let (mut pace, places) = (self.source.pace(), &self.source.places);
        if let Some(bytes) = self.read_bytes {
            pace.after_read(bytes, Instant::now());
        }
        if pace.places > pace.depth {
            pace.places -= 1;
            self.permit.take().into_iter().for_each(SemaphorePermit::forget);
        }
        // Who waits has the place at once: one that is free now was wanted by nobody.
        drop(self.permit.take());
        places.add_permits(pace.depth.saturating_sub(pace.places));
        pace.places = pace.places.max(pace.depth);
        pace.idle |= places.available_permits() > 0;
    }
}

/// How many requests at a time, and what is known of it.
#[derive(Debug)]
struct Pace {
    depth: usize,
    most: usize,
    /// Places that there are: more than that for as long as requests of before are in flight.
    places: usize,
    /// The measurement: when it began, what it saw, and whether a place was free meanwhile.
    begun: Option<Instant>,
    read_bytes: u64,
    reads: usize,
    idle: bool,
    /// Requests of before the depth changed, which are not part of the measurement.
    stale: usize,
    tried: Option<Try>,
    /// Whether the next try is of more.
    up: bool,
    /// Measurements until the next try, and how many it will be after one that failed.
    wait: u32,
    patience: u32,
}

/// Another depth for one measurement, and the rates of the three around it.
#[derive(Debug)]
struct Try {
    from: usize,
    to: usize,
    before: f64,
    during: Option<f64>,
}

impl Pace {
    fn new(most: usize) -> Self {
        Self {
            depth: 1,
            most,
            places: 1,
            begun: None,
            read_bytes: 0,
            reads: 0,
            idle: false,
            stale: 0,
            tried: None,
            up: true,
            wait: 0,
            patience: PATIENCE,
        }
    }

    /// Counts a read that ended, and decides how many there may be from now on.
    fn after_read(&mut self, bytes: usize, now: Instant) {
        if self.stale > 0 {
            self.stale -= 1;
            return;
        }
        let Some(begun) = self.begun else {
            // The first one only begins the measurement.
            (self.begun, self.idle) = (Some(now), false);
            return;
        };
        self.read_bytes += bytes as u64;
        self.reads += 1;
        let took = now.duration_since(begun);
        if self.reads >= WINDOW_READS.max(2 * self.depth) && took >= WINDOW {
            #[expect(clippy::cast_precision_loss, reason = "a rate to compare with another")]
            let rate = self.read_bytes as f64 / took.as_secs_f64();
            let depth = self.decide(rate);
            tracing::trace!(rate, from = self.depth, to = depth, idle = self.idle, "pace");
            self.stale = if depth == self.depth { 0 } else { self.depth };
            self.depth = depth;
            (self.begun, self.read_bytes, self.reads) = (None, 0, 0);
        }
    }

    /// The depth that is best or worth a try, after a measurement of `rate`.
    fn decide(&mut self, rate: f64) -> usize {
        let Some(Try { from, to, before, during }) = self.tried.take() else {
            return self.look_around(rate);
        };
        let Some(during) = during else {
            self.tried = Some(Try { from, to, before, during: Some(rate) });
            return from;
        };
        // Whatever else changed meanwhile is no merit of the try.
        let without = before.max(rate);
        let more = to > from;
        let paid = if more { during >= without * GAIN } else { during * LOSS >= without };
        if paid {
            // And on in the same direction.
            (self.up, self.wait, self.patience) = (more, 0, PATIENCE);
            return to;
        }
        (self.up, self.wait) = (!more, self.patience);
        self.patience = (self.patience * 2).min(PATIENCE_MAX);
        from
    }

    /// A try, if one is due.
    fn look_around(&mut self, rate: f64) -> usize {
        let next = if self.up { (self.depth * 2).min(self.most) } else { (self.depth / 2).max(1) };
        if next == self.depth {
            self.up = !self.up;
        } else if self.wait > 0 {
            self.wait -= 1;
        } else if self.up && self.idle {
            self.up = false;
        } else {
            self.tried = Some(Try { from: self.depth, to: next, before: rate, during: None });
            return next;
        }
        self.depth
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::conformance;
    use crate::block::memory::MemoryDisk;
    use tokio::task::JoinSet;

    const REQUEST_BYTES: usize = 64 << 10;

    /// A disk each request of which takes `each`; `at_once` of them at a time.
    struct Slow {
        inner: MemoryDisk,
        at_once: Semaphore,
        each: Duration,
    }

    #[async_trait]
    impl BlockSource for Slow {
        fn geometry(&self) -> Geometry {
            Geometry { in_flight: 32, ..BlockSource::geometry(&self.inner) }
        }

        async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
            self.inner.extents(range).await
        }

        async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
            let _turn = self.at_once.acquire().await.unwrap();
            tokio::time::sleep(self.each).await;
            self.inner.read(offset, buffer).await
        }
    }

    fn paced(at_once: usize) -> Arc<PacedSource> {
        let (at_once, each) = (Semaphore::new(at_once), Duration::from_millis(5));
        let inner = MemoryDisk::with_content(conformance::pattern(REQUEST_BYTES));
        Arc::new(PacedSource::new(Arc::new(Slow { inner, at_once, each })))
    }

    /// Reads by so many at a time; how long it took, and the depths.
    async fn read_all(
        source: &Arc<PacedSource>,
        takers: usize,
        reads: usize,
    ) -> (Duration, Vec<usize>) {
        let (begun, at_a_time, mut takers) = (Instant::now(), takers, JoinSet::new());
        let depths = Arc::new(Mutex::new(Vec::new()));
        for _ in 0..at_a_time {
            let (source, depths) = (Arc::clone(source), Arc::clone(&depths));
            takers.spawn(async move {
                for _ in 0..reads / at_a_time {
                    let buffer = Buffer::unbudgeted(vec![0; REQUEST_BYTES]);
                    source.read(0, buffer).await.unwrap();
                    depths.lock().unwrap().push(source.pace().depth);
                }
            });
        }
        takers.join_all().await;
        let depths = std::mem::take(&mut *depths.lock().unwrap());
        (begun.elapsed(), depths)
    }

    fn share(depths: &[usize], of: impl Fn(usize) -> bool) -> f64 {
        let matching = depths.iter().filter(|depth| of(**depth)).count();
        f64::from(u32::try_from(matching).unwrap())
            / f64::from(u32::try_from(depths.len()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn one_request_at_a_time_where_more_wait_for_each_other() {
        let (_, depths) = read_all(&paced(1), 64, 64 * 200).await;
        assert!(share(&depths, |depth| depth == 1) > 0.9, "{:?}", &depths[..200]);
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_as_there_may_be_where_they_do_not() {
        let (took, depths) = read_all(&paced(1000), 64, 64 * 200).await;
        assert_eq!(depths.last(), Some(&32));
        // 32 at a time from the first on would take 2 s.
        assert!(took < Duration::from_secs(3), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_as_the_disk_does_at_once() {
        let (_, depths) = read_all(&paced(8), 64, 64 * 400).await;
        assert!(share(&depths, |depth| depth == 8) > 0.8, "{:?}", &depths[..400]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_are_tried_while_the_sink_is_what_takes_the_time() {
        // Who takes them is always there alone.
        let (_, depths) = read_all(&paced(1000), 1, 2000).await;
        assert!(depths.iter().all(|depth| *depth == 1), "{:?}", depths.iter().max());
    }

    #[tokio::test(start_paused = true)]
    async fn fewer_again_when_the_disk_becomes_slower() {
        let source = paced(1000);
        read_all(&source, 64, 64 * 100).await;
        assert_eq!(source.pace().depth, 32);
        // Nothing is to be gained by more than one from here on: every rate is the same.
        let mut pace = source.pace();
        pace.wait = 0;
        let mut now = Instant::now();
        for _ in 0..100_000 {
            now += Duration::from_millis(5);
            pace.after_read(REQUEST_BYTES, now);
        }
        assert!(pace.depth <= 2, "{pace:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_that_is_dropped_gives_its_place_back() {
        let source = paced(1000);
        for _ in 0..100 {
            let read = source.read(0, Buffer::unbudgeted(vec![0; REQUEST_BYTES]));
            assert!(tokio::time::timeout(Duration::from_millis(1), read).await.is_err());
        }
        assert_eq!(source.places.available_permits(), 1);
    }

    #[tokio::test]
    async fn a_paced_disk_conforms() {
        let content = conformance::pattern(300_000);
        let disk = Arc::new(MemoryDisk::with_content(content.clone()));
        conformance::source(&PacedSource::new(disk), &content).await;
    }
}
